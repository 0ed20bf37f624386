"""Compile a C++ file of this folder once, load it with ctypes, call its functions with tensors.

    lib = kernels.load("fused.cpp", FLAGS)              # None where there is no compiler, or with NANOCHAT_FUSED=0
    kernels.run(lib, "rms_fwd", x.dtype, x, 1e-6, out)  # calls rms_fwd_f32 or rms_fwd_bf16

Compiled libraries are kept in the base directory, named by a hash of everything that decides what they contain.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import get_base_dir

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


@cache
def load(name: str, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | None:
    """The library compiled from `name`, or None where it can't be had. Never raises: the fallback is always right."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("NANOCHAT_FUSED", "1") == "0" or not compiler:
        return None
    # torch brings its own OpenMP runtime; a second one in the process would fight it for the cores.
    gomp = sorted(str(p) for p in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    if not ("g++" in Path(compiler).name and "clang" not in Path(compiler).name):
        gomp = []
    flags += ("-fopenmp", "-mprefer-vector-width=512") if gomp else ("-fopenmp-simd",)
    texts = [(HERE / name).read_bytes(), *(p.read_bytes() for p in sorted(HERE.glob("*.h")))]
    key = hashlib.sha256(repr((texts, compiler, flags, gomp, _cpu(), sys.platform)).encode()).hexdigest()[:16]
    try:
        path = get_base_dir() / "kernels" / f"{Path(name).stem}_{key}.so"
        if not path.exists():
            print(f"compiling {name}, once ...", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
                built = Path(tmp) / "built.so"
                command = [compiler, *flags, str(HERE / name), "-o", str(built), *gomp]
                subprocess.run(command, check=True, capture_output=True, timeout=300)
                os.replace(built, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    """What -march=native depends on: a base directory may be shared by different machines."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith("flags")), "")
    except OSError:
        return platform.processor()


_CONVERT = {int: ctypes.c_long, float: ctypes.c_double, type(None): ctypes.c_void_p}


def run(lib: ctypes.CDLL, name: str, dtype: torch.dtype, *args) -> None:
    """Call a kernel: tensors go as pointers, integers as long, floats as double, None as a null pointer."""
    lib.set_threads(torch.get_num_threads())
    getattr(lib, name + SUFFIX[dtype])(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else _CONVERT[type(a)](a) for a in args)
    )
