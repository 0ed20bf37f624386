"""Drills: what is asked can be looked up, and the ladder rises with what is learned."""

import json
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import Echo

import tasks.drills as drills
from nanochat.rag_utils import ABSTENTION
from nanochat.tokenizer import Tokenizer
from tasks.common import (
    MixStream,
)
from tasks.drills import LADDER, LEARNED, DrillStream, climb, drill_accuracy

BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # a tokenizer without any merge
V = BYTES.vocab_size


def test_the_same_index_gives_the_same_drill_and_the_seed_changes_it():
    one, two, other = DrillStream(BYTES), DrillStream(BYTES), DrillStream(BYTES, seed=1)
    for stream in (one, two, other):
        stream.level = 3
    assert [one.sample(i) for i in range(20)] == [two.sample(i) for i in range(19, -1, -1)][::-1]
    assert all(one.sample(i) != other.sample(i) for i in range(5))


@settings(max_examples=60, deadline=None)
@given(level=st.integers(0, len(LADDER) - 1), seed=st.integers(0, 10**6))
def test_a_copy_drill_asks_for_exactly_the_repeat(level, seed):
    stream = DrillStream(BYTES)
    ids, mask = stream.copy(random.Random(seed), level)
    n = (len(ids) - 3) // 2
    assert ids[0] == stream.bos and ids[1 : n + 1] == ids[n + 2 : -1] and ids[n + 1] == ids[-1] == stream.sep
    assert mask == [0] * (n + 2) + [1] * (n + 1)
    size, length = LADDER[level]
    assert length // 2 <= n <= length and set(ids[1 : n + 1]) <= set(stream.symbols[: size or 256])


@settings(max_examples=60, deadline=None)
@given(level=st.integers(0, len(LADDER) - 1), seed=st.integers(0, 10**6))
def test_a_recall_drill_tells_every_pair_once_and_asks_for_each(level, seed):
    stream = DrillStream(BYTES)
    ids, mask = stream.recall(random.Random(seed), level)
    told, asked, at = {}, [], 1
    while ids[at] != stream.ask:
        end = ids.index(stream.sep, at)
        assert ids[at + 2] == stream.mem and 1 <= end - at - 3 <= 4 and not any(mask[at : end + 1])
        key = tuple(ids[at : at + 2])
        assert key not in told, "a key with two values can't be recalled"
        told[key] = ids[at + 3 : end]
        at = end + 1
    while at < len(ids):
        end = ids.index(stream.sep, at)
        assert ids[at] == stream.ask and ids[at + 3] == stream.end
        assert ids[at + 4 : end] == told[tuple(ids[at + 1 : at + 3])]
        assert mask[at : at + 4] == [0] * 4 and mask[at + 4 : end + 1] == [1] * (end - at - 3)
        asked.append(tuple(ids[at + 1 : at + 3]))
        at = end + 1
    assert sorted(asked) == sorted(told) and len(told) >= 2


def test_a_larger_alphabet_contains_the_smaller_ones():
    stream = DrillStream(BYTES)
    assert set(stream._alphabet(0)[0]) < set(stream._alphabet(2)[0]) and len(stream._alphabet(0)[0]) == 64


def test_a_drill_stream_keeps_its_level_in_its_state():
    stream, other = DrillStream(BYTES), DrillStream(BYTES)
    stream.level, stream.looks = 5, 17
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert (other.level, other.looks) == (5, 17) and other.sample(3) == stream.sample(3)


def look_up(ids):
    """A lookup drill's facts (question -> value) and questions (question -> where its answer begins)."""
    special, facts, asked = BYTES.special_ids, {}, {}
    for at, token in enumerate(ids):
        if token == special["<|doc_start|>"]:
            pieces = [[]]
            for t in ids[at + 1 : ids.index(special["<|doc_end|>"], at)]:
                pieces[-1].append(t) if t != special["<|sep|>"] else pieces.append([])
            thing = pieces[0][pieces[0].index(special["<|mem|>"]) + 1 :]
            assert pieces[0][: len(thing)] == thing and pieces.pop() == []
            pieces[0] = pieces[0][len(thing) :]
            for question, value in zip(pieces[::2], pieces[1::2]):
                assert question[-len(thing) :] == thing and tuple(question) not in facts
                facts[tuple(question)] = value
        elif token == special["<|user_start|>"]:
            end = ids.index(special["<|user_end|>"], at)
            asked[tuple(ids[at + 1 : end])] = end + 2
    return facts, asked


@settings(max_examples=60, deadline=None)
@given(level=st.integers(0, len(LADDER) - 1), seed=st.integers(0, 10**6))
def test_a_lookup_drill_asks_for_every_fact_and_higher_up_for_what_is_not_told(level, seed):
    stream = DrillStream(BYTES)
    ids, mask = stream.lookup(random.Random(seed), level)
    facts, asked = look_up(ids)
    end, refusal = BYTES.special_ids["<|assistant_end|>"], BYTES.encode_text(ABSTENTION)
    assert facts and set(facts) <= set(asked) and (level >= 4 or set(facts) == set(asked))
    wanted = [0] * len(ids)
    for question, at in asked.items():
        said = ids[at : ids.index(end, at)]
        assert said == facts.get(question, refusal)
        for k in range(len(said) + 1 if question in facts else 1):
            wanted[at + k] = 1
    assert mask == wanted


class Copier(torch.nn.Module):
    """Predicts what stood `n` tokens earlier, where the copy drill's repeat stands: perfect at copying one length.

    And it knows the answers of lookup drills.
    """

    def __init__(self, right: bool):
        super().__init__()
        self.right, self.dummy = right, torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, return_hidden=True):
        sep = BYTES.special_ids["<|sep|>"]
        first = ids[0].tolist().index(sep) if sep in ids[0].tolist() else ids.size(1)
        next_ids = torch.roll(ids, -1, 1)
        if BYTES.special_ids["<|doc_start|>"] not in ids:
            next_ids[:, first:] = ids[:, 1 : ids.size(1) - first + 1]
        return torch.nn.functional.one_hot(next_ids if self.right else next_ids * 0, V).float()

    def logits(self, hidden):
        return hidden


def test_drill_accuracy_tells_a_copier_from_a_fool():
    stream = DrillStream(BYTES)
    assert drill_accuracy(Copier(True), stream, "copy", 1) > 0.95  # all but the separator at the end
    assert drill_accuracy(Copier(False), stream, "copy", 1) < 0.1


def test_a_learned_level_opens_the_next_and_the_top_hands_over_to_text():
    stream = DrillStream(BYTES)
    mix = MixStream({"text": Echo(), "drill": Echo()}, {"text": 0.02, "drill": 0.98})
    after = {"text": 0.9, "drill": 0.1}
    found = climb(Copier(False), stream, mix, after, patience=5)
    assert stream.level == 0 and found["level"] == 0 and found["copy"] < LEARNED and mix.weights["text"] == 0.02
    found = climb(Copier(True), stream, mix, after, patience=5)
    assert stream.level == len(LADDER) - 1 and mix.weights == after


def test_text_takes_over_when_patience_ends():
    stream = DrillStream(BYTES)
    mix = MixStream({"text": Echo(), "drill": Echo()}, {"text": 0.02, "drill": 0.98})
    for look in range(3):
        assert mix.weights["text"] == 0.02, look
        climb(Copier(False), stream, mix, {"text": 0.9, "drill": 0.1}, patience=3)
    assert mix.weights["text"] == 0.9 and stream.level == 0


def test_text_takes_over_in_a_resumed_run_that_is_past_its_patience():
    stream = DrillStream(BYTES)
    stream.load_state_dict({"level": 0, "looks": 7})
    mix = MixStream({"text": Echo(), "drill": Echo()}, {"text": 0.02, "drill": 0.98})
    climb(Copier(False), stream, mix, {"text": 0.9, "drill": 0.1}, patience=3)
    assert mix.weights["text"] == 0.9


def test_without_patience_text_waits_for_the_top():
    stream = DrillStream(BYTES)
    mix = MixStream({"text": Echo(), "drill": Echo()}, {"text": 0.02, "drill": 0.98})
    climb(Copier(False), stream, mix, {"text": 0.9, "drill": 0.1})
    assert mix.weights["text"] == 0.02


def test_what_all_ranks_measured_decides_how_far_the_ladder_is_climbed(monkeypatch):
    right = iter([9, 8, 9, 9, 9, 1, 5])  # of copying and lookup, level by level, and of recall at the end
    monkeypatch.setattr(drills, "over_ranks", lambda fn, items: [(next(right), 9), (0, 1)])
    stream = DrillStream(BYTES)
    assert climb(Copier(False), stream)["level"] == stream.level == 3
