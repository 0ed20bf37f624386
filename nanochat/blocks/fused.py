"""A Mamba-2 mixer between its two projections, for training and prefill on CPUs: torch.bmm plus fused.cpp.

What it computes is what `ssd.py` computes, and the letters are the glossary's; read that first. Eager PyTorch spends
80 % of a mixer's time in element-wise passes over (b, T, d_inner), and its bf16 element-wise operations run at 0.4 ns
an element even from cache. So the passes between two matrix products are fused in 400 lines of C++, compiled once
(5 seconds, kept in the base directory) and loaded with ctypes. Without a compiler, on other devices, with several
groups or with `NANOCHAT_FUSED=0`, everything runs through `ssd.py` instead.

The backward is written by hand. In bf16 its gradients are as accurate as autograd's because every decay gradient
sums the same products in fp32: the rows and columns of E = dM * M then cancel exactly, which they don't if one of the
two sums is taken from y . dy instead.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.blocks import kernels
from nanochat.blocks.kernels import SUFFIX
from nanochat.blocks.ssd import TINY

# the added two let min and max compile to one instruction
FLAGS = (*kernels.FLAGS, "-fno-signed-zeros", "-ffinite-math-only")
BLOCK = 512 * 768  # elements of x handled at a time: with a few temporaries, about what an L2 cache holds in bf16


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be had."""
    return kernels.load("fused.cpp", FLAGS)


def _run(name: str, dtype: torch.dtype, *args) -> None:
    kernels.run(library(), name, dtype, *args)


def available(u: Tensor, ngroups: int, d_conv: int) -> bool:
    """Whether `mixer` can stand in for ssd.py's path on this input."""
    return (
        u.device.type == "cpu"
        and u.dtype in SUFFIX
        and ngroups == 1
        and d_conv == 4
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    P: int,
    N: int,
    Q: int,
    past: Tensor | None = None,
    S: Tensor | None = None,
):
    """in_proj's output (b, T, 2 E + 2 N + H) -> out_proj's input (b, T, E), and with a state also the new S.

    past (b, 3, conv_dim) and S (b, H, P, N) fp32 are the state before the sequence; gradients don't reach them.
    """
    out, S = _Mixer.apply(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, (eps, P, N, Q), past, S)
    return out, S


class _Mixer(torch.autograd.Function):
    """Convolution over everything, then blocks of chunks: their temporaries stay small enough for the cache and
    for malloc to reuse, where whole-batch ones (6 MB at 8 x 512 x 768 in bf16) would be page-faulted at every use."""

    @staticmethod
    def forward(ctx, zx, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, sizes, past, S):
        eps, P, N, Q = sizes
        zx = zx.contiguous()
        b, T, ld = zx.shape
        H, kind = A_log.numel(), zx.dtype
        E, Q = H * P, min(Q, T)
        C, c = E + 2 * N, -(-T // Q)
        Tp = c * Q
        w4 = conv_weight.float().view(C, 4).t().contiguous()
        bias, nw, skip = conv_bias.float(), norm_weight.float(), D.float()
        past = past.to(kind).contiguous() if past is not None else None
        xbc = zx.new_empty(b, Tp, C)
        _run("conv_fwd", kind, zx.view(-1)[E:], ld, w4, bias, past, xbc, b, T, Tp, C)
        # Per-token scalars, fp32: small, so plain torch.
        raw = zx[..., E + C :].float() + dt_bias.float()
        dt, A = F.softplus(raw), -A_log.float().exp()
        dt = F.pad(dt, (0, 0, 0, Tp - T)).view(b, c, Q, H).transpose(2, 3).contiguous()  # (b, c, H, Q)
        cs = (dt * A.view(H, 1)).cumsum(-1)
        w, from_start, to_end, decay = _decays(dt, cs)
        # What the backward needs; the loop below fills it in place.
        M, CB = zx.new_empty(b, c, H, Q, Q), zx.new_empty(b, c, Q, Q)
        S_in, y_in = zx.new_empty(b, c, N, E), zx.new_empty(b, c, Q, E)
        y, out, rstd = zx.new_empty(b, T, E), zx.new_empty(b, T, E), torch.empty(b, T)
        S = torch.zeros(b, H, P, N) if S is None else S.float()
        S = S.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)  # (b, N, H, P), overwritten below
        x_all, B_all, C_all = xbc.view(b, c, Q, C).split([E, N, N], -1)
        for i, k in _blocks(b, c, Q * E):
            n, t = k.stop - k.start, k.start * Q
            x, B, Cm = x_all[i, k], B_all[i, k], C_all[i, k]
            # Inside the chunks, and what each adds to the state.
            torch.bmm(Cm, B.transpose(1, 2), out=CB[i, k])
            xp, xd = zx.new_empty(n * H, Q, P), zx.new_empty(n, Q, E)
            _run("chunk_fwd", kind, x, C, CB[i, k], cs[i, k], w[i, k], to_end[i, k], M[i, k], xp, xd, n, H, Q, P)
            yd = torch.bmm(M[i, k].view(n * H, Q, Q), xp)
            added = torch.bmm(B.transpose(1, 2), xd)
            # Carry the state, add what earlier chunks left behind, gate and normalise.
            _run("carry_fwd", kind, added, decay[i, k], S[i], S_in[i, k], 1, n, H, N, P)
            torch.bmm(Cm, S_in[i, k], out=y_in[i, k])
            _run(
                "out_fwd",
                kind,
                yd,
                y_in[i, k],
                from_start[i, k],
                x,
                C,
                skip,
                zx[i, t:],
                ld,
                nw,
                eps,
                y[i, t:],
                rstd[i, t:],
                out[i, t:],
                1,
                n,
                T - t,
                H,
                Q,
                P,
            )
        S = S.permute(0, 2, 3, 1).contiguous()
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        ctx.had_past = past is not None
        ctx.save_for_backward(zx, xbc, raw, dt, A, cs, CB, M, S_in, y_in, y, rstd, w4, bias, nw, skip)
        ctx.sizes = (b, T, c, H, P, N, Q)
        ctx.dtypes = tuple(t.dtype for t in (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight))
        return out, S

    @staticmethod
    def backward(ctx, dout, _):
        if ctx.had_past:
            raise RuntimeError("the fused mixer has no gradient through a state; set NANOCHAT_FUSED=0")
        zx, xbc, raw, dt, A, cs, CB, M, S_in, y_in, y, rstd, w4, bias, nw, skip = ctx.saved_tensors
        b, T, c, H, P, N, Q = ctx.sizes
        kind, E, ld, Tp, dout = zx.dtype, H * P, zx.size(-1), c * Q, dout.contiguous()
        C = E + 2 * N
        w, from_start, to_end, decay = _decays(dt, cs)
        # Sums over P or Q, per token: fp32 (b, c, H, Q), filled by the kernels.
        d_from, dD, rows, cols, d_to = torch.empty(5, b, c, H, Q).unbind(0)
        d_decay, dnw, dS = torch.empty(b, c, N, H), torch.empty(b, c, E), torch.zeros(b, N, E)
        dzx, dxbc = torch.empty_like(zx), torch.empty_like(xbc)
        x_all, B_all, C_all = xbc.view(b, c, Q, C).split([E, N, N], -1)
        dx_all, dB_all, dC_all = dxbc.view(b, c, Q, C).split([E, N, N], -1)
        for i, k in reversed(_blocks(b, c, Q * E)):
            n, t = k.stop - k.start, k.start * Q
            x, B, Cm = x_all[i, k], B_all[i, k], C_all[i, k]
            # Gate, norm and skip.
            dyp, z1 = zx.new_empty(n * H, Q, P), zx.new_empty(n, Q, E)
            _run(
                "out_bwd",
                kind,
                dout[i, t:],
                y[i, t:],
                zx[i, t:],
                ld,
                nw,
                rstd[i, t:],
                x,
                C,
                y_in[i, k],
                from_start[i, k],
                dzx[i, t:],
                dyp,
                z1,
                d_from[i, k],
                dD[i, k],
                dnw[i, k],
                1,
                n,
                T - t,
                H,
                Q,
                P,
            )
            # Inside the chunks.
            xp, xd, dCB = zx.new_empty(n * H, Q, P), zx.new_empty(n, Q, E), zx.new_empty(n, Q, Q)
            _run("chunk_fwd", kind, x, C, CB[i, k], cs[i, k], w[i, k], to_end[i, k], None, xp, xd, n, H, Q, P)
            dM = torch.bmm(dyp, xp.transpose(1, 2))
            dxp = torch.bmm(M[i, k].view(n * H, Q, Q).transpose(1, 2), dyp)
            _run("mask_bwd", kind, dM, CB[i, k], cs[i, k], w[i, k], dCB, rows[i, k], cols[i, k], n, H, Q)
            # The state between them.
            dS_in = torch.bmm(Cm.transpose(1, 2), z1)
            dadded = torch.empty_like(dS_in)
            _run("carry_bwd", kind, dS_in, S_in[i, k], decay[i, k], dS[i], dadded, d_decay[i, k], 1, n, H, N, P)
            dxd = torch.bmm(B, dadded)
            _run("x_bwd", kind, dxp, dxd, to_end[i, k], dyp, skip, x, C, dx_all[i, k], d_to[i, k], n, H, Q, P)
            torch.add(torch.bmm(xd, dadded.transpose(1, 2)), torch.bmm(dCB.transpose(1, 2), Cm), out=dB_all[i, k])
            torch.add(torch.bmm(z1, S_in[i, k].transpose(1, 2)), torch.bmm(dCB, B), out=dC_all[i, k])
        # Per-token scalars: into dt and A.
        d_to *= to_end
        dcs = rows - cols + d_from * from_start - d_to
        dcs[..., -1] += d_to.sum(-1) + d_decay.sum(2) * decay
        da = dcs.flip(-1).cumsum(-1).flip(-1)
        ddt = da * A.view(H, 1) + torch.where(dt > TINY, (cols + d_to) / dt, 0.0)
        dA_log = (da * dt).sum((0, 1, 3)) * A
        draw = ddt.transpose(2, 3).reshape(b, Tp, H)[:, :T] * raw.sigmoid()
        dzx[..., E + C :] = draw
        # Convolution.
        dw, dbias = torch.empty(b, 4, C), torch.empty(b, C)
        _run("conv_bwd", kind, dxbc, zx.view(-1)[E:], ld, w4, bias, dzx.view(-1)[E:], dw, dbias, b, T, Tp, C)
        grads = (
            dw.sum(0).t().reshape(C, 1, 4),
            dbias.sum(0),
            draw.sum((0, 1)),
            dA_log,
            dD.sum((0, 1, 3)),
            dnw.sum((0, 1)),
        )
        return (dzx, *(g.to(d) for g, d in zip(grads, ctx.dtypes)), None, None, None)


def step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    P: int,
    N: int,
    past: Tensor,
    S: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixer` for one token, zxbcdt (b, 2 E + 2 N + H): returns out (b, E), past and S, the latter two overwritten.

    One call instead of some thirty operations, each of which costs more than its arithmetic at batch 1. No gradients.
    """
    zx, past, S = zxbcdt.contiguous(), past.to(zxbcdt.dtype).contiguous(), S.float().contiguous()
    (b, ld), H = zx.shape, A_log.numel()
    small = [t.detach().float().contiguous() for t in (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)]
    out = zx.new_empty(b, H * P)
    _run("step", zx.dtype, zx, ld, *small, eps, past, S, out, b, H, P, N)
    return out, past, S


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension: F.rms_norm without a weight (its eps is fp32's in any dtype), which is
    composed of eager passes on CPUs. Falls back to that wherever the kernels can't serve."""
    if x.device.type != "cpu" or x.dtype not in SUFFIX or torch.compiler.is_compiling() or library() is None:
        return F.rms_norm(x, (x.size(-1),))
    return _RMSNorm.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        out, rstd, E = torch.empty_like(x), torch.empty(x.shape[:-1]), x.size(-1)
        _run("rms_fwd", x.dtype, x, torch.finfo(torch.float32).eps, out, rstd, rstd.numel(), E)
        ctx.save_for_backward(x, rstd)
        return out

    @staticmethod
    def backward(ctx, g):
        x, rstd = ctx.saved_tensors
        g, dx = g.contiguous(), torch.empty_like(x)
        _run("rms_bwd", x.dtype, g, x, rstd, dx, rstd.numel(), x.size(-1))
        return dx


def _decays(dt: Tensor, cs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w = log dt - cs (the mask's column exponent), exp(cs), dt exp(cs_Q - cs), and exp(cs_Q) (b, c, H)."""
    w = dt.clamp_min(TINY).log() - cs
    return w, cs.exp(), (cs[..., -1:] + w).exp(), cs[..., -1].exp()


def _blocks(b: int, c: int, chunk: int) -> list[tuple[int, slice]]:
    """(row, slice of chunks) pairs of about BLOCK elements; a row's come in order, as its state is carried."""
    step = max(1, BLOCK // chunk)
    return [(i, slice(k, min(k + step, c))) for i in range(b) for k in range(0, c, step)]
