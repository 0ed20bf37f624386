"""Training a transformer block on a CPU: causal attention, the ReLU² MLP and the loss, forward and backward.

Eager PyTorch spends two thirds of such a step outside matrix products: its bf16 attention backward runs at a tenth of
what the matrix units give, RoPE and QK norm are a dozen passes, ReLU² four. Here torch does the products and a little
C++ (attention.cpp) everything between two of them in one pass. Where that can't run (no compiler, `NANOCHAT_FUSED=0`,
another device or dtype, grouped queries, `torch.compile`), blocks/transformer.py does the same in PyTorch.

Attention goes by blocks of queries: their scores against the keys up to theirs stay in the cache, blocks above the
diagonal are never computed. The backward computes the probabilities again from the scores (FlashAttention, 2205.14135);
kept are q, k, v and a number a query. In bf16 with heads of 64, on CPUs with AMX, the products are in the C++, too:
library products of that shape take twice as long (8 x 6 x 512: 69 ms of products alone, against 40 for everything).

Symbols: B rows, T tokens, H heads, D head size, R queries of a block, L keys it sees, C = H D.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from nanochat.blocks import kernels
from nanochat.blocks.kernels import SUFFIX

EPS = torch.finfo(torch.float32).eps  # of the QK norm, as in fused.rms_norm
MAX_HEAD = 256  # MAXD in attention.cpp
CACHE = 1 << 19  # scores of a block of the library products, in elements: 1 MB in bf16, half of an L2


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be had."""
    return kernels.load("attention.cpp")


def _run(name: str, dtype: torch.dtype, *args) -> None:
    kernels.run(library(), name, dtype, *args)


def usable(x: Tensor) -> bool:
    """Whether x may be handled here."""
    return x.device.type == "cpu" and x.dtype in SUFFIX and not torch.compiler.is_compiling() and library() is not None


def attends(qkv: Tensor, n_head: int, n_kv_head: int) -> bool:
    """Whether `attend` can do it."""
    return n_head == n_kv_head and qkv.size(-1) <= 3 * n_head * MAX_HEAD and usable(qkv)


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int) -> Tensor:
    """qkv (B, T, 3 C), usable, angles (T, D/2) -> (B, T, C): RoPE, QK norm, causal softmax attention."""
    return _Attention.apply(qkv, cos, sin, n_head)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, H):
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        D, kind = C // H, qkv.dtype
        own = kind is torch.bfloat16 and D == 64 and _amx()
        Tp = -(-T // 64) * 64 if own else T  # whole tiles
        q, k, v = (qkv.new_empty(B, H, Tp, D) for _ in range(3))
        for x in (q, k, v):
            x[:, :, T:].zero_()
        rstd, lse, out = torch.empty(B, T, 2 * H), torch.empty(B, H, Tp), qkv.new_empty(B, T, H, D)
        _run("split_fwd", kind, qkv, cos, sin, EPS, D**-0.5, q, k, v, rstd, B, T, Tp, H, D)
        if own:
            _run("amx_fwd", kind, q, k, v, out, lse, B, H, T, Tp)
        else:
            _forward(q, k, v, lse, out)
        ctx.save_for_backward(q, k, v, rstd, lse, cos, sin)
        ctx.own = own
        return out.view(B, T, C)

    @staticmethod
    def backward(ctx, g):
        q, k, v, rstd, lse, cos, sin = ctx.saved_tensors
        (B, H, Tp, D), T, kind = q.shape, rstd.size(1), q.dtype
        dq, dk, dv = (torch.empty_like(q) for _ in range(3))
        if ctx.own:
            _run("amx_bwd", kind, g.contiguous(), q, k, v, lse, dq, dk, dv, B, H, T, Tp)
        else:
            _backward(g.view(B, T, H, D).transpose(1, 2).contiguous(), q, k, v, lse, dq, dk, dv)
        dqkv = q.new_empty(B, T, 3 * H * D)
        _run("split_bwd", kind, dq, dk, dv, q, k, rstd, cos, sin, D**-0.5, dqkv, B, T, Tp, H, D)
        return dqkv, None, None, None


@cache
def _amx() -> bool:
    """Whether this machine has matrix units that attention.cpp can drive itself."""
    return bool(library().amx())


def _forward(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor) -> None:
    """q, k, v (B, H, T, D) -> lse (B, H, T), out (B, T, H, D)."""
    B, H, T, _ = q.shape
    for b in range(B):
        for t in _blocks(T, H):
            P = torch.bmm(q[b, :, t], k[b, :, : t.stop].mT)  # (H, R, L)
            _run("softmax_fwd", q.dtype, P, lse[b, :, t], H, t.stop - t.start, t.stop, t.start, T)
            torch.bmm(P, v[b, :, : t.stop], out=out[b, t].transpose(0, 1))


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Gradient g (B, H, T, D) of the output -> dq, dk, dv."""
    B, H, T, _ = q.shape
    for b in range(B):
        for t in reversed(_blocks(T, H)):
            L, keys = t.stop, slice(0, t.stop)
            P = torch.bmm(q[b, :, t], k[b, :, keys].mT)  # (H, R, L), as are the others
            dS = torch.bmm(g[b, :, t], v[b, :, keys].mT)
            _run("softmax_bwd", q.dtype, P, dS, lse[b, :, t], H, L - t.start, L, t.start, T)
            torch.bmm(dS, k[b, :, keys], out=dq[b, :, t])
            if L == T:  # the last block sees every key
                torch.bmm(dS.mT, q[b, :, t], out=dk[b])
                torch.bmm(P.mT, g[b, :, t], out=dv[b])
            else:
                dk[b, :, keys].baddbmm_(dS.mT, q[b, :, t])
                dv[b, :, keys].baddbmm_(P.mT, g[b, :, t])


def _blocks(T: int, H: int) -> list[slice]:
    """Blocks of queries, in order."""
    R = min(128, max(16, CACHE // (T * H) // 16 * 16))
    return [slice(t, min(t + R, T)) for t in range(0, T, R)]


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(x upᵀ)² downᵀ: x (..., C), usable, up (F, C), down (C, F) -> (..., C)."""
    return _MLP.apply(x, up, down)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, down):
        kind = x.dtype
        wu, wd, rows = up.to(kind), down.to(kind), x.reshape(-1, x.size(-1)).contiguous()
        h = rows @ wu.t()  # (N, F)
        y = torch.empty_like(h)
        _run("relu2_fwd", kind, h, y, h.numel())
        ctx.save_for_backward(rows, h, wu, wd)
        ctx.dtypes = up.dtype, down.dtype
        return (y @ wd.t()).view(x.shape)

    @staticmethod
    def backward(ctx, g):
        x, h, wu, wd = ctx.saved_tensors
        shape, g = g.shape, g.reshape(x.shape).contiguous()
        y, dh = torch.empty_like(h), g @ wd
        _run("relu2_bwd", h.dtype, h, dh, y, dh, h.numel())
        dup = (dh.t() @ x).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        ddown = (_transposed(g) @ y).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return (dh @ wu).view(shape), dup, ddown


def _transposed(x: Tensor) -> Tensor:
    """(N, M) -> (M, N). In bf16 it is copied: a product with a transposed left side takes twice as long as one without.

    4096 x 384 and 4096 x 1536, transposed, in 6.7 ms instead of 15.8. Worth it for the narrower side only.
    """
    if x.dtype != torch.bfloat16:
        return x.t()
    out = x.new_empty(x.size(1), x.size(0))
    _run("transpose", x.dtype, x, out, *x.shape)
    return out


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (N, V), usable and contiguous, targets (N,) -> losses (N,) fp32; the logits become their gradient."""
    losses = torch.empty(logits.size(0))
    _run("cross_entropy", logits.dtype, logits, targets.contiguous(), losses, *logits.shape)
    return losses
