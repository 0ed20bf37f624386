"""Is the memory estimate of `--dry_run` right? Training steps in fresh processes, their peak beside the estimate.

    python -m benchmarks.memory                      # gpt, mamba, hybrid; with and without gradient checkpointing
    python -m benchmarks.memory --shapes 8x1024 --models hybrid --keep false --output memory.json

Measured is the growth of resident memory (VmHWM, Linux only) over what the process had after its imports and a step of
a toy model, which loads what the libraries load at first use. Target: the estimate within 15 % of it, also
with `--keep false`, where freed memory goes back to the system and only the tensors count. This checks the
CPU's paths only; the figure that `--dry_run` gives for a GPU follows other paths and was never measured.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import report
from nanochat.common import UserError, pick_dtype
from nanochat.config import run
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory_estimate import memory
from nanochat.optim import build_optimizer
from nanochat.train import keep_memory


@dataclass
class Config:
    """Settings; each can be given as a flag."""

    models: str = "gpt,mamba,hybrid"  # presets or block patterns, comma-separated
    shapes: str = "2x512,8x512,4x1024,8x1024"  # rows x tokens of a micro-batch, comma-separated
    depth: int = 6  # layers
    n_embd: int = 0  # width; 0: 64 x depth, at least 256
    vocab_size: int = 8192  # size of the vocabulary
    steps: int = 2  # training steps of each process
    keep: bool = True  # keep freed memory, as training does; false: give it back, so that the peak is the tensors'
    dtype: str = "auto"  # float32, bfloat16 or what training would pick
    seed: int = 0
    max_examples: int = 0  # measure only the first so many cases (0: all)
    output: str = ""  # write the figures to this JSON file
    case: str = ""  # for the fresh processes: the one case to measure, as JSON


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def train(config: GPTConfig, rows: int, dtype: torch.dtype, checkpointing: bool, steps: int) -> None:
    """Some steps as the training loop does them."""
    model = GPT(config)
    model.init_weights()
    model.set_compute_dtype(dtype).train().gradient_checkpointing = checkpointing
    optimizer = build_optimizer(model.param_groups(0.02, 0.2, 0.004, 0.004, 0.0))
    for _ in range(steps):
        ids = torch.randint(0, config.vocab_size, (rows, config.sequence_len + 1))
        model(ids[:, :-1], ids[:, 1:]).backward()
        norm = optimizer.reduce_gradients()
        optimizer.step(1.0, 0.9, 1 / max(norm, 1.0))
        optimizer.zero_grad()


def measure(case: dict) -> int:
    """The growth in bytes, in this process."""
    dtype = pick_dtype("cpu", case["dtype"])
    if case["keep"]:
        keep_memory()
    torch.manual_seed(case["seed"])
    toy = GPTConfig(sequence_len=64, vocab_size=128, n_layer=2, n_head=1, n_kv_head=1, n_embd=64, block_pattern="TM")
    train(toy, 1, dtype, case["checkpointing"], 1)
    before = resident("VmRSS")
    train(GPTConfig(**case["model"]), case["rows"], dtype, case["checkpointing"], case["steps"])
    return resident("VmHWM") - before


def main(config: Config) -> None:
    """Measure every case in a process of its own and print it beside the estimate."""
    if config.case:
        print(measure(json.loads(config.case)))
        return
    if not Path("/proc/self/status").exists():
        raise UserError("resident memory is read from /proc: this benchmark needs Linux")
    try:
        shapes = [tuple(int(x) for x in shape.split("x")) for shape in config.shapes.split(",")]
        assert all(len(shape) == 2 and min(shape) > 0 for shape in shapes)
    except (ValueError, AssertionError) as e:
        raise UserError(f"--shapes {config.shapes}: write rows x tokens, such as 8x512,4x1024") from e
    cases = [(m.strip(), *shape, ckpt) for m in config.models.split(",") for shape in shapes for ckpt in (False, True)]
    rows: dict[str, dict[str, float | str]] = {}
    dtype = pick_dtype("cpu", config.dtype)
    for model, batch, length, checkpointing in cases[: config.max_examples or None]:
        shape = GPTConfig.from_depth(
            config.depth, model, vocab_size=config.vocab_size, sequence_len=length, n_embd=config.n_embd
        )
        case = {"model": asdict(shape), "rows": batch, "dtype": config.dtype, "checkpointing": checkpointing}
        case |= {"steps": config.steps, "seed": config.seed, "keep": config.keep}
        command = [sys.executable, "-m", "benchmarks.memory", f"--case={json.dumps(case)}"]
        heap = {} if config.keep else {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | heap)
        if done.returncode:
            raise UserError(f"measuring {model} {batch}x{length} failed: {done.stderr.strip()[-300:]}")
        measured = int(done.stdout.split()[-1])
        found = memory(shape, batch, length, "cpu", dtype, 1, checkpointing)
        estimate = found["resident, with the heap's gaps" if config.keep else "peak"]
        name = f"{model} {batch}x{length}{' checkpointing' if checkpointing else ''}"
        megabytes = {"estimate_mb": estimate / 1e6, "measured_mb": measured / 1e6}
        rows[name] = {"n": config.steps, **megabytes, "ratio": estimate / measured}
        print(f"{name}: estimate {estimate / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB", flush=True)
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    report(rows, asdict(config), (), config.output)
    print(f"estimate / measured is off by {worst:.1%} at most; CPU paths only, a GPU's figure was never measured")


if __name__ == "__main__":
    run(main, Config)
