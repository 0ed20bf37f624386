"""The 'M' block: a Mamba-2 mixer whose state dict exchanges with mamba_ssm and with Hugging Face.

Paper: Mamba-2, Dao & Gu 2024, arXiv 2405.21060, section 7 (figure 6). Parameter names, shapes and maths are those of
mamba_ssm.modules.mamba2.Mamba2. On CUDA with mamba_ssm and causal_conv1d installed their kernels do the work;
on CPUs `fused.py` does; everywhere else, and wherever those can't serve, `ssd.py` does. All give the same numbers.

    [z | xBC | dt] = in_proj(u)                    widths d_inner, d_inner + 2 G N, H
    [x | B | C]    = silu(causal_conv(xBC))
    y              = ssd_scan(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    out            = out_proj(rms_norm(y * silu(z)) * norm.weight)

Letters are those of the glossary in `ssd.py`. A sequence may be cut anywhere: with a `MambaState` the pieces give
what the whole gives.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.blocks import fused
from nanochat.blocks.ssd import causal_conv, ssd_scan, ssd_step
from nanochat.common import Linear

KERNEL_DEVICES = ("cuda",)
KERNEL_CHUNK = 256  # the chunk length the Triton kernels are tuned for; any length gives the same result


@dataclass
class MambaState:
    """What a Mamba-2 layer remembers of the tokens it has seen; of constant size.

    conv: the last d_conv - 1 inputs of the convolution (b, conv_dim, d_conv - 1), activation dtype, channels adjacent
          in memory (the layout causal_conv1d wants); ssm: S (b, H, P, N) fp32.
    """

    conv: Tensor
    ssm: Tensor

    def clone(self) -> "MambaState":
        return MambaState(self.conv.clone(), self.ssm.clone())


class GatedRMSNorm(nn.Module):
    """rms_norm(y * silu(z)) * weight, normalised within each of the G groups (mamba_ssm's norm_before_gate=False)."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        g = (y.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))  # fp32, as mamba_ssm and HF do
        return (F.rms_norm(g, (g.size(-1),), eps=self.eps).flatten(-2) * self.weight.float()).to(y.dtype)


class Mamba2(nn.Module):
    """The mixer: (b, T, d_model) -> (b, T, d_model)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.d_inner = expand * d_model
        if self.d_inner % headdim or (self.d_inner // headdim) % ngroups:
            raise ValueError(
                f"expand * d_model = {self.d_inner} must be a multiple of headdim ({headdim}), "
                f"and the number of heads a multiple of ngroups ({ngroups})"
            )
        self.d_model, self.d_state, self.d_conv, self.headdim = d_model, d_state, d_conv, headdim
        self.ngroups, self.chunk_size = ngroups, chunk_size
        self.nheads = self.d_inner // headdim
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + self.nheads)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner, ngroups, norm_eps)
        self.out_proj = Linear(self.d_inner, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, A_range: tuple[float, float] = (1.0, 16.0)):
        """A ~ U(1, 16); dt log-uniform in [dt_min, dt_max], stored through softplus's inverse; else as mamba_ssm."""
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*A_range).log())
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)
        self.conv1d.reset_parameters()
        nn.init.kaiming_uniform_(self.in_proj.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))

    def allocate_state(self, batch: int, device=None, dtype=None) -> MambaState:
        """The state before the first token: zeros, conv in the activation dtype, ssm in fp32."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch, self.d_conv - 1, self.conv_dim, device=device, dtype=dtype).transpose(1, 2)
        ssm = torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device, dtype=torch.float32)
        return MambaState(conv, ssm)

    def forward(self, u: Tensor, state: MambaState | None = None) -> Tensor:
        """u (b, T, d_model). With a state, continues from it and leaves it after the last token of u."""
        if state is not None and u.size(1) == 1:
            return self.step(u, state)
        zxbcdt = self.in_proj(u)
        with_grad_to_state = state is not None and torch.is_grad_enabled()
        if fused.available(u, self.ngroups, self.d_conv) and not with_grad_to_state:
            return self.out_proj(self._fused(zxbcdt, state))
        z, xBC, dt = zxbcdt.split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        scan = self._scan_kernels if self._kernels_for(u) else self._scan_torch
        return self.out_proj(self.norm(scan(xBC, dt, state).reshape(z.shape), z))

    def step(self, u: Tensor, state: MambaState) -> Tensor:
        """One token, u (b, 1, d_model), in as few operations as possible: at batch 1 dispatch is the whole cost."""
        zxbcdt = self.in_proj(u.squeeze(1))
        if not torch.is_grad_enabled() and fused.available(u, self.ngroups, self.d_conv):
            y, past, state.ssm = fused.step(
                zxbcdt,
                self.conv1d.weight,
                self.conv1d.bias,
                self.dt_bias,
                self.A_log,
                self.D,
                self.norm.weight,
                self.norm.eps,
                self.headdim,
                self.d_state,
                state.conv.transpose(1, 2),
                state.ssm,
            )
            state.conv = past.transpose(1, 2)
            return self.out_proj(y).unsqueeze(1)
        z, xBC, dt = zxbcdt.split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        step = self._step_kernels if self._kernels_for(u) else self._step_torch
        return self.out_proj(self.norm(step(xBC, dt, state).view(z.shape), z)).unsqueeze(1)

    # Pure PyTorch: any device, differentiable through the state.

    def _scan_torch(self, xBC: Tensor, dt: Tensor, state: MambaState | None) -> Tensor:
        past = None if state is None else state.conv.transpose(1, 2)
        if state is not None:
            self._remember(xBC, state)
        x, B, C = self._heads(causal_conv(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, past))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        A = -self.A_log.float().exp()
        if state is None:
            return ssd_scan(x, dt, A, B, C, self.D, self.chunk_size)
        y, state.ssm = ssd_scan(x, dt, A, B, C, self.D, self.chunk_size, state.ssm, return_final_state=True)
        return y

    def _step_torch(self, xBC: Tensor, dt: Tensor, state: MambaState) -> Tensor:
        window = torch.cat([state.conv.transpose(1, 2), xBC.unsqueeze(1)], 1)  # (b, d_conv, conv_dim)
        state.conv = window[:, 1:].transpose(1, 2)
        weight = self.conv1d.weight.view(self.conv_dim, self.d_conv).t().to(xBC.dtype)
        x, B, C = self._heads(F.silu((window * weight).sum(1) + self.conv1d.bias.to(xBC.dtype)))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        y, state.ssm = ssd_step(x, dt, -self.A_log.float().exp(), B, C, self.D, state.ssm)
        return y

    # CPU: fused.py, everything between the projections.

    def _fused(self, zxbcdt: Tensor, state: MambaState | None) -> Tensor:
        past = S = None
        if state is not None:
            past, S = state.conv.transpose(1, 2), state.ssm
            self._remember(zxbcdt[..., self.d_inner : self.d_inner + self.conv_dim], state)
        y, S = fused.mixer(
            zxbcdt,
            self.conv1d.weight,
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            self.norm.eps,
            self.headdim,
            self.d_state,
            self.chunk_size,
            past,
            S,
        )
        if state is not None:
            state.ssm = S
        return y

    # CUDA: the kernels of mamba_ssm and causal_conv1d.

    def _kernels_for(self, u: Tensor) -> bool:
        # causal_conv1d's channels-last kernel, the only one that takes an initial state, wants channels in eights.
        return u.device.type in KERNEL_DEVICES and self.conv_dim % 8 == 0 and _kernels() is not None

    def _scan_kernels(self, xBC: Tensor, dt: Tensor, state: MambaState | None) -> Tensor:
        kernels = _kernels()
        if xBC.stride(1) % 8 or xBC.stride(0) % 8:  # rows of in_proj's output start at multiples of 8 only if it is
            xBC = xBC.contiguous()  # that wide: n_heads % 8 == 0 saves this copy
        past, S = None, None
        if state is not None:
            past, S = state.conv.transpose(1, 2).contiguous().transpose(1, 2).to(xBC.dtype), state.ssm
            self._remember(xBC, state)
        xBC = kernels.causal_conv1d_fn(
            xBC.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, initial_states=past, activation="silu"
        ).transpose(1, 2)
        x, B, C = self._heads(xBC)
        y = kernels.mamba_chunk_scan_combined(
            x,
            dt,
            -self.A_log.float().exp(),
            B,
            C,
            chunk_size=KERNEL_CHUNK,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=S,
            return_final_states=state is not None,
        )
        if state is not None:
            y, state.ssm = y[0], y[1].float()
        return y

    def _step_kernels(self, xBC: Tensor, dt: Tensor, state: MambaState) -> Tensor:
        kernels = _kernels()
        xBC = kernels.causal_conv1d_update(
            xBC.contiguous(), state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )  # shifts state.conv in place
        x, B, C = self._heads(xBC)
        H, P, N = self.nheads, self.headdim, self.d_state
        # Scalars per head go in as stride-0 views: the kernel then reads one number instead of P (or P N) of them.
        return kernels.selective_state_update(
            state.ssm,
            x,
            dt.unsqueeze(-1).expand(-1, H, P),
            (-self.A_log.float().exp()).view(H, 1, 1).expand(H, P, N),
            B,
            C,
            D=self.D.view(H, 1).expand(H, P),
            dt_bias=self.dt_bias.view(H, 1).expand(H, P),
            dt_softplus=True,
        )

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, [T,] conv_dim) -> x (b, [T,] H, P), B and C (b, [T,] G, N)."""
        GN = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_inner, GN, GN], dim=-1)
        return tuple(t.unflatten(-1, (n, -1)) for t, n in ((x, self.nheads), (B, self.ngroups), (C, self.ngroups)))

    def _remember(self, xBC: Tensor, state: MambaState):
        """Keep the last d_conv - 1 inputs of the convolution, also when fewer than that are new."""
        keep = self.d_conv - 1
        if xBC.size(1) < keep:
            xBC = torch.cat([state.conv.transpose(1, 2), xBC], 1)
        state.conv = xBC[:, -keep:].contiguous().transpose(1, 2)


class MambaBlock(nn.Module):
    """Pre-norm, mixer, residual: x + mixer(rms_norm(x)); the norm has no parameters, as in the attention block."""

    def __init__(self, d_model: int, **mixer):
        super().__init__()
        self.mixer = Mamba2(d_model, **mixer)

    def forward(self, x: Tensor, state: MambaState | None = None) -> Tensor:
        return x + self.mixer(fused.rms_norm(x), state)


@cache
def _kernels() -> SimpleNamespace | None:
    """The CUDA kernels, by submodule: `import mamba_ssm` alone would pull in the compiled Mamba-1."""
    try:
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return SimpleNamespace(
        causal_conv1d_fn=causal_conv1d_fn,
        causal_conv1d_update=causal_conv1d_update,
        selective_state_update=selective_state_update,
        mamba_chunk_scan_combined=mamba_chunk_scan_combined,
    )
