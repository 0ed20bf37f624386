"""Training speed of a Mamba-2 block, forward + backward, beside Hugging Face Mamba2, mambapy and attention + MLP.

    python -m benchmarks.mixer                                        # all shapes, 2 layers of width 384
    python -m benchmarks.mixer --shapes 8x512 --threads 1 --rounds 6  # quick; one thread is steadier when it's busy
    python -m benchmarks.mixer --compile true                         # adds our PyTorch path under torch.compile

Contenders take turns in one process. Hugging Face runs its torch path in fp32 and in bf16 (autocast), with chunks of
64 like ours, which is faster for it than its default of 256; mambapy is Mamba-1 with its parallel scan, in fp32. All
have pre-norm and residual. Columns: tokens per wall second and per CPU second through the stack, both as a multiple of
the better Hugging Face row of that shape; MFU, the matrix-product FLOPs done (6 per weight and token, and the scan's)
as a share of a bf16 matmul's rate here; peak memory above what was resident before the pass.
Target: at least 3 x Hugging Face at 8x512 and 3.5 x at 1x8192.
"""

import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.common import interleave, matmul_rate, report
from nanochat.blocks import fused
from nanochat.blocks.mamba import MambaBlock
from nanochat.common import UserError
from nanochat.config import run

HEAD = 64  # headdim, d_state and chunk length of every contender that has them


@dataclass
class Config:
    shapes: str = "8x512,2x2048,1x8192"  # batch x tokens, comma-separated
    width: int = 384  # d_model
    layers: int = 2  # blocks in the stack
    rounds: int = 4  # turns each contender has
    threads: int = 0  # 0: torch's default
    compile: bool = False  # also our PyTorch path under torch.compile (a minute to compile)
    seed: int = 0
    max_examples: int = 0  # measure only the first so many shapes (0: all)
    output: str = ""  # write the figures to this JSON file


class Residual(nn.Module):
    """x + mixer(rms_norm(x)), as our own block; `autocast` is how Hugging Face models train in bf16."""

    def __init__(self, mixer: nn.Module, autocast: bool = False):
        super().__init__()
        self.mixer, self.autocast = mixer, autocast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return x + self.mixer(F.rms_norm(x, (x.size(-1),)))


class Attention(nn.Module):
    """Causal attention and a ReLU² MLP with a Mamba-2 block's number of weights, on our Linear layers."""

    def __init__(self, width: int, weights: int):
        super().__init__()
        from nanochat.common import Linear

        hidden = (weights - 4 * width * width) // (2 * width)
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = lambda t: F.rms_norm(t, (t.size(-1),))
        q, k, v = (t.transpose(1, 2) for t in self.qkv(norm(x)).unflatten(-1, (3, -1, HEAD)).unbind(2))
        y = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.down(F.relu(self.up(norm(x))).square())


def contenders(config: Config) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Name -> (stack of blocks, dtype of its input)."""
    stack = lambda make: nn.Sequential(*(make() for _ in range(config.layers)))
    ours = lambda: MambaBlock(config.width, d_state=HEAD, headdim=HEAD, chunk_size=HEAD)
    weights = sum(p.numel() for p in ours().parameters() if p.ndim == 2)
    found = {
        "ours bf16": (stack(ours), torch.bfloat16),
        "ours fp32": (stack(ours), torch.float32),
        "attention+mlp bf16": (stack(lambda: Attention(config.width, weights)), torch.bfloat16),
    }
    if config.compile:  # under torch.compile a block takes the PyTorch path by itself
        found["ours bf16 torch.compile"] = (stack(lambda: torch.compile(ours(), dynamic=False)), torch.bfloat16)
    try:
        from transformers import Mamba2Config, logging
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        logging.set_verbosity_error()
        hf = Mamba2Config(
            hidden_size=config.width,
            state_size=HEAD,
            head_dim=HEAD,
            num_heads=2 * config.width // HEAD,
            n_groups=1,
            chunk_size=HEAD,
            num_hidden_layers=1,
            use_bias=False,
        )
        found["huggingface fp32"] = (stack(lambda: Residual(Mamba2Mixer(hf, 0))), torch.float32)
        found["huggingface bf16"] = (stack(lambda: Residual(Mamba2Mixer(hf, 0), autocast=True)), torch.float32)
    except ImportError:
        print("transformers isn't installed: no Hugging Face rows")
    try:
        from mambapy.mamba import MambaBlock as Mamba1
        from mambapy.mamba import MambaConfig

        found["mambapy fp32"] = (stack(lambda: Residual(Mamba1(MambaConfig(config.width, 1)))), torch.float32)
    except ImportError:
        print("mambapy isn't installed: no row for it")
    return found


def train_pass(model: nn.Module, x: torch.Tensor) -> Callable[[], float]:
    """A function that runs forward and backward once and returns the number of tokens."""

    def case() -> float:
        model.zero_grad(set_to_none=True)
        model(x.clone().requires_grad_()).float().square().mean().backward()
        return x.size(0) * x.size(1)

    return case


def peak_memory(case: Callable[[], float]) -> float | None:
    """GB by which one call raises the resident set (Linux only)."""
    status = lambda key: next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory that malloc keeps would hide the rise
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        case()
        return (status("VmHWM") - before) / 1e6
    except (OSError, AttributeError, StopIteration):
        return None


def flops_per_token(config: Config) -> float:
    """Matrix-product FLOPs of one token through the stack, forward and backward: 3 times the forward's."""
    inner = 2 * config.width
    projections = 2 * config.width * (3 * inner + 2 * HEAD + inner // HEAD)
    scan = 2 * HEAD * HEAD + 3 * 2 * HEAD * inner  # C B^T; M x, B^T x and C S
    return 3.0 * config.layers * (projections + scan)


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        shapes = [tuple(int(n) for n in s.split("x")) for s in config.shapes.split(",")]
        assert all(len(s) == 2 and min(s) > 0 for s in shapes)
    except (ValueError, AssertionError):
        raise UserError(f"--shapes {config.shapes}: write batch x tokens, for example 8x512,1x8192") from None
    if config.width % HEAD:
        raise UserError(f"--width {config.width}: must be a multiple of {HEAD}")
    if fused.library() is None:
        print("no C++ compiler (or NANOCHAT_FUSED=0): our rows use the PyTorch path")
    models = contenders(config)
    peak = matmul_rate(torch.bfloat16)
    print(f"bf16 matmul 2048^3: {peak / 1e12:.2f} TFLOP/s with {torch.get_num_threads()} threads")
    rows = {}
    for batch, tokens in shapes[: config.max_examples or None]:
        cases = {n: train_pass(m, torch.randn(batch, tokens, config.width).to(d)) for n, (m, d) in models.items()}
        rates = interleave(cases, config.rounds)
        hf = [r for n, r in rates.items() if n.startswith("huggingface")]
        for name, rate in rates.items():
            row = {"n": config.rounds, "tokens_per_s": rate["rate"], "tokens_per_cpu_s": rate["cpu_rate"]}
            if hf:
                row["x_hf"] = rate["rate"] / max(r["rate"] for r in hf)
                row["x_hf_cpu"] = rate["cpu_rate"] / max(r["cpu_rate"] for r in hf)
            if "ours" in name or "huggingface" in name:
                row["mfu"] = rate["rate"] * flops_per_token(config) / peak
            row["peak_gb"] = peak_memory(cases[name])
            rows[f"{batch}x{tokens} {name}"] = row
    report(rows, asdict(config) | {"matmul_tflops": peak / 1e12}, ("transformers", "mambapy"), config.output)


if __name__ == "__main__":
    run(main, Config)
