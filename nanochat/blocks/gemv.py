"""Decoding on a CPU: linear layers of one token at the speed memory delivers the weights.

A decoded token reads every weight once and multiplies it once, so bytes are the cost. PyTorch's product of a matrix
and one row ignores that: bf16 weights, half the bytes, take it as long as fp32 ones. gemv.cpp does it in half the
time. `speed_up(model)` makes a model's linear layers use it where it applies: one row, no gradient, on a CPU, weights
in the activation's dtype. Everything else, and every machine without a C++ compiler, runs through PyTorch as before.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn

from nanochat.blocks.fused import FLAGS, _cpu
from nanochat.common import Linear, get_base_dir

SOURCE = Path(__file__).with_name("gemv.cpp")


@cache
def library() -> dict[torch.dtype, object] | None:
    """The compiled product for each dtype, or None where it can't be had. Compiled once, kept in the base directory."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("NANOCHAT_FUSED", "1") == "0" or not compiler:
        return None
    # torch brings its own OpenMP runtime; a second one in the process would fight it for the cores
    gomp = sorted(str(p) for p in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    own = bool(gomp) and "g++" in Path(compiler).name and "clang" not in Path(compiler).name
    flags = [*FLAGS, "-mprefer-vector-width=512", "-fopenmp"] if own else [*FLAGS, "-fopenmp-simd"]
    key = hashlib.sha256(repr((SOURCE.read_bytes(), compiler, flags, gomp, _cpu())).encode()).hexdigest()[:16]
    try:
        path = get_base_dir() / "kernels" / f"gemv_{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
                built = Path(tmp) / "gemv.so"
                command = [compiler, *flags, str(SOURCE), "-o", str(built), *(gomp[:1] if own else [])]
                subprocess.run(command, check=True, capture_output=True, timeout=300)
                os.replace(built, path)
        lib = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    functions = {torch.float32: lib.gemv_f32, torch.bfloat16: lib.gemv_bf16}
    for f in functions.values():
        f.argtypes, f.restype = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_int], None
    return functions


class DecodeLinear(Linear):
    """A Linear that multiplies a single row with gemv.cpp; made from a Linear by `speed_up`, weights untouched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        n, k = w.shape
        plain = x.numel() != k or x.dtype != w.dtype or torch.is_grad_enabled() or x.device.type != "cpu"
        if plain or torch.compiler.is_compiling():
            return super().forward(x)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
        library()[x.dtype](w.data_ptr(), x.data_ptr(), y.data_ptr(), n, k, torch.get_num_threads())
        return y


def speed_up(model: nn.Module) -> None:
    """Let the model's linear layers decode with gemv.cpp, if this machine can."""
    for module in model.modules():
        fits = type(module) is Linear and module.bias is None and module.weight.dtype in (torch.float32, torch.bfloat16)
        if fits and module.weight.device.type == "cpu" and module.weight.is_contiguous() and library():
            module.__class__ = DecodeLinear
