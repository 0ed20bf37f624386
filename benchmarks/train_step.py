"""Training speed: one whole step (forward, backward, update) beside a Hugging Face Llama of equal parameters.

    python -m benchmarks.train_step                                  # depth 6, 8 x 512 tokens
    python -m benchmarks.train_step --compile both --output step.json  # compiled and eager, the better one counts

The Llama has AdamW (fused) and the best of three precisions: fp32, bf16 autocast, all bf16. Our models have their own
optimizer (Muon for matrices) and the dtype training picks on this machine. Freed memory is kept, as in training, for
everybody. MFU is the share of the machine's measured bf16 matmul rate that goes into the model's own FLOPs. Target: at
least 1.5 times the Llama's tokens per second.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import interleave, matmul_rate, report
from benchmarks.decode import VOCAB, llama
from nanochat.common import UserError, pick_dtype
from nanochat.config import run
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.train import keep_memory


@dataclass
class Config:
    """Settings; each can be given as a flag."""

    depth: int = 6  # layers
    batch: int = 8  # rows of a step
    length: int = 512  # tokens of a row
    models: str = "gpt,hybrid"  # ours to measure, comma-separated: gpt, hybrid, mamba or block patterns
    steps: int = 2  # steps of one turn
    rounds: int = 3  # turns each contender has
    compile: str = "no"  # no, yes or both (then the better one of each model counts)
    dtype: str = "auto"  # of our models: float32, bfloat16 or what training would pick
    threads: int = 0  # 0: torch's default
    seed: int = 0
    max_examples: int = 0  # measure only the first so many of our models (0: all)
    output: str = ""  # write the figures to this JSON file


def step_ours(pattern: str, config: Config, dtype: torch.dtype, compiled: bool) -> tuple[Callable[[], float], GPT]:
    """A case for `interleave` that trains one of our models for some steps, and the model."""
    model = GPT(GPTConfig.from_depth(config.depth, pattern, vocab_size=VOCAB, sequence_len=config.length))
    model.init_weights()
    model.set_compute_dtype(dtype).train()
    optimizer = build_optimizer(model.param_groups(0.02, 0.2, 0.004, 0.004, 0.0))
    if compiled:
        model.compile_blocks()
    ids = torch.randint(0, VOCAB, (config.batch, config.length + 1))

    def case() -> float:
        for _ in range(config.steps):
            optimizer.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.reduce_gradients()
            optimizer.step()
        return config.steps * config.batch * config.length

    return case, model


def step_hf(target: int, config: Config, precision: str, compiled: bool) -> Callable[[], float]:
    """The same for the Llama: `precision` is fp32, autocast or bf16."""
    model = llama(target, config.depth).train()
    if precision == "bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    ids = torch.randint(0, VOCAB, (config.batch, config.length))

    def case() -> float:
        for _ in range(config.steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return config.steps * config.batch * config.length

    return case


def main(config: Config) -> None:
    """Build every contender, let them take turns, print the best of each."""
    try:
        from transformers.utils import logging
    except ImportError as e:
        raise UserError("the benchmark needs transformers: pip install 'nanochat[dev]'") from e
    if config.compile not in ("no", "yes", "both"):
        raise UserError(f"--compile {config.compile}: choose no, yes or both")
    if min(config.batch, config.length, config.steps, config.rounds) < 1:
        raise UserError("batch, length, steps and rounds must be at least 1")
    logging.set_verbosity_error()
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()
    torch.manual_seed(config.seed)
    dtype = pick_dtype("cpu", config.dtype)
    ways = {"no": [False], "yes": [True], "both": [False, True]}[config.compile]
    names = [name.strip() for name in config.models.split(",")][: config.max_examples or None]
    cases: dict[tuple[str, str], Callable[[], float]] = {}
    flops, params = {}, {}
    for compiled in ways:
        how = "compiled" if compiled else "eager"
        for name in names:
            case, model = step_ours(name, config, dtype, compiled)
            cases[name, f"{str(dtype).removeprefix('torch.')} {how}"] = case
            flops[name], params[name] = model.flops_per_token(config.length), model.num_params()["total"]
            for precision in ("fp32", "autocast", "bf16"):
                cases[f"llama_for_{name}", f"{precision} {how}"] = step_hf(params[name], config, precision, compiled)
    roof = matmul_rate(torch.bfloat16)
    result = interleave(cases, config.rounds)
    roof = max(roof, matmul_rate(torch.bfloat16))
    best = {n: max((k for k in cases if k[0] == n), key=lambda k: result[k]["rate"]) for n, _ in cases}
    rows: dict[str, dict[str, float | str]] = {}
    for name in names:
        peer = f"llama_for_{name}"
        for row in (name, peer):
            r = result[best[row]]
            rows[row] = {
                "n": config.rounds * config.steps,
                "how": best[row][1],
                "parameters": params[name],
                "tokens_per_second": r["rate"],
                "tokens_per_cpu_second": r["cpu_rate"],
            }
        rows[name]["times_llama"] = rows[name]["tokens_per_second"] / rows[peer]["tokens_per_second"]
        rows[name]["mfu"] = rows[name]["tokens_per_second"] * flops[name] / roof
    for key, r in result.items():
        if key not in best.values():
            rows[f"{key[0]} ({key[1]})"] = {"how": key[1], "tokens_per_second": r["rate"]}
    print(f"bf16 matmul: {roof / 1e12:.2f} TFLOP/s")
    report(rows, {**asdict(config), "matmul_flops_per_second": roof}, ("transformers",), config.output)


if __name__ == "__main__":
    run(main, Config)
