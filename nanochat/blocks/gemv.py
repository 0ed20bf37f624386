"""Decoding on a CPU: the layers of one token in a little C++ (gemv.cpp).

A decoded token reads every weight once and multiplies it once, so bytes and the number of operations are the cost.
PyTorch ignores both: its product of a matrix and one row takes as long in bf16 as in fp32, though it reads half the
bytes, its RMS norm is nine operations, its attention with RoPE and QK norm some forty.

`speed_up(model)` lets a model's linear layers decode here; `rms_norm` and `attend` are asked by blocks/transformer.py.
All apply to few rows, without gradients, on a CPU, with weights in the activation's dtype. Everything else, and every
machine without a C++ compiler, goes through PyTorch and gets the same numbers.
"""

import ctypes
from functools import cache

import torch
import torch.nn as nn

from nanochat.blocks import kernels
from nanochat.common import Linear

MAX_ROWS = 4  # of a token each: beyond, PyTorch is no slower (attention, 8 rows, context 450: 1.5 ms here, 1.2 there)
EPS = torch.finfo(torch.float32).eps  # what F.rms_norm takes when not told, in fp32 and in bf16
P, L, F, I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "linear": [P] * 3 + [L] * 2 + [I],
    "rms_norm": [P] * 2 + [L] * 2 + [F],
    "attend": [P] * 3 + [L] + [P] * 3 + [L, P] + [L] * 5 + [F, I],
}


@cache
def library() -> dict[tuple[str, torch.dtype], ctypes._CFuncPtr] | None:
    """The compiled functions by name and dtype, or None where they can't be had."""
    lib = kernels.load("gemv.cpp")
    if lib is None:
        return None
    functions = {}
    for name, types in SIGNATURES.items():
        for dtype, suffix in kernels.SUFFIX.items():
            f = getattr(lib, name + suffix)
            f.argtypes, f.restype = types, None
            functions[name, dtype] = f
    return functions


def usable(x: torch.Tensor) -> bool:
    """Whether x (rows, ..., width), a token a row, may be handled here."""
    return (
        not torch.is_grad_enabled()
        and x.size(0) <= MAX_ROWS
        and x.device.type == "cpu"
        and (x.dtype is torch.bfloat16 or x.dtype is torch.float32)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """F.rms_norm over the last dimension of a usable x."""
    x = x.contiguous()
    k, y = x.size(-1), torch.empty_like(x)
    library()["rms_norm", x.dtype](x.data_ptr(), y.data_ptr(), x.numel() // k, k, EPS)
    return y


def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | int,
    n_head: int,
) -> torch.Tensor:
    """One token of rotated, normed, causal attention: qkv (B, 1, (H + 2K) D) usable -> (B, 1, H D).

    Writes the token's key and value into k and v (B, K, capacity, D) at each row's length; there must be room.
    """
    B, K, capacity, D = k.shape
    ragged = isinstance(lengths, torch.Tensor)
    y = qkv.new_empty(B, 1, n_head * D)
    library()["attend", qkv.dtype](
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), D // 2 if ragged else 0, k.data_ptr(), v.data_ptr(),
        lengths.data_ptr() if ragged else None, 0 if ragged else lengths, y.data_ptr(), B, n_head, K, D, capacity, EPS,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class DecodeLinear(Linear):
    """A Linear that takes a single row here; made from a Linear by `speed_up`, its weights untouched.

    Two rows are as fast in PyTorch, more are faster (8 rows of bf16, 1536 x 384: 290 µs there, 610 here).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        n, k = w.shape
        if x.dtype is not w.dtype or x.numel() != k or not usable(x):
            return super().forward(x)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
        library()["linear", x.dtype](w.data_ptr(), x.data_ptr(), y.data_ptr(), n, k, torch.get_num_threads())
        return y


def speed_up(model: nn.Module) -> None:
    """Let the model's linear layers decode here, if this machine can."""
    for module in model.modules():
        fits = type(module) is Linear and module.bias is None and module.weight.dtype in (torch.float32, torch.bfloat16)
        if fits and module.weight.device.type == "cpu" and module.weight.is_contiguous() and library():
            module.__class__ = DecodeLinear
