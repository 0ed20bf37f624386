"""Time to the first token against the length of the context: gpt, mamba and hybrid at equal parameters, in one run.

    python -m benchmarks.prefill --threads 1 --output prefill.json

One prompt is read and the first token's logits are ready; weights are random, speed doesn't care. The patterns are
those of benchmarks/patterns.py: equal in parameters to within 5 %. `ms_512` ... are the best rounds' milliseconds,
`cache_8192_mb` (and so on, for the longest context) what a conversation then keeps in memory.
"""

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common import interleave, report
from benchmarks.decode import VOCAB, byte_tokenizer
from benchmarks.patterns import CASES
from nanochat.common import UserError, pick_dtype
from nanochat.config import run
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig


@dataclass
class Config:
    """Settings; each can be given as a flag."""

    contexts: str = "512,1024,2048,4096,8192"  # tokens read, comma-separated
    n_embd: int = 256  # width
    rounds: int = 3  # turns each contender has
    threads: int = 0  # 0: torch's default
    dtype: str = "auto"  # float32 or bfloat16
    seed: int = 0
    max_examples: int = 0  # measure only the first so many patterns (0: all)
    output: str = ""  # write the figures to this JSON file


def main(config: Config) -> dict:
    try:
        contexts = [int(n) for n in config.contexts.split(",")]
    except ValueError:
        contexts = [0]
    if min(contexts) < 1:
        raise UserError(f"--contexts {config.contexts}: whole numbers from 1, separated by commas")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    dtype, rows, cases = pick_dtype("cpu", config.dtype), {}, {}
    for name, (_, pattern) in list(CASES.items())[: config.max_examples or None]:
        model = GPT(GPTConfig(max(contexts), VOCAB, len(pattern), 4, 4, config.n_embd, pattern))
        model.init_weights()
        model.eval().requires_grad_(False).set_compute_dtype(dtype)
        engine = Engine(model, byte_tokenizer())
        layers = engine.prefill(torch.randint(VOCAB, (max(contexts),)).tolist()).cache.layers
        kept = [x for layer in layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
        rows[name] = {"pattern": pattern, "parameters": model.num_params()["total"]}
        rows[name] |= {f"cache_{max(contexts)}_mb": sum(x.numel() * x.element_size() for x in kept) / 1e6}
        for n in contexts:
            ids = torch.randint(VOCAB, (n,)).tolist()
            cases[f"{name}/{n}"] = partial(read, engine, ids)
    for case, best in interleave(cases, config.rounds).items():
        name, _, n = case.partition("/")
        rows[name][f"ms_{n}"] = 1000 * int(n) / best["rate"]
    report(rows, vars(config) | {"dtype": str(dtype)}, (), config.output)
    return rows


def read(engine: Engine, ids: list[int]) -> int:
    engine.prefill(ids)
    return len(ids)


if __name__ == "__main__":
    run(main, Config)
