"""The language model: embedding, a stack of blocks given by a pattern, head and loss. GPT, Mamba-2 or both at once.

    config = GPTConfig.from_depth(6, "hybrid", vocab_size=8192)
    model = GPT(config); model.init_weights()
    loss = model(ids, targets)                  # (B, T), (B, T) with -1 = no target -> scalar
    logits = model(ids)                         # (B, T, vocab) in fp32
    cache = model.new_cache(); model(prompt, cache=cache); model(next_token, cache=cache)

'T' is attention + MLP (blocks/transformer.py), 'M' a Mamba-2 mixer (blocks/mamba.py). Weights are kept in fp32 and
cast to the compute dtype where they are used; the embedding decides that dtype (`set_compute_dtype`).
Memory modules work on embeddings: `inputs_embeds` goes in, `return_hidden` comes out, no block knows about them.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.blocks import attention
from nanochat.blocks.mamba import MambaBlock
from nanochat.blocks.transformer import KVState, Positions, TransformerBlock, norm, rope_table
from nanochat.common import Linear, UserError, parse_pattern

# One period of each preset, repeated to the depth. Hybrid: a third of the layers attend, spread out, the last at the
# end; denser than Jamba or Granite-4, as there are few layers. benchmarks/patterns.py compares (docs/LOG.md).
PRESETS = {"gpt": "T", "hybrid": "MMT", "mamba": "M"}


@dataclass
class GPTConfig:
    """Everything that decides the shape of the model; stored in every checkpoint."""

    sequence_len: int = 1024  # the context it is trained at, in tokens
    vocab_size: int = 8192
    n_layer: int = 6
    n_head: int = 4
    n_kv_head: int = 4
    n_embd: int = 256
    block_pattern: str = "MMTMMT"
    d_state: int = 64  # Mamba-2 state size per head
    headdim: int = 64  # Mamba-2 head size
    rope_base: float = 10000.0

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_state", "headdim"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UserError(f"{name} must be a whole number from 1, not {value!r}")
        self.block_pattern = parse_pattern(self.block_pattern)
        if len(self.block_pattern) != self.n_layer:
            raise UserError(
                f"block pattern '{self.block_pattern}' has {len(self.block_pattern)} blocks, "
                f"but the depth is {self.n_layer}"
            )
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}, "
                f"and n_head of n_kv_head {self.n_kv_head}"
            )
        if "M" in self.block_pattern and (2 * self.n_embd) % self.headdim:
            raise UserError(f"2 x n_embd = {2 * self.n_embd} must be a multiple of headdim {self.headdim}")

    @classmethod
    def from_depth(
        cls, depth: int, pattern: str = "hybrid", *, vocab_size: int, sequence_len: int = 1024, n_embd: int = 0
    ):
        """The one dial: width 64 x depth (at least 256), heads of 64. `pattern`: a preset or a block pattern."""
        if not 1 <= depth <= 200:
            raise UserError(f"depth {depth} is outside 1 to 200")
        if pattern in PRESETS:
            period = PRESETS[pattern]
            if depth < len(period):
                raise UserError(f"{pattern} ({period}, repeated) needs a depth of {len(period)} or more, not {depth}")
            pattern = (period * depth)[:depth]
        width = n_embd or max(256, 64 * depth)
        heads = max(1, width // 64)
        return cls(
            sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads,
            n_embd=width, block_pattern=pattern,
        )  # fmt: skip


class Cache:
    """What the model remembers of the tokens it has read: KV of 'T' layers, (conv, ssm) states of 'M' layers.

    `length` is the number of tokens read: an int, or a (B,) tensor once caches of different lengths were stacked.
    """

    def __init__(self, layers: list, length: torch.Tensor | int = 0):
        self.layers, self.length = layers, length

    def clone(self) -> "Cache":
        """An independent copy: a prefix can be read once and continued many times."""
        layers = []
        for s in self.layers:
            layers.append(KVState(s.k.clone(), s.v.clone()) if isinstance(s, KVState) else s.clone())
        return Cache(layers, self.length if isinstance(self.length, int) else self.length.clone())

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Only attention can: a recurrent state has no past to return to."""
        if any(not isinstance(s, KVState) for s in self.layers):
            raise ValueError("a cache with Mamba states can't be truncated; clone it before reading on")
        self.length = length

    def select(self, rows: list[int]) -> "Cache":
        """The cache of some of the batch's rows (repeats allowed)."""
        layers = []
        for s in self.layers:
            fields = {name: x[rows] for name, x in vars(s).items() if isinstance(x, torch.Tensor)}
            layers.append(type(s)(**fields))
        return Cache(layers, self.length if isinstance(self.length, int) else self.length[rows])

    @staticmethod
    def stack(caches: list["Cache"]) -> "Cache":
        """Batch caches of any lengths: rows in order."""
        sizes = [(c.layers[0].k if isinstance(c.layers[0], KVState) else c.layers[0].ssm).size(0) for c in caches]
        lengths = torch.cat([torch.as_tensor(c.length).expand(n) for c, n in zip(caches, sizes)])
        layers = []
        for states in zip(*(c.layers for c in caches)):
            fields = {}
            for name in (n for n, x in vars(states[0]).items() if isinstance(x, torch.Tensor)):
                parts = [getattr(s, name) for s in states]
                if isinstance(states[0], KVState):
                    longest = max(p.size(2) for p in parts)
                    parts = [F.pad(p, (0, 0, 0, longest - p.size(2))) for p in parts]
                fields[name] = torch.cat(parts)
            layers.append(type(states[0])(**fields))
        same = bool((lengths == lengths[0]).all())
        return Cache(layers, int(lengths[0]) if same else lengths)


class GPT(nn.Module):
    """See the module's docstring. Shapes: B rows, T tokens, C = n_embd, V = vocab_size."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        c = config
        self.compute_dtype = torch.float32
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        make = {
            "T": lambda: TransformerBlock(c.n_embd, c.n_head, c.n_kv_head),
            "M": lambda: MambaBlock(c.n_embd, d_state=c.d_state, headdim=c.headdim),
        }
        self.blocks = nn.ModuleList(make[kind]() for kind in c.block_pattern)
        self.lm_head = Linear(c.n_embd, c.vocab_size)
        self.gradient_checkpointing = False
        self.confidence: dict | None = None  # of the engine, chosen on validation questions; load_model sets it
        self.evidence: Any = None  # an EvidenceReader (nanochat/evidence.py), if it was calibrated with one
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None

    # ------------------------------------------------------------------------------------------------------------------
    # Weights

    @torch.no_grad()
    def init_weights(self) -> None:
        """All initial values are set here (Mamba's own dt, A and D by its `reset_parameters`).

        Embedding N(0, 1) as in nanochat; matrices uniform with standard deviation 1/sqrt(C); what writes into the
        residual stream starts at zero, so that every block begins as the identity; the head almost at zero.
        """
        bound = (3 / self.config.n_embd) ** 0.5
        self.wte.weight.normal_(0, 1)
        self.lm_head.weight.normal_(0, 0.001)
        for block in self.blocks:
            if isinstance(block, TransformerBlock):
                block.attn.qkv.weight.uniform_(-bound, bound)
                block.mlp.up.weight.uniform_(-bound, bound)
                block.attn.out.weight.zero_()
                block.mlp.down.weight.zero_()
            else:
                block.mixer.reset_parameters()
                block.mixer.in_proj.weight.uniform_(-bound, bound)
                block.mixer.out_proj.weight.zero_()

    def set_compute_dtype(self, dtype: torch.dtype) -> "GPT":
        """Choose the dtype activations are computed in; weights stay as they are."""
        self.compute_dtype = dtype
        return self

    def param_groups(
        self, matrix_lr: float, embedding_lr: float, unembedding_lr: float, mamba_lr: float, weight_decay: float
    ) -> list[dict]:
        """The parameters by how they are optimized: matrices by Muon, the rest by AdamW.

        AdamW's rates are for a width of 768 and scale with (C/768)^-0.5. Norm weights, conv, A_log, D and dt_bias
        (all 'mamba' here) get no weight decay, as in mamba_ssm; only matrices are decayed.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        matrices, small = [], []
        for p in self.blocks.parameters():
            (matrices if p.ndim == 2 else small).append(p)
        adam = {"kind": "adamw", "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-10}
        groups = [
            {"name": "matrix", "kind": "muon", "params": matrices, "lr": matrix_lr, "weight_decay": weight_decay},
            {"name": "embedding", "params": [self.wte.weight], "lr": embedding_lr * scale, **adam},
            {"name": "unembedding", "params": [self.lm_head.weight], "lr": unembedding_lr * scale, **adam},
            {"name": "mamba", "params": small, "lr": mamba_lr, **adam},
        ]
        return [g for g in groups if g["params"]]

    def num_params(self) -> dict[str, int]:
        """Parameter counts by part."""
        count = lambda module: sum(p.numel() for p in module.parameters())
        parts = {"embedding": count(self.wte), "blocks": count(self.blocks), "head": count(self.lm_head)}
        return {**parts, "total": sum(parts.values())}

    def flops_per_token(self, T: int | None = None) -> float:
        """Training FLOPs a token at context T: 6 per matrix weight, plus attention scores and the scan's products."""
        c, T = self.config, T or self.config.sequence_len
        n = self.num_params()
        flops = 6.0 * (n["blocks"] + n["head"])
        for kind in c.block_pattern:
            if kind == "T":
                flops += 6 * c.n_embd * T  # QKᵀ and PV, 2 x 2 FLOPs x T/2 keys on average, x 3 for the backward
            else:  # SSD with chunks of 64 (2405.21060, §6): CBᵀ, (M)X, CS and BᵀX
                inner, chunk = 2 * c.n_embd, 64
                flops += 6 * (chunk * c.d_state + chunk * inner + 2 * c.d_state * inner)
        return flops

    def compile_blocks(self) -> None:
        """torch.compile every block in place (one graph per kind). Worth its minute on long runs only."""
        for block in self.blocks:
            block.compile(dynamic=False)

    # ------------------------------------------------------------------------------------------------------------------
    # Forward

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache for `batch` rows."""
        device, layers = self.wte.weight.device, []
        for block in self.blocks:
            if isinstance(block, TransformerBlock):
                a = block.attn
                empty = torch.empty(batch, a.n_kv_head, 0, a.head_dim, device=device, dtype=self.compute_dtype)
                layers.append(KVState(empty, empty))
            else:
                layers.append(block.mixer.allocate_state(batch, device, self.compute_dtype))
        return Cache(layers)

    def forward(
        self,
        ids: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        reduction: str = "mean",
        return_hidden: bool = False,
    ) -> torch.Tensor:
        """ids (B, T) or inputs_embeds (B, T, C) -> logits (B, T, V) fp32, hidden states (B, T, C), or a loss.

        With targets (B, T; -1 = none): the cross-entropy over supervised positions, their mean (0 if there are none)
        or sum; only those positions reach the head. With a cache, the tokens are appended to what it holds.
        """
        x = self.embed(ids) if inputs_embeds is None else inputs_embeds.to(self.compute_dtype)
        start = 0 if cache is None else cache.length
        pos = self._positions(start, x.size(1), x)
        for i, block in enumerate(self.blocks):
            args = (x, pos) if isinstance(block, TransformerBlock) else (x,)
            state = None if cache is None else cache.layers[i]
            if self.gradient_checkpointing and self.training and state is None:
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args) if state is None else block(*args, state)
        if cache is not None:
            cache.length = start + x.size(1)
        x = norm(x)
        if return_hidden:
            return x
        if targets is None:
            return self.logits(x)
        keep = targets.reshape(-1) != -1
        loss = head_loss(x.reshape(-1, x.size(-1))[keep], self.lm_head.weight, targets.reshape(-1)[keep])
        return loss / keep.sum().clamp(min=1) if reduction == "mean" else loss

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, C) normed embeddings in the compute dtype."""
        return norm(self.wte(ids).to(self.compute_dtype))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) final hidden states -> (..., V) logits in fp32."""
        return self.lm_head(hidden).float()

    def forward_embed_only(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> the last hidden states (B, T, C)."""
        return self(ids, return_hidden=True)

    def generate_from_conversation(self, conversation: dict, read: str = "each", **sampling) -> str:
        """Answer a conversation (docs/formats.md) with this model; needs `load_model`, which attaches the tokenizer.

        Its documents are read one by one (`read="each"`, reader.py) or two by two, too ("together"), and answers are in
        their words unless `quote` is false.
        """
        if read not in ("each", "together"):
            raise UserError(f"read={read!r}: choose 'each' or 'together'")
        from nanochat.engine import Engine  # these two build on this file, not the other way round
        from nanochat.reader import answer_each, answer_together

        engine = Engine(self, self.tokenizer)
        if read == "each":
            return answer_each(engine, [conversation], **sampling)[0][0]
        return answer_together(engine, [conversation], **sampling)[0]

    def _positions(self, start: torch.Tensor | int, T: int, x: torch.Tensor) -> Positions | None:
        if "T" not in self.config.block_pattern:
            return None
        need = T + (start if isinstance(start, int) else int(start.max()))
        if self._rope is None or self._rope[0].size(0) < need or self._rope[0].device != x.device:
            n = max(need, 2 * self.config.sequence_len)
            with torch.inference_mode(False):  # a table first made while generating must serve training, too
                self._rope = rope_table(n, self.config.n_embd // self.config.n_head, self.config.rope_base, x.device)
        return Positions(start, T, *self._rope, x.dtype)


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of (hidden @ weightᵀ), a chunk of positions at a time.

    The gradients of a chunk are computed while its logits are there, so (N, V) never exists and nothing is computed
    twice (the idea of Liger Kernel's fused linear cross-entropy, 2410.10989).
    """

    CHUNK = 2048  # 2048 x 8192 bf16 logits = 32 MB; smaller chunks starve the GEMM of the weight's gradient

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        w = weight.to(hidden.dtype)
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden.device)
        dh = torch.empty_like(hidden) if need else None
        dw = torch.zeros_like(weight) if need else None
        for i in range(0, hidden.size(0), _HeadLoss.CHUNK):
            h, t = hidden[i : i + _HeadLoss.CHUNK], targets[i : i + _HeadLoss.CHUNK]
            loss, g = _cross_entropy(h @ w.t(), t)
            total += loss
            if need:
                dh[i : i + _HeadLoss.CHUNK] = g @ w
                dw += g.t() @ h
        ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return None if dh is None else dh * grad, None if dw is None else dw * grad, None


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V), which are used up, targets (N,) -> their summed cross-entropy and its gradient (N, V)."""
    if attention.usable(logits):
        return attention.cross_entropy_(logits, targets).sum(), logits
    # One softmax in the compute dtype (fp32 inside) costs a quarter of the same steps in fp32. What it rounds away
    # matters only where p(target) is near 1, so 1 - p(target) is summed from the others instead.
    p = logits.softmax(-1)
    at = (torch.arange(len(targets), device=targets.device), targets)  # indexing: bf16 scatter_ copies the whole table
    p_target = p[at].float()
    p[at] = 0
    others = p.sum(-1)
    p[at] = -others  # p is now the gradient of the logits: softmax - onehot
    others = others.float()
    loss = -torch.where(others < 0.5, torch.log1p(-others.clamp_max(0.5)), p_target.clamp_min(1e-38).log())
    if (lost := p_target < 1e-30).any():  # near the end of fp32's range; such rows are rare, so they may cost
        rows = logits[lost].float()
        loss[lost] = rows.logsumexp(-1) - logits[at][lost].float()
    return loss.sum(), p


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden (N, C), head weight (V, C), targets (N,) -> summed cross-entropy, a scalar in fp32."""
    return _HeadLoss.apply(hidden, weight, targets)


def config_dict(config: GPTConfig) -> dict:
    """The config as plain JSON; GPTConfig(**d) is its inverse."""
    return asdict(config)
