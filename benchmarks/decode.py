"""Decode speed: our engine beside `generate()` of a Hugging Face Llama and Mamba2 of equal parameters, in one run.

    python -m benchmarks.decode                              # depth 6, batch 1 and 8
    python -m benchmarks.decode --threads 1 --output decode.json

Rows named llama_for_… and mamba2_for_… are Hugging Face's. Every model is tried in fp32 and bf16 (weights cast once)
and judged by its better one. Greedy decoding of `tokens`
tokens after a prompt; the prompt's reading is timed with it on both sides. Weights are random: speed doesn't care.
Target: at batch 1 at least twice the Llama's tokens per second.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import interleave, report
from nanochat.common import UserError
from nanochat.config import run
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

VOCAB = 8192


@dataclass
class Config:
    """Settings; each can be given as a flag."""

    depth: int = 6  # layers of our models; the peers get as many parameters
    batch: str = "1,8"  # batch sizes to measure, comma-separated
    prompt: int = 128  # tokens read before
    tokens: int = 64  # tokens decoded
    rounds: int = 5  # turns each contender has
    threads: int = 0  # 0: torch's default
    seed: int = 0
    max_examples: int = 0  # measure only the first so many of gpt, hybrid, mamba (0: all)
    output: str = ""  # write the figures to this JSON file


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of VOCAB ids; the benchmark reads and writes ids only."""
    n = VOCAB - len(SPECIAL_TOKENS)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    return Tokenizer({token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + pairs[: n - 256])})


def ours(pattern: str, depth: int, dtype: torch.dtype) -> GPT:
    """One of our models as `load_model` leaves it for inference."""
    model = GPT(GPTConfig.from_depth(depth, pattern, vocab_size=VOCAB))
    model.init_weights()
    model.eval().requires_grad_(False).set_compute_dtype(dtype)
    for p in model.parameters():
        if p.ndim >= 2:
            p.data = p.data.to(dtype)
    return model


def llama(target: int, depth: int) -> torch.nn.Module:
    """A Llama of our width and depth whose MLP is as wide as it takes to have `target` parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = max(256, 64 * depth)
    rest = target - 2 * VOCAB * width - depth * (4 * width * width + 2 * width) - width
    inner = max(8, round(rest / (3 * width * depth) / 8) * 8)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=inner, num_hidden_layers=depth,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def hf_mamba2(target: int, depth: int) -> torch.nn.Module:
    """A Mamba2 of our width (heads of 64, state 64) with as many layers as come closest to `target` parameters."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    width = max(256, 64 * depth)
    layer = 6 * width * width  # in_proj and out_proj; the rest is small
    layers = max(1, round((target - 2 * VOCAB * width) / layer))
    config = Mamba2Config(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_heads=width // 32, head_dim=64,
        state_size=64, n_groups=1, expand=2, chunk_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


def decode_ours(model: GPT, tokenizer: Tokenizer, ids: torch.Tensor, tokens: int) -> Callable[[], float]:
    """A case for `interleave`: the engine's batched greedy decoding, never stopping early."""
    engine, prompts = Engine(model, tokenizer), ids.tolist()

    def case() -> float:
        done = engine.generate(prompts, max_tokens=tokens, stop=())
        return sum(len(c.ids) for c in done)

    return case


def decode_hf(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> Callable[[], float]:
    """The same with `generate()`."""

    def case() -> float:
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return out[:, ids.size(1) :].numel()

    return case


def main(config: Config) -> None:
    """Build every contender, let them take turns, print what is how many times the Llama's speed."""
    try:
        batches = [int(b) for b in config.batch.split(",")]
        from transformers.utils import logging
    except ValueError as e:
        raise UserError(f"--batch {config.batch}: give numbers such as 1,8") from e
    except ImportError as e:
        raise UserError("the benchmark needs transformers: pip install 'nanochat[dev]'") from e
    if min(batches) < 1 or config.tokens < 1 or config.prompt < 1 or config.rounds < 1:
        raise UserError("batch, prompt, tokens and rounds must be at least 1")
    logging.set_verbosity_error()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = byte_tokenizer()
    rows: dict[str, dict[str, float | str]] = {}
    # Each of our models with a Llama of its own size; hf_mamba2 has the size of our mamba
    sizes = {n: ours(n, config.depth, torch.float32).num_params()["total"] for n in ("gpt", "hybrid", "mamba")}
    build: dict[str, Callable[[torch.dtype], torch.nn.Module]] = {}
    for name in list(sizes)[: config.max_examples or None]:
        build[name] = lambda dtype, name=name: ours(name, config.depth, dtype)
        build[f"llama_for_{name}"] = lambda dtype, n=sizes[name]: llama(n, config.depth).eval().to(dtype)
    if "mamba" in build:
        build["mamba2_for_mamba"] = lambda dtype: hf_mamba2(sizes["mamba"], config.depth).eval().to(dtype)
    for batch in batches:
        ids = torch.randint(0, 256, (batch, config.prompt))
        cases, params = {}, {}
        for name in build:
            for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                model = build[name](dtype)
                params[name] = sum(p.numel() for p in model.parameters())
                if isinstance(model, GPT):
                    cases[name, label] = decode_ours(model, tokenizer, ids, config.tokens)
                else:
                    cases[name, label] = decode_hf(model, ids, config.tokens)
        result = interleave(cases, config.rounds)
        best = {n: max((k for k in cases if k[0] == n), key=lambda k: result[k]["rate"]) for n in build}
        for name in build:
            r = result[best[name]]
            rows[f"{name}_batch{batch}"] = {
                "n": config.rounds,
                "dtype": best[name][1],
                "parameters": params[name],
                "tokens_per_second": r["rate"],
                "tokens_per_cpu_second": r["cpu_rate"],
                "fp32_tokens_per_second": result[name, "fp32"]["rate"],
                "bf16_tokens_per_second": result[name, "bf16"]["rate"],
            }
            for peer in (f"llama_for_{name}", f"mamba2_for_{name}"):
                if peer in best:
                    rows[f"{name}_batch{batch}"][f"times_{peer.partition('_')[0]}"] = (
                        r["rate"] / result[best[peer]]["rate"]
                    )
    report(rows, asdict(config), ("transformers",), config.output)


if __name__ == "__main__":
    run(main, Config)
