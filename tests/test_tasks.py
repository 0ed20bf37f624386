"""Tasks and streams: what is drawn, how often, in which order; the factbook's questions, cloze items, chat pairs."""

import json
import re
from collections import Counter

import pytest
import torch

from nanochat.common import UserError, write_jsonl
from nanochat.core_eval import choice_scores, multiple_choice
from nanochat.tokenizer import Tokenizer
from tasks.common import (
    ConversationStream,
    JSONLTask,
    MixStream,
    Task,
    TaskMixture,
    TaskSequence,
    answer_loss,
    check_shares,
)
from tasks.factbook import ChatPairs, FactbookQA, cloze_items, judgeable, load_queries

BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # a tokenizer without any merge
V = BYTES.vocab_size


class Letters(Task):
    """n short conversations; the answer is the name and number of the example, and the epoch."""

    def __init__(self, name: str, n: int, lengths=()):
        self.name, self.n, self.lengths = name, n, lengths

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        question = "?" * (self.lengths[i] if self.lengths else 1)
        answer = f"{self.name}{i}e{self.epoch}"
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def said(ids, mask):
    """What the assistant says in a rendered conversation."""
    return BYTES.decode_text([t for t, m in zip(ids, mask) if m and t < 256])


def answer(conversation):
    return conversation["messages"][-1]["content"]


# ----------------------------------------------------------------------------------------------------------------------
# Task, TaskMixture, TaskSequence, JSONLTask


def test_a_mixture_holds_every_example_once_in_a_seeded_order():
    tasks = [Letters("a", 5), Letters("b", 7), Letters("a", 5)]
    mixed = [answer(c) for c in map(TaskMixture(tasks, seed=3).__getitem__, range(17))]
    wanted = [answer(t[i]) for t in tasks for i in range(len(t))]
    assert len(TaskMixture(tasks)) == 17 and Counter(mixed) == Counter(wanted) and mixed != wanted
    assert mixed == [answer(c) for c in map(TaskMixture(tasks, seed=3).__getitem__, range(17))]
    assert mixed != [answer(c) for c in map(TaskMixture(tasks, seed=4).__getitem__, range(17))]


def test_a_sequence_plays_its_tasks_in_order():
    sequence = TaskSequence([Letters("a", 2), TaskSequence([Letters("b", 1), Letters("c", 2)])])
    assert [answer(sequence[i]) for i in range(len(sequence))] == ["a0e0", "a1e0", "b0e0", "c0e0", "c1e0"]


def test_the_epoch_reaches_the_tasks_of_a_mixture_of_mixtures():
    mixture = TaskMixture([TaskMixture([Letters("a", 3)])])
    mixture.epoch = 4
    assert {answer(mixture[i]) for i in range(3)} == {"a0e4", "a1e4", "a2e4"}


def test_a_task_draws_the_same_for_the_same_example_and_epoch():
    task = Letters("a", 3)
    first = task.rng(1).random()
    assert task.rng(1).random() == first != task.rng(2).random()
    task.epoch = 1
    assert task.rng(1).random() != first


def test_your_own_conversations_are_read_from_jsonl(tmp_path):
    rows = [Letters("a", 3)[i] for i in range(3)]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(json.dumps(r) for r in rows))
    task = JSONLTask(tmp_path / "mine.jsonl")
    assert [task[i] for i in range(len(task))] == rows


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 2: not valid JSON"),
        ("[]", "line 2: not a JSON object"),
        ("{}", "record 2: a conversation is"),
        (json.dumps({"messages": [USER]}), "record 2: no assistant message"),
        (json.dumps({"messages": [USER, {"role": "robot", "content": "x"}]}), "record 2: message 2: role must be"),
        (json.dumps({"messages": [{"role": "assistant", "content": 5}]}), "record 2: message 1"),
        (json.dumps({"messages": [{"role": "retrieval", "documents": [{}]}]}), "record 2: message 1"),
    ],
)
def test_a_malformed_conversation_is_named_by_its_line(tmp_path, line, message):
    (tmp_path / "mine.jsonl").write_text(json.dumps(Letters("a", 1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape("mine.jsonl")) as error:
        JSONLTask(tmp_path / "mine.jsonl")
    assert message in str(error.value)


def test_a_file_without_conversations_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no conversation"):
        JSONLTask(tmp_path / "none.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Streams


def test_every_epoch_plays_all_conversations_in_another_order():
    stream = ConversationStream(Letters("a", 20), BYTES, 50, seed=1)
    epochs = [[said(*stream.sample(20 * e + i)) for i in range(20)] for e in range(3)]
    for e, epoch in enumerate(epochs):
        assert sorted(epoch) == sorted(f"a{i}e{e}" for i in range(20))
    orders = [[a.partition("e")[0] for a in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] and stream.skipped == 0
    fresh = ConversationStream(Letters("a", 20), BYTES, 50, seed=1)  # a resumed run begins anywhere
    assert said(*fresh.sample(47)) == epochs[2][7] and said(*fresh.sample(3)) == epochs[0][3]


def test_unshuffled_conversations_come_in_order():
    stream = ConversationStream(Letters("a", 3), BYTES, 50, shuffle=False)
    assert [said(*stream.sample(i)) for i in range(4)] == ["a0e0", "a1e0", "a2e0", "a0e1"]


def test_two_streams_over_one_task_keep_their_own_epochs():
    task = Letters("a", 3)
    one, two = (ConversationStream(task, BYTES, 50, shuffle=False) for _ in range(2))
    assert said(*one.sample(0)) == "a0e0" and said(*two.sample(6)) == "a0e2" and said(*one.sample(1)) == "a1e0"


def test_conversations_that_do_not_fit_are_passed_over_and_counted():
    stream = ConversationStream(Letters("a", 4, [1, 90, 90, 1]), BYTES, 50, shuffle=False)
    assert [said(*stream.sample(i)) for i in range(5)] == ["a0e0", "a3e0", "a3e0", "a3e0", "a0e1"]
    assert stream.skipped == 3
    with pytest.raises(UserError, match="use a longer --sequence_len"):
        ConversationStream(Letters("a", 2, [90, 90]), BYTES, 50).sample(0)
    with pytest.raises(UserError, match="holds no example"):
        ConversationStream(Letters("a", 0), BYTES, 50)


class Echo:
    """sample(i) -> [i]; the state counts the samples asked for."""

    def __init__(self):
        self.asked = 0

    def sample(self, i):
        self.asked += 1
        return [i], None

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def draw(mix: MixStream, indices) -> list[tuple[str, int]]:
    """Which stream each index draws from, and the index it gets there."""
    found = []
    for i in indices:
        before = dict(mix.counts)
        ids, _ = mix.sample(i)
        found.append((next(n for n in before if mix.counts[n] > before[n]), ids[0]))
    return found


def test_a_mix_draws_by_weight_and_each_stream_in_order():
    mix = MixStream({"a": Echo(), "b": Echo(), "never": Echo()}, {"a": 3, "b": 1, "never": 0})
    drawn = draw(mix, range(2000))
    share = sum(name == "a" for name, _ in drawn) / 2000
    assert abs(share - 0.75) < 0.05  # five standard deviations of 2000 draws
    for name in ("a", "b"):
        own = [k for n, k in drawn if n == name]
        assert own == list(range(len(own)))
    assert mix.counts["never"] == 0


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_never_draw_the_same_sample(world):
    drawn = []
    for rank in range(world):
        mix = MixStream({"a": Echo(), "b": Echo()}, {"a": 0.5, "b": 0.5}, world_size=world)
        drawn += draw(mix, range(rank, 600, world))
    assert len(set(drawn)) == len(drawn) == 600
    for name in ("a", "b"):  # and little is left out: each rank counts for itself
        own = sorted(k for n, k in drawn if n == name)
        assert own[-1] < len(own) * 1.4


def test_a_mix_continues_where_its_state_was_taken():
    make = lambda: MixStream({"a": Echo(), "b": Echo()}, {"a": 0.5, "b": 0.5}, seed=2)
    mix = make()
    draw(mix, range(30))
    mix.weights = {"a": 0.9, "b": 0.1}
    state = json.loads(json.dumps(mix.state_dict()))
    other = make()
    other.load_state_dict(state)
    assert other.streams["a"].asked == mix.streams["a"].asked > 0
    assert draw(other, range(30, 90)) == draw(mix, range(30, 90))


@pytest.mark.parametrize("shares", [{"a": 1.5, "b": -0.5}, {"a": 0, "b": 0}, {"a": float("nan")}])
def test_shares_that_cannot_be_are_refused(shares):
    with pytest.raises(UserError, match="between 0 and 1"):
        MixStream(dict.fromkeys(shares, Echo()), shares)


def test_rounding_errors_of_shares_are_forgiven():
    assert check_shares({"a": 0.7, "b": 1 - 0.7 - 0.3 - 1e-16})["b"] >= 0


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_answer_loss_is_the_mean_over_what_the_assistant_says(tiny):
    task = Letters("a", 3)
    found = answer_loss(BYTES, task, "chat", n=2)(tiny)["chat_loss"]
    nats, count = 0.0, 0
    for i in range(2):
        ids, mask = BYTES.render_conversation(task[i])
        with torch.no_grad():
            logprobs = tiny(torch.tensor([ids])).log_softmax(-1)[0]
        for t in range(1, len(ids)):
            if mask[t]:
                nats, count = nats - logprobs[t - 1, ids[t]].item(), count + 1
    assert found == pytest.approx(nats / count, rel=1e-2 if tiny.compute_dtype == torch.bfloat16 else 1e-4)


def test_a_conversation_longer_than_the_context_does_not_end_the_run_that_is_evaluated(tiny):
    alone, beside = Letters("a", 1, [1]), Letters("a", 2, [1, 600])
    assert answer_loss(BYTES, beside, "chat")(tiny) == answer_loss(BYTES, alone, "chat")(tiny)


def test_a_context_too_long_loses_questions_before_the_documents_they_cite():
    docs = [{"title": f"T{n}", "content": f"fact {n} " * 12} for n in range(1, 4)]
    turns = []
    for n in (1, 2, 3):
        turns += [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"fact {n}. [{n}]"}]
    conversation = {"messages": [{"role": "retrieval", "query": "What?", "documents": docs}, *turns]}
    task = Task()
    task.examples = [conversation]
    whole = len(BYTES.render_conversation(conversation)[0])
    seen = set()
    for limit in range(whole, whole - 40, -1):
        ids, _ = ConversationStream(task, BYTES, limit).sample(0)
        text = BYTES.decode(ids)
        cited = [n for n in (1, 2, 3) if f". [{n}]" in text]
        assert len(ids) <= limit and cited and all(f"[{n}] T{n}" in text for n in cited)
        seen.add(len(cited))
    assert {3, 2} <= seen


# ----------------------------------------------------------------------------------------------------------------------
# Factbook and cloze


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_cloze_item_has_one_right_choice_that_its_context_does_not_tell(split, documents):
    items = cloze_items(split, 300)
    texts = "\n".join(d["content"] for d in documents.values() if d["split"] == split)
    assert len(items) == 300
    for item in items:
        right = item["choices"][item["gold"]]
        assert len(set(item["choices"])) == 4 and right not in item["context"]
        told = f"{item['context']} {right}"
        assert told in texts and not re.search(r"[.]\s*$", item["context"])
        behind = texts[texts.index(told) + len(told) :][:2]
        assert not re.match(r"\w|[.,]\d", behind), f"the answer is cut out of a longer one: {right}{behind}"
    assert min(Counter(item["gold"] for item in items).values()) > 40  # 75 of 300 each, less five deviations
    if split == "val":  # its file is small
        assert items == cloze_items(split, 300) != cloze_items(split, 300, seed=1)


def test_the_likelier_choice_is_chosen_and_length_is_no_advantage(tiny):
    context, choices = "The capital of Peru is", ["Lima", "Quito and some more", "X"]
    found = choice_scores(tiny, BYTES, context, choices)
    for choice, score in zip(choices, found):  # one by one, without padding
        prefix, tail = [BYTES.bos, *BYTES.encode(context)], BYTES.encode(" " + choice)
        with torch.no_grad():
            logprobs = tiny(torch.tensor([prefix + tail])).log_softmax(-1)[0]
        alone = sum(logprobs[len(prefix) + k - 1, t].item() for k, t in enumerate(tail)) / len(tail)
        assert score == pytest.approx(alone, rel=1e-2 if tiny.compute_dtype == torch.bfloat16 else 1e-4)
    best = max(range(3), key=found.__getitem__)
    items = [{"context": context, "choices": choices, "gold": g} for g in range(3)]
    assert [multiple_choice(tiny, BYTES, [item]) for item in items] == [float(g == best) for g in range(3)]


def test_closed_book_questions_and_chat_pairs_are_disjoint_between_splits():
    train, val = FactbookQA("train"), FactbookQA("val")
    assert not {r["country"] for r in train.rows} & {r["country"] for r in val.rows}
    query, reply = (m["content"] for m in train[5]["messages"])
    assert query in [train.rows[5]["query"], *train.rows[5]["paraphrases"]] and reply == train.rows[5]["answer"] + "."
    chat = {split: [json.dumps(e) for e in ChatPairs(split).examples] for split in ("train", "val")}
    assert len(chat["train"]) > 15 * len(chat["val"]) > 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "query": "q?"}, "line 1: no field 'answer'"),
        ({"id": "a", "query": 5, "answer": "x"}, "record 1: 'id', 'query' and 'answer' must be text"),
        ({"id": "a", "query": "q?", "answer": 5}, "record 1: 'id', 'query' and 'answer'"),
        ({"id": "a", "query": "q?", "answer": "x", "positive_ids": "d"}, "record 1: 'positive_ids' must be a list"),
        ({"id": "a", "query": "q?", "answer": "x", "answers": "x"}, "record 1: 'answers' must be a list"),
        ({"id": "a", "query": "q?", "answer": "x", "paraphrases": [1]}, "record 1: 'paraphrases' must be a list"),
        ({"id": "a", "query": "q?", "answer": "x", "hops": "1"}, "record 1: 'hops' must be"),
        ({"id": "a", "query": " ", "answer": "x"}, "record 1: 'query' is empty"),
        ({"id": "a", "query": "q?", "answer": "x", "type": "weird"}, "record 1: the type 'weird'; choose single, two_"),
        ({"id": "a", "query": "q?", "answer": None}, "record 1: 'id', 'query' and 'answer'"),
        ({"id": "a", "query": "q?", "answer": "x", "country": 5}, "record 1: 'country' must be text"),
        ({"id": "a", "query": "q?", "answer": "x", "relation": ["r"]}, "record 1: 'relation' must be text"),
    ],
)
def test_malformed_questions_are_named_by_their_line(tmp_path, row, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=re.escape(message)):
        load_queries(tmp_path / "q.jsonl")


def test_every_question_has_an_id_of_its_own(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "query": f"{n}?", "answer": "x"} for n in range(2)])
    with pytest.raises(UserError, match="record 2: another question has the id 'a'"):
        load_queries(tmp_path / "q.jsonl")


def test_questions_are_judged_where_their_documents_are():
    row = {"type": "single", "positive_ids": ["a"]}
    rows = [row, row | {"positive_ids": []}, row | {"positive_ids": ["z"]}, row | {"type": "two_hop"},
            {"type": "two_hop", "positive_ids": ["a", "b"]}, {"type": "unanswerable", "positive_ids": []}]  # fmt: skip
    assert judgeable(rows, {"a", "b"}) == [rows[0], rows[4], rows[5]]


def test_a_question_needs_only_id_query_and_answer(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": "a", "query": "q?", "answer": "x", "answers": [], "country": null}')
    [row] = load_queries(tmp_path / "q.jsonl")
    assert (row["answers"], row["positive_ids"], row["hops"], row["type"]) == (["x"], [], 1, "single")
    for given in ({"hops": 2}, {"type": "two_hop"}):  # one tells the other
        write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "query": "q?", "answer": "x"} | given])
        [row] = load_queries(tmp_path / "q.jsonl")
        assert (row["hops"], row["type"]) == (2, "two_hop")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no question"):
        load_queries(tmp_path / "none.jsonl")
