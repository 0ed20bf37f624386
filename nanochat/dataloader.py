"""Samples of any length -> packed batches of (inputs, targets), the same way for pretraining and for conversations.

    loader = PackedLoader(stream, batch_size=8, sequence_len=512)
    inputs, targets = next(loader)              # (B, T) int64 each; a target of -1 is no target

A stream is any object with `sample(i) -> (ids, mask)` for i = 0, 1, 2, ... without end: ids start with a document
start (bos), mask[j] = 1 says that token j is to be predicted, mask None that all are (plain text). If it also has
`state_dict()` and `load_state_dict()`, they are saved and restored with the loader.

A row is T + 1 tokens: a sample waiting longest first, so that none waits for ever, then best fit: the longest that
fits in what is left. When none fits, text is cut and its rest goes on later behind a fresh bos; a masked sample is
never cut for that, the row is padded instead. No row, hence no batch, is without a target.

Every choice follows from the samples alone: no random numbers, so the state is the next index and the waiting list.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch

from nanochat.common import UserError

MIN_PIECE = 8  # don't cut text to fill fewer positions: a cut costs two (bos and the last token again)
MAX_SKIPS = 10_000  # this many useless samples in a row: the stream will never fill a batch


class Stream(Protocol):
    """What the loader reads from (see the module's docstring)."""

    def sample(self, index: int) -> tuple[list[int] | np.ndarray, list[int] | np.ndarray | None]: ...


class Sample(NamedTuple):
    """One waiting sample, or what is left of one."""

    ids: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool: token j is a target
    text: bool  # may be cut

    def cut(self, n: int) -> tuple["Sample", "Sample"]:
        """The first n tokens, and the rest behind bos and token n - 1 as context: every token is a target once."""
        rest_ids = np.concatenate([self.ids[:1], self.ids[n - 1 :]])
        rest_mask = np.concatenate([np.zeros(2, bool), self.mask[n:]])
        return Sample(self.ids[:n], self.mask[:n], True), Sample(rest_ids, rest_mask, True)


class PackedLoader:
    """An endless iterator over batches; rank r of `world_size` reads the samples i with i mod world_size = r."""

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 200,
    ):
        if batch_size < 1 or sequence_len < MIN_PIECE or buffer_size < 1:
            raise UserError(
                f"cannot pack rows: batch size {batch_size} and buffer size {buffer_size} must be at least 1, "
                f"sequence length {sequence_len} at least {MIN_PIECE}"
            )
        self.stream, self.batch_size, self.sequence_len = stream, batch_size, sequence_len
        self.rank, self.world_size, self.buffer_size = rank, world_size, buffer_size
        self.next_index = rank
        self.waiting: list[Sample] = []  # oldest first
        self.counts = {"positions": 0, "filled": 0, "targets": 0, "skipped": 0, "truncated": 0}

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next (inputs, targets), both (B, T) int64."""
        ids = np.zeros((self.batch_size, self.sequence_len + 1), np.int64)
        mask = np.zeros(ids.shape, bool)
        for row_ids, row_mask in zip(ids, mask):
            self._fill_row(row_ids, row_mask)
        targets = np.where(mask[:, 1:], ids[:, 1:], -1)
        self.counts["positions"] += ids.size
        self.counts["targets"] += int(mask[:, 1:].sum())
        return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets)

    @property
    def packing_efficiency(self) -> float:
        """The share of row positions that hold a token rather than padding, so far."""
        return self.counts["filled"] / max(1, self.counts["positions"])

    # ------------------------------------------------------------------------------------------------------------------
    # Packing

    def _fill_row(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Write samples into one row, (T + 1,) each of ids and mask, until nothing more fits."""
        at, size = 0, len(ids)
        while at < size:
            self._refill()
            sample = self._take(size - at, oldest=at == 0)
            if sample is None:
                return
            end = at + len(sample.ids)
            ids[at:end], mask[at:end] = sample.ids, sample.mask
            self.counts["filled"] += len(sample.ids)
            at = end

    def _take(self, room: int, oldest: bool) -> Sample | None:
        """Remove from the waiting list what goes into the next `room` positions, or None to pad them."""
        if oldest:
            best = 0
        else:
            best, best_len = None, 0
            for i, sample in enumerate(self.waiting):
                if best_len < len(sample.ids) <= room:
                    best, best_len = i, len(sample.ids)
            if best is None:  # nothing fits: cut the longest text, which spares the short ones
                texts = [i for i, sample in enumerate(self.waiting) if sample.text]
                if not texts or room < MIN_PIECE:
                    return None
                best = max(texts, key=lambda i: len(self.waiting[i].ids))
        sample = self.waiting.pop(best)
        if len(sample.ids) > room:
            sample, rest = sample.cut(room)
            self.waiting.append(rest)  # last in the queue, so that a long document spreads over many batches
        return sample

    def _refill(self) -> None:
        """Read samples until the waiting list is full, leaving out those that hold no target."""
        skips = 0
        while len(self.waiting) < self.buffer_size:
            sample = self._read(self.next_index)
            self.next_index += self.world_size
            if sample is not None:
                self.waiting.append(sample)
                skips = 0
                continue
            self.counts["skipped"] += 1
            skips += 1
            if skips == MAX_SKIPS:
                raise UserError(
                    f"{MAX_SKIPS} samples in a row have nothing to learn within {self.sequence_len} tokens; "
                    "raise --sequence_len or check the data"
                )

    def _read(self, index: int) -> Sample | None:
        """Sample `index` of the stream as arrays, masked ones truncated to a row; None if no target is left."""
        ids, mask = self.stream.sample(index)
        text = mask is None
        ids = np.array(ids, np.int32)  # copies: the stream may reuse its arrays
        mask = np.ones(len(ids), bool) if text else np.array(mask, bool)
        if ids.shape != mask.shape or ids.ndim != 1:
            raise ValueError(f"sample {index} has ids of shape {ids.shape} but a mask of shape {mask.shape}")
        if not text and len(ids) > self.sequence_len + 1:
            ids, mask = ids[: self.sequence_len + 1], mask[: self.sequence_len + 1]
            self.counts["truncated"] += 1
        # the first token has nothing before it when the sample opens a row, so it doesn't count as a target
        return Sample(ids, mask, text) if mask[1:].any() else None

    # ------------------------------------------------------------------------------------------------------------------
    # Resume

    def state_dict(self) -> dict:
        """Everything that decides the next batch: index, waiting samples (concatenated), the stream's own state."""
        samples = self.waiting
        return {
            "next_index": self.next_index,
            "ranks": [self.rank, self.world_size],
            "lengths": [len(s.ids) for s in samples],
            "text": [s.text for s in samples],
            "ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *(s.ids for s in samples)])),
            "mask": torch.from_numpy(np.concatenate([np.zeros(0, bool), *(s.mask for s in samples)])),
            "counts": dict(self.counts),
            "stream": self.stream.state_dict() if hasattr(self.stream, "state_dict") else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict()` was taken."""
        if state["ranks"] != [self.rank, self.world_size]:
            raise UserError(
                f"the checkpoint was written by {state['ranks'][1]} processes; "
                f"resume with as many, not {self.world_size}"
            )
        self.next_index, self.counts = state["next_index"], dict(state["counts"])
        ends = np.cumsum(state["lengths"])[:-1]
        ids, mask = (np.split(state[key].numpy(), ends) for key in ("ids", "mask"))
        self.waiting = [Sample(*fields) for fields in zip(ids, mask, state["text"])]
        if hasattr(self.stream, "load_state_dict"):
            self.stream.load_state_dict(state["stream"])
