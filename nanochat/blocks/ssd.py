"""State space duality (SSD): the Mamba-2 recurrence as matrix multiplications, in pure PyTorch.

Paper: Mamba-2, Dao & Gu 2024, arXiv 2405.21060, section 6 ("block decomposition"). The GPU implementation is
mamba_ssm.ops.triton.ssd_combined; this file gives the same numbers on any device;
`fused.py` is the same algorithm with its element-wise parts in C++, for CPUs.

Glossary (code name: meaning, shape)
    b        batch
    T        sequence length, cut into c chunks of Q tokens
    H, P     heads and channels per head (d_inner = H * P)
    G, N     groups that share B and C, and the state size per channel (R = H / G heads per group)
    x        the SSM's input                        (b, T, H, P)
    dt       Delta, the positive step size          (b, T, H)     after softplus, fp32
    A        negative scalar per head               (H,)          fp32
    B, C     input and output projections           (b, T, G, N)
    D        skip connection                        (H,)
    S        state                                  (b, H, P, N)  fp32

Recurrence, per head (eq. 1 of the paper with the zero-order hold of Mamba: A -> exp(dt A), B -> dt B):
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t

Unrolled over a chunk with cs_i = sum_{k<=i} dt_k A (never positive, so every exponent below is <= log dt):
    y_i  = sum_{j<=i} (C_i . B_j) exp(cs_i - cs_j) dt_j x_j      inside the chunk: "M @ x", M lower triangular
         + exp(cs_i) C_i S_in                                    what earlier chunks left behind
    S_out = exp(cs_Q) S_in + sum_j exp(cs_Q - cs_j) dt_j B_j x_j^T
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-30  # log(dt) of a padded or underflown step: finite, so that no gradient is NaN


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
):
    """Run the recurrence over a whole sequence; shapes as in the glossary, dt already through softplus.

    x, B, C may be fp32 or bf16 (matrix products run in that dtype); dt, A, decays and states are fp32.
    Returns y (b, T, H, P) in x's dtype, and with return_final_state also S after the last token (b, H, P, N) fp32.
    """
    b, T, H, P = x.shape
    G, N = B.shape[2:]
    R, Q = H // G, min(chunk_size, T)
    if T % Q:  # a padded step has dt = 0: it neither decays the state nor adds to it
        pad = Q - T % Q
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    c = x.size(1) // Q
    dtype = x.dtype
    # Decays, fp32. dt rides in the exponent, which saves a pass over x.
    dt = dt.float().view(b, c, Q, H).permute(0, 1, 3, 2)  # (b, c, H, Q)
    cs = (dt * A.float().view(H, 1)).cumsum(-1)
    log_dt = dt.clamp_min(TINY).log()
    # Inside each chunk. Masking with -inf before exp keeps the gradient finite where cs_i - cs_j > 0 would overflow.
    mask = torch.full((Q, Q), float("-inf"), device=x.device).triu(1)
    L = ((cs.unsqueeze(-1) - (cs - log_dt).unsqueeze(-2)) + mask).exp()  # (b, c, H, Q, Q)
    Bc = B.reshape(b, c, Q, G, N).transpose(2, 3)  # (b, c, G, Q, N)
    Cc = C.reshape(b, c, Q, G, N).transpose(2, 3)
    CB = Cc @ Bc.transpose(-1, -2)  # (b, c, G, Q, Q), shared by the R heads of a group
    M = (L.view(b, c, G, R, Q, Q) * CB.unsqueeze(3)).to(dtype)  # fp32 until here, or dt's gradient is 6 % off in bf16
    xc = x.reshape(b, c, Q, H, P)
    y = M.view(b, c, H, Q, Q) @ xc.transpose(2, 3)  # (b, c, H, Q, P)
    # What each chunk adds to the state: one GEMM per group for all its heads, (N, Q) @ (Q, R P).
    to_end = (cs[..., -1:] - cs + log_dt).exp().transpose(2, 3).unsqueeze(-1)  # (b, c, Q, H, 1)
    xd = (xc * to_end).to(dtype).view(b, c, Q, G, R * P).transpose(2, 3)
    added = (Bc.transpose(-1, -2) @ xd).float()  # (b, c, G, N, R P)
    # Carry the state over the chunks, fp32.
    decay = cs[..., -1].exp().view(b, c, G, 1, R, 1).expand(b, c, G, 1, R, P).reshape(b, c, G, 1, R * P)
    if initial_state is None:
        S = x.new_zeros(b, G, N, R * P, dtype=torch.float32)
    else:
        S = initial_state.float().view(b, G, R * P, N).transpose(-1, -2)
    entering = []
    for i in range(c):
        entering.append(S)
        S = torch.addcmul(added[:, i], S, decay[:, i])
    S_in = torch.stack(entering, 1).to(dtype)  # (b, c, G, N, R P)
    y_in = (Cc @ S_in).transpose(2, 3).reshape(b, c, Q, H, P)
    y = y.transpose(2, 3) + y_in * cs.exp().transpose(2, 3).unsqueeze(-1)
    if D is not None:
        y = y + xc * D.float().view(H, 1)
    y = y.to(dtype).reshape(b, c * Q, H, P)[:, :T]
    if return_final_state:
        return y, S.transpose(-1, -2).reshape(b, H, P, N)
    return y


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, S: Tensor):
    """One token: x (b, H, P), dt (b, H) after softplus, B and C (b, G, N), S (b, H, P, N) fp32.

    Returns y (b, H, P) in x's dtype and the new state. S is overwritten unless gradients are being recorded.
    """
    b, H, P = x.shape
    G, N = B.shape[1:]
    decay = (dt * A).exp().view(b, H, 1, 1)
    xdt = (x * dt.unsqueeze(-1)).view(b, G, -1, 1)  # fp32, (b, G, R P, 1)
    S = S * decay if torch.is_grad_enabled() else S.mul_(decay)
    S = torch.baddbmm(S.view(b * G, -1, N), xdt.view(b * G, -1, 1), B.float().reshape(b * G, 1, N))
    y = torch.bmm(S, C.float().reshape(b * G, N, 1)).view(b, H, P)
    if D is not None:
        y = torch.addcmul(y, x.float(), D.float().view(H, 1))
    return y.to(x.dtype), S.view(b, H, P, N)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution followed by SiLU: x (b, T, C), weight (C, W), past (b, W-1, C) -> (b, T, C).

    out_t = silu(bias + sum_k weight[:, k] x_{t-W+1+k}); tokens before the sequence are `past`, or zero.
    """
    W, T = weight.size(1), x.size(1)
    if past is None:
        x = F.pad(x, (0, 0, W - 1, 0))
    else:
        x = torch.cat([past.to(x.dtype), x], 1)
    weight = weight.to(x.dtype)
    out = x[:, :T] * weight[:, 0]
    for k in range(1, W):
        out = torch.addcmul(out, x[:, k : k + T], weight[:, k])
    if bias is not None:
        out = out + bias.to(x.dtype)
    return F.silu(out)
