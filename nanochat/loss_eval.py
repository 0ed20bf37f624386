"""Bits per byte: a loss that doesn't depend on the tokenizer, so that vocabularies and models can be compared."""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from nanochat.common import UserError
from nanochat.dataloader import PackedLoader
from nanochat.dataset import TextStream, load_texts
from nanochat.tokenizer import Tokenizer


@torch.no_grad()
def evaluate_bpb(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: torch.Tensor | list[int]
) -> float:
    """Cross-entropy in bits per byte of text over `batches` of (inputs, targets), both (B, T); summed over ranks.

    `token_bytes` (vocab,) is each token's length in bytes, 0 for special tokens; those, like targets of -1, count
    neither as loss nor as text. Raises UserError if there is no text at all.
    """
    device = next(model.parameters()).device
    token_bytes = torch.as_tensor(token_bytes, dtype=torch.int64, device=device)
    nats = torch.zeros(2, dtype=torch.float64)  # nats, bytes
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        lengths = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)  # (B, T)
        counted = torch.where(lengths > 0, targets, -1)
        if (counted >= 0).any():
            nats[0] += model(inputs, counted, reduction="sum").cpu().double()
            nats[1] += lengths.sum().cpu().double()
    if dist.is_initialized():
        nats = nats.to(device) if dist.get_backend() == "nccl" else nats
        dist.all_reduce(nats)
    total, size = nats.tolist()
    if size == 0:
        raise UserError("bits per byte: the evaluation batches hold no text")
    return total / size / math.log(2)


def text_validation(data: str, tokenizer: Tokenizer, config: Any, n_batches: int) -> Callable[[nn.Module], dict]:
    """An evaluation for the training loop: bits per byte on the first `n_batches` batches of `data`'s val split.

    `config` gives device_batch_size and sequence_len. Ranks share the batches.
    """
    texts, sizes = load_texts(data, "val"), tokenizer.token_bytes()

    def validate(model: nn.Module) -> dict[str, float]:
        stream = TextStream(texts, tokenizer, seed=0)
        length = config.sequence_len or model.config.sequence_len
        loader = PackedLoader(stream, config.device_batch_size, length, buffer_size=64)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = islice(islice(loader, n_batches), rank, None, world)
        return {"val_bpb": evaluate_bpb(model, mine, sizes)}

    return validate
