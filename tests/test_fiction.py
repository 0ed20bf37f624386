"""The invented world: every answer stands where it is cited, splits share nothing, and RAGTask takes it as it is."""

import json
import re
import zlib
from collections import Counter

import pytest

from nanochat.common import UserError, read_jsonl
from nanochat.config import run
from nanochat.documents import read_documents
from nanochat.rag_utils import ABSTENTION, is_supported
from tasks.common import whole_word
from tasks.factbook import FACTBOOK, load_queries
from tasks.fiction import Config, main, make_world
from tasks.fiction_words import KINDS, PHRASES, RELATIONS, SPLITS
from tasks.rag_task import FRAMES, SOURCES, VERBS, RAGMix, RAGTask

CHECKSUM = 2295701796  # of make_world("test", 20, seed=0)
WORLDS = {split: make_world(split, 300, seed=1) for split in SPLITS}


def rows(*types):
    return [(world, row) for world in WORLDS.values() for row in world.queries if row["type"] in types]


def test_same_arguments_same_world_and_other_seed_other_world():
    assert make_world("val", 40, seed=3) == make_world("val", 40, seed=3) != make_world("val", 40, seed=4)
    assert make_world("test", 1).documents and make_world("val", 3).queries


def test_this_world_on_every_platform():
    """Python's random is the same everywhere; if this changes, so has the data of everyone who trained on it."""
    world = make_world("test", 20, seed=0)
    assert len(world.queries) == len({row["id"] for row in world.queries}) and len(world.documents) >= 20
    made = json.dumps([world.documents, world.queries, world.contradictions])
    assert zlib.crc32(made.encode()) == CHECKSUM, "data/fiction or the grammar has changed: set CHECKSUM anew"


def test_bad_arguments_are_named():
    for arguments, message in ((("dev", 9), "choose train, val or test"), (("val", 0), "at least 1")):
        with pytest.raises(UserError, match=message):
            make_world(*arguments)


def test_documents_have_the_agreed_form():
    for split, world in WORLDS.items():
        assert {doc["section"] for doc in world.documents.values()} == set(KINDS)
        for key, doc in world.documents.items():
            assert key == doc["id"] and doc["source"] == "fiction" and doc["split"] == split
            assert doc["entity"] == doc["country"] and doc["entity"] in doc["title"]
            assert 60 <= len(doc["content"].split()) <= 160, doc
            assert not re.search(r"[{}|]| {2}|\.\.|\b([a-z]+) \1\b", doc["content"]), doc["content"]
            assert all(s[0].isupper() or s[0].isdigit() for s in re.split(r"(?<=[.]) ", doc["content"])), doc["content"]
        told = Counter(p for row in world.queries if row["type"] == "single" for p in row["positive_ids"])
        assert min(told.values()) >= 6 and max(told.values()) <= 12
        assert 1.1 * 300 < len(world.documents) < 1.5 * 300


def test_answers_stand_where_they_are_cited_and_nowhere_twice():
    for world, row in rows("single"):
        for p in row["positive_ids"]:
            doc = world.documents[p]
            assert whole_word(row["answer"]).search(doc["content"]), (row, doc)
            assert is_supported(row["answer"], [doc]) and row["country"] in doc["title"] + doc["content"]
        assert row["answer"] == row["answers"][0] and row["answer"] not in row["query"]


def test_a_document_tells_each_of_its_values_about_one_thing():
    """Two facts with one value would make a question about either look answered by the other."""
    for world in WORLDS.values():
        seen = Counter(
            (p, row["answer"]) for row in world.queries if row["type"] == "single" for p in row["positive_ids"]
        )
        assert max(seen.values()) == 1


def test_two_hop_questions_lead_from_one_document_to_another():
    for world, row in rows("two_hop"):
        first, second = (world.documents[p] for p in row["positive_ids"])
        assert first["entity"] != second["entity"] and row["hops"] == 2
        assert row["country"] == first["entity"] and row["bridge"] == second["entity"]
        assert is_supported(row["answer"], [first, second]) and row["country"] in row["query"]
        if row["bridge_relation"] != "compare":
            assert row["bridge"] in first["content"] and row["bridge"] not in row["query"]
            assert is_supported(row["answer"], [second])


def size(text: str) -> tuple:
    """How large a value is, or how late a date: "4 February 1837" -> (1837, 2, 4), "1.2 km" -> (1.2,)."""
    months = "January February March April May June July August September October November December".split()
    if month := next((m for m in months if m in text), ""):
        day, year = re.findall(r"\d+", text)
        return int(year), months.index(month), int(day)
    [number] = re.findall(r"[\d,]+(?:\.\d+)?", text)
    return (float(number.replace(",", "")),)


def test_what_wins_a_comparison_is_what_the_documents_say_does():
    earlier = {"founded", "born", "launched", "appeared", "effective", "deadline"}
    seen = Counter()
    for world in WORLDS.values():
        told = {(row["country"], row["relation"]): row for row in world.queries if row["type"] == "single"}
        for row in world.queries:
            if row.get("bridge_relation") != "compare":
                continue
            both = [told[name, row["relation"]] for name in (row["country"], row["bridge"])]
            assert row["positive_ids"] == [one["positive_ids"][0] for one in both]
            x, y = (size(one["answer"]) for one in both)
            wins = row["country"] if (x < y) == (row["relation"] in earlier) else row["bridge"]
            assert x != y and wins in row["answers"], row
            seen[row["relation"] in earlier, row["relation"]] += 1
    assert len(seen) >= 8 and len({early for early, _ in seen}) == 2


def test_unanswerable_questions_are_about_what_nothing_tells():
    told = {(row["country"], row["relation"]) for _, row in rows("single")}
    entities = {doc["entity"] for world in WORLDS.values() for doc in world.documents.values()}
    for _, row in rows("unanswerable"):
        assert row["answers"] == [ABSTENTION] and not row["positive_ids"]
        assert (row["country"], row["relation"]) not in told
        about = [doc for world in WORLDS.values() for i in row["about_ids"] if (doc := world.documents.get(i))]
        assert all(row["country"] in doc["title"] + doc["content"] for doc in about)
        assert bool(about) == (row["reason"] == "missing_field") and (about or row["country"] not in entities)


def test_rows_have_the_fields_of_the_factbook():
    for split in ("train", "test"):
        ours, theirs = {}, {}
        for found, given in ((ours, WORLDS[split].queries), (theirs, load_queries(split))):
            for row in given:
                found.setdefault(row["type"], set()).add(frozenset(row))
        for type in theirs:
            more = {"about_ids"} if type == "unanswerable" else set()
            assert ours[type] == {frozenset.union(*theirs[type]) | more}, type
    theirs = next(read_jsonl(FACTBOOK / "queries" / "contradictions.jsonl"))
    for world in WORLDS.values():
        for row in world.contradictions:
            assert row.keys() == theirs.keys()
            for side in ("old", "new"):
                assert row[side].keys() == theirs[side].keys() and row[side]["date"] in row[side]["passage"]
                assert row[side]["answer"] in row[side]["passage_undated"] in row[side]["passage"]
            assert row["old"]["date"] < row["new"]["date"] and row["old"]["answer"] not in row["new"]["passage_undated"]
            assert is_supported(row["new"]["answer"], [world.documents[row["new"]["doc_ids"][0]]])


def test_splits_share_no_invented_word():
    known = {w for name in ("male", "female") for w in PHRASES[name].seen[0].split()}
    known |= {w for kind in KINDS.values() for name in kind.names for w in re.findall(r"\w+", name)}
    words = {}
    for split, world in WORLDS.items():
        named = {doc["entity"] for doc in world.documents.values()} | {row["country"] for row in world.queries}
        named |= {row["bridge"] for row in world.queries if row["type"] == "two_hop"}
        words[split] = {w for name in named for w in re.findall(r"[A-Z][a-z]{4,}", name)} - known - {"Visit"}
        words[split] = {re.sub("(Sync|Desk|mini)$", "", w) for w in words[split]}
        assert len(words[split]) > 200
    assert not words["train"] & (words["val"] | words["test"]) and not words["val"] & words["test"]


def test_wordings_kept_for_evaluation_never_occur_in_training():
    def shape(query, row):
        for name in sorted({row["country"], row.get("bridge", "")} - {""}, key=len, reverse=True):
            query = query.replace(name, "_")
        return query

    trained = {shape(q, r) for r in WORLDS["train"].queries for q in (r["query"], *r["paraphrases"])}
    for split in ("val", "test"):
        held = [r for r in WORLDS[split].queries if r["wording"] == "held_out"]
        assert 0.2 < len(held) / len(WORLDS[split].queries) < 0.4
        assert not trained & {shape(r["query"], r) for r in held}
        assert {doc["wording"] for doc in WORLDS[split].documents.values()} == {"seen", "held_out"}
    assert not any("wording" in row for row in [*WORLDS["train"].queries, *WORLDS["train"].documents.values()])
    ours = {q for r in RELATIONS.values() for q in r.asks.held} | set(PHRASES["ask"].held + PHRASES["who"].held)
    made_up = {f.replace("{src}", src).replace("{verb}", verb) for f in FRAMES for src in SOURCES for verb in VERBS}
    assert len(made_up) > len(FRAMES) and not ours & made_up  # a wording that RAGTask makes up for training
    extra = {q.replace("{c}", "_") for r in RELATIONS.values() for q in r.asks.more}
    asked = {split: {shape(r["query"], r) for r in WORLDS[split].queries} for split in SPLITS}
    assert len(asked["train"] & extra) > 50 and not (asked["val"] | asked["test"]) & extra
    asked = " ".join(q for r in RELATIONS.values() for q in r.asks.seen + r.asks.more)
    assert "What do the documents give" not in asked and "Please look up" not in asked  # kept by the factbook


def test_the_tables_have_wordings_enough():
    assert len(KINDS) >= 14
    for kind in KINDS.values():
        assert (
            len(kind.relations) >= 9
            and min(len(kind.openers.seen), len(kind.fillers.seen), len(kind.fillers.held)) >= 1
        )
    for r in RELATIONS.values():
        assert any(r.name in kind.relations for kind in KINDS.values()), f"no kind has {r.name}"
        assert len(set(r.asks.seen)) >= 4 and len(set(r.says.seen)) >= 3 and r.asks.held and r.says.held, r.name
        assert len({*r.asks.more} - {*r.asks.seen, *r.asks.held}) == 3 and all("{c}" in q for q in r.asks.more), r.name
        assert not set(r.asks.seen) & set(r.asks.held) and not set(r.says.seen) & set(r.says.held)
        assert all("{c}" in q for q in r.asks.seen + r.asks.held) and all("{v}" in s for s in r.says.seen + r.says.held)
        assert all(any("{c" not in s.lower() for s in says) for says in (r.says.seen, r.says.held)), r.name


def test_rag_task_takes_the_world_as_it_is():
    world = WORLDS["train"]
    mix = RAGMix(paired=0.3, counterfactual=0.5, reword=0.3, sentences=4)
    task, answers = RAGTask(world.queries, world.documents, mix), Counter()
    assert len(task) == len(world.queries)
    for i in range(0, len(task), 11):
        for m in task[i]["messages"]:
            if m["role"] == "assistant":
                answers[m["content"] == ABSTENTION] += 1
    assert 0.2 < answers[True] / answers.total() < 0.7


def test_command_line_writes_what_the_other_commands_read(tmp_path, capsys):
    run(main, Config, ["--split", "val", "--output", str(tmp_path / "w"), "--n_entities", "30", "--seed", "2"])
    world = make_world("val", 30, seed=2)
    assert "questions" in capsys.readouterr().out
    assert [d.id for d in read_documents(tmp_path / "w" / "documents.jsonl")] == list(world.documents)
    assert load_queries(tmp_path / "w" / "queries" / "val.jsonl") == world.queries
    assert list(read_jsonl(tmp_path / "w" / "queries" / "contradictions.jsonl")) == world.contradictions
    for flags in ([], ["--output", str(tmp_path), "--split", "dev"], ["--output", str(tmp_path), "--n_entities", "0"]):
        with pytest.raises(SystemExit):
            run(main, Config, flags)
        assert "error:" in capsys.readouterr().err
