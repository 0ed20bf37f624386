"""The 'T' block: pre-norm causal attention (RoPE, QK norm, grouped queries) and a ReLU² MLP.

Symbols: B batch, T tokens, H query heads, K key/value heads (H % K == 0), D head size, S tokens seen so far.
Norms are RMSNorm without weights, as in nanochat.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.blocks import attention, fused, gemv
from nanochat.common import Linear


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, no learned scale."""
    if x.numel() <= gemv.MAX_ROWS * x.size(-1) and gemv.usable(x):
        return gemv.rms_norm(x)
    return fused.rms_norm(x)


def rope_table(n: int, head_dim: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoFormer (2104.09864, eq. 34) for positions 0…n-1, each (n, head_dim/2) in fp32."""
    freq = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(n, device=device, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of x (B, H, T, D) by the angles of their positions; cos, sin broadcast to (B, H, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class KVState:
    """Keys and values of the tokens seen: (B, K, capacity, D), filled up to each row's length.

    `append` writes in place and grows by doubling, so decoding doesn't copy the past at every token.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.k, self.v = k, v

    def append(
        self, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, K, T, D) after each row's `lengths` tokens; return views of everything up to the longest row."""
        T = k.size(2)
        ragged = isinstance(lengths, torch.Tensor)
        end = (int(lengths.max()) if ragged else lengths) + T
        self.reserve(end)
        if ragged:
            rows = torch.arange(k.size(0), device=k.device)[:, None]
            cols = lengths[:, None] + torch.arange(T, device=k.device)
            self.k[rows, :, cols] = k.transpose(1, 2)
            self.v[rows, :, cols] = v.transpose(1, 2)
        else:
            self.k[:, :, lengths:end] = k
            self.v[:, :, lengths:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def fits(self, x: torch.Tensor) -> bool:
        """Whether a kernel may write x's dtype into the memory as it lies."""
        return self.k.dtype == self.v.dtype == x.dtype and self.k.is_contiguous() and self.v.is_contiguous()

    def reserve(self, end: int) -> None:
        """Have room for `end` tokens."""
        if end > self.k.size(2):
            grow = max(end, 2 * self.k.size(2), 128) - self.k.size(2)
            self.k, self.v = (F.pad(x, (0, 0, 0, grow)) for x in (self.k, self.v))


class Attention(nn.Module):
    """Causal self-attention over (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, n_embd // n_head
        self.qkv = Linear(n_embd, (n_head + 2 * n_kv_head) * self.head_dim)
        self.out = Linear(n_embd, n_embd)

    def forward(self, x: torch.Tensor, pos: "Positions", state: KVState | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x)
        if state is None and attention.attends(qkv, self.n_head, self.n_kv_head):
            return self.out(attention.attend(qkv, pos.cos, pos.sin, self.n_head))
        if T == 1 and state is not None and state.fits(x) and gemv.usable(x):
            state.reserve(pos.end)
            return self.out(gemv.attend(qkv, pos.cos, pos.sin, state.k, state.v, pos.start, self.n_head))
        qkv = qkv.view(B, T, -1, self.head_dim)
        qk, v = qkv.transpose(1, 2).split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)  # (B, heads, T, D)
        qk = norm(rotate(qk, pos.cos, pos.sin))  # both at once: half the operations, which is what decoding costs
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        if state is not None:
            k, v = state.append(k, v, pos.start)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=pos.mask, is_causal=pos.mask is None and T > 1, enable_gqa=self.n_head != self.n_kv_head
        )
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Positions:
    """Where this call's tokens stand: RoPE angles, and a mask when the causal one isn't simply a triangle.

    `start` is the number of tokens before this call: an int for all rows, or a (B,) tensor when rows differ.
    """

    def __init__(self, start: torch.Tensor | int, T: int, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype):
        self.start, self.end = start, T + (start if isinstance(start, int) else int(start.max()))
        self.mask = None
        if isinstance(start, int):
            self.cos, self.sin = (x[start : start + T].to(dtype) for x in (cos, sin))  # (T, D/2)
            if start and T > 1:  # T queries over start + T keys: SDPA's is_causal would align the wrong corner
                self.mask = torch.ones(T, start + T, dtype=torch.bool, device=cos.device).tril(start)
        else:
            where = start[:, None] + torch.arange(T, device=cos.device)  # (B, T)
            self.cos, self.sin = (x[where][:, None].to(dtype) for x in (cos, sin))  # (B, 1, T, D/2)
            keys = torch.arange(self.end, device=cos.device)
            self.mask = (keys <= where[..., None])[:, None]  # (B, 1, T, S)


class MLP(nn.Module):
    """C -> 4C -> C with ReLU² (Primer, 2109.08668)."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.up = Linear(n_embd, 4 * n_embd)
        self.down = Linear(4 * n_embd, n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > gemv.MAX_ROWS * x.size(-1) and attention.usable(x):
            return attention.mlp(x, self.up.weight, self.down.weight)
        return self.down(F.relu(self.up(x)).square())


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int):
        super().__init__()
        self.attn = Attention(n_embd, n_head, n_kv_head)
        self.mlp = MLP(n_embd)

    def forward(self, x: torch.Tensor, pos: Positions, state: KVState | None = None) -> torch.Tensor:
        x = x + self.attn(norm(x), pos, state)
        return x + self.mlp(norm(x))
