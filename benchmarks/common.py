"""What the benchmarks share: interleaved timing, the machine's matmul rate, a table, a JSON file.

Contenders take turns, round by round, so that a machine that slows down slows all of them; each is judged by its best
round. CPU seconds stand beside wall seconds: on a busy machine they are the steadier of the two.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.common import write_json


def interleave(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Run every case once to warm up, then `rounds` times in turns.

    A case does some work and returns how many units (tokens) it was. Returns for each the best units per wall second
    ("rate") and per CPU second ("cpu_rate").
    """
    best = {name: {"rate": 0.0, "cpu_rate": 0.0} for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            units = case()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                best[name]["rate"] = max(best[name]["rate"], units / wall)
                best[name]["cpu_rate"] = max(best[name]["cpu_rate"], units / cpu)
    return best


def matmul_rate(dtype: torch.dtype, n: int = 2048, rounds: int = 8) -> float:
    """FLOP/s of an n x n matrix product, the best of some rounds: what MFU is a fraction of."""
    a, b = torch.randn(2, n, n).to(dtype)
    a @ b
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch and the named packages, and the processor."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return {**found, "cpu": f"{model}, {torch.get_num_threads()} threads"}


def report(rows: dict[str, dict[str, float | str]], config: dict, packages: tuple[str, ...], output: str) -> None:
    """Print the rows as a table and, with `output`, write them as JSON."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    show = lambda v: "" if v is None else v if isinstance(v, str) else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
    table = [["", *columns], *([name, *(show(row.get(c)) for c in columns)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns) + 1)]
    for line in table:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))
    if output:
        write_json(output, {"rows": rows, "config": config, "versions": versions(*packages)})
        print(f"written to {output}")
