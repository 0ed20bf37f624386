"""Packing: nothing lost, nothing doubled, never a batch without targets, exact resume."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.dataloader import MIN_PIECE, PackedLoader

BOS = 0


class Numbered:
    """Text documents of the given lengths, over and over; every token but bos occurs once in the whole stream."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.totals = np.concatenate([[0], np.cumsum([n - 1 for n in lengths])])

    def sample(self, i):
        lap, k = divmod(i, len(self.lengths))
        first = 1 + lap * int(self.totals[-1]) + int(self.totals[k])
        return [BOS, *range(first, first + self.lengths[k] - 1)], None


class Chats:
    """Masked samples drawn from a seed: random lengths, some without any target, some longer than a row."""

    def __init__(self, seed, longest):
        self.seed, self.longest = seed, longest

    def sample(self, i):
        rng = np.random.default_rng((self.seed, i))
        n = int(rng.integers(1, self.longest))
        share = rng.choice([0.0, 0.02, 0.3, 1.0])
        return np.concatenate([[BOS], rng.integers(1, 1000, n)]), np.concatenate([[0], rng.random(n) < share])


def take(loader, n):
    return [next(loader) for _ in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    longest=st.integers(2, 120),
    rows=st.integers(1, 4),
    length=st.integers(MIN_PIECE, 60),
    buffer=st.integers(1, 30),
    text_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_no_row_is_ever_without_a_target(seed, longest, rows, length, buffer, text_share):
    chats = Chats(seed, longest)

    class Mixed:
        def sample(self, i):
            ids, mask = chats.sample(i)
            return ids, (None if np.random.default_rng((seed, i, 1)).random() < text_share else mask)

    for inputs, targets in take(PackedLoader(Mixed(), rows, length, buffer_size=buffer), 5):
        assert inputs.shape == targets.shape == (rows, length)
        assert inputs.dtype == targets.dtype == torch.int64
        assert (targets >= 0).any(dim=1).all()
        assert (inputs[:, 0] == BOS).all()
        follows = targets[:, :-1] == inputs[:, 1:]  # a target is the next input
        assert (follows | (targets[:, :-1] == -1)).all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12).filter(lambda x: max(x) > 1),
    length=st.integers(MIN_PIECE, 50),
    buffer=st.integers(1, 20),
)
def test_every_token_of_a_text_is_a_target_once_and_after_the_right_token(lengths, length, buffer):
    stream = Numbered(lengths)
    loader = PackedLoader(stream, 2, length, buffer_size=buffer)
    seen = []
    for inputs, targets in take(loader, 12):
        keep = targets > BOS
        seen += targets[keep].tolist()
        for before, token in zip(inputs[keep].tolist(), targets[keep].tolist()):
            assert before in (token - 1, BOS)
    still_waiting = [t for s in loader.waiting for t in s.ids[s.mask].tolist() if t != BOS]
    taken = [t for i in range(loader.next_index) for t in stream.sample(i)[0][1:]]
    assert sorted(seen + still_waiting) == taken


def test_text_fills_rows_almost_completely():
    rng = np.random.default_rng(0)
    loader = PackedLoader(Numbered(rng.integers(5, 2000, 300).tolist()), 8, 256)
    take(loader, 50)
    assert loader.packing_efficiency > 0.995


def test_conversations_fill_rows_well():
    loader = PackedLoader(Chats(0, 200), 8, 512)
    take(loader, 50)
    assert loader.packing_efficiency > 0.95


def test_ranks_share_the_samples_out():
    def tokens(rank, world):
        loader = PackedLoader(Numbered([9] * 50), 1, 8, rank, world, buffer_size=1)
        return [t for _, targets in take(loader, 10) for t in targets.flatten().tolist()]

    assert not set(tokens(0, 2)) & set(tokens(1, 2))
    assert set(tokens(0, 2)) | set(tokens(1, 2)) == {t for i in range(20) for t in Numbered([9] * 50).sample(i)[0][1:]}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), before=st.integers(0, 6))
def test_resume_continues_with_the_very_next_batch(seed, before, tmp_path_factory):
    class Drifting(Chats):
        """A stream with a state of its own, as a drill whose difficulty grows."""

        count = 0

        def sample(self, i):
            self.count += 1
            ids, mask = super().sample(i)
            return ids + self.count // 7, (mask if i % 3 else None)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    loader = PackedLoader(Drifting(seed, 80), 2, 40, buffer_size=10)
    take(loader, before)
    file = tmp_path_factory.mktemp("state") / "loader.pt"
    torch.save(loader.state_dict(), file)
    expected = take(loader, 4)
    other = PackedLoader(Drifting(seed, 80), 2, 40, buffer_size=10)
    other.load_state_dict(torch.load(file, weights_only=True))
    for (a, b), (c, d) in zip(expected, take(other, 4)):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert other.counts == loader.counts


def test_a_stream_without_targets_is_refused_instead_of_searched_for_ever():
    class Empty:
        def sample(self, i):
            return [BOS, 1, 2], [0, 0, 0]

    with pytest.raises(UserError, match="nothing to learn"):
        next(PackedLoader(Empty(), 1, 16))


def test_long_conversations_lose_their_tail_or_are_skipped():
    class Long:
        def sample(self, i):
            early = i % 2 == 0
            return [BOS, *range(1, 50)], [0] * 5 + [int(early)] * 3 + [0] * 22 + [1] * 20

    loader = PackedLoader(Long(), 2, 16, buffer_size=4)
    for _, targets in take(loader, 5):
        assert all(sorted(set(row.tolist())) == [-1, 5, 6, 7] for row in targets)
    assert loader.counts["skipped"] > 0


def test_another_number_of_processes_cannot_resume():
    state = PackedLoader(Chats(0, 50), 1, 32, 0, 2).state_dict()
    with pytest.raises(UserError, match="written by 2 processes"):
        PackedLoader(Chats(0, 50), 1, 32).load_state_dict(state)
