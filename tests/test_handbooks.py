"""The handbooks that ship with the repo hold what they should, and exchanged names and numbers stay consistent."""

import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat.common import DATA, UserError, read_jsonl
from nanochat.rag_utils import ABSTENTION, extract_citations, strip_citations
from tasks.common import whole_word
from tasks.fiction_words import SPLITS
from tasks.handbooks import Config, HandbookTask, disguise, load_handbooks, main
from tasks.rag_task import RAGMix

TEXT = """=== Lamp Hill Library
--- Rules
Books may be kept for 21 days. Loans are renewed by Ms Ida Korn at desk 4.
Q: How long may books be kept? || For what time can I keep a book?
A: 21 days || 21
N: How many books may be kept?
--- Ida Korn
Ida Korn came to Lamp Hill in 1988 from Dorrim.
H: Where did she who renews loans come from?
A: Dorrim
F: Rules + Ida Korn
"""


@pytest.fixture(scope="module")
def books():
    return {split: load_handbooks(split) for split in SPLITS}


def write(tmp_path, text: str):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    return tmp_path


def in_some_split(tmp_path, text: str):
    """The name decides about the split; this one's is found by trying."""
    for split in SPLITS:
        try:
            return load_handbooks(split, write(tmp_path, text))
        except UserError as e:
            if "no handbook" not in str(e):
                raise
    raise AssertionError


def test_a_file_is_read(tmp_path):
    read = in_some_split(tmp_path, TEXT)
    assert [doc["title"] for doc in read.documents.values()] == ["Rules", "Ida Korn"]
    asked, missing, two = read.queries
    assert (asked["answers"], asked["type"], asked["positive_ids"]) == (["21 days", "21"], "single", asked["about_ids"])
    assert (missing["answer"], missing["type"], missing["positive_ids"]) == (ABSTENTION, "unanswerable", [])
    assert missing["about_ids"] == asked["about_ids"]
    assert (two["hops"], two["positive_ids"]) == (2, list(read.documents))


def test_a_line_that_is_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"one.txt, line 4: neither"):
        in_some_split(tmp_path, TEXT.replace("\nQ: How", "\nOh, and\nQ: How"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("--- Rules\n", "", "neither a title"),
        ("A: 21 days || 21\n", "", "lacks its answer"),
        ("F: Rules + Ida Korn\n", "", "lacks its answer"),
        ("Rules + Ida Korn", "Rules + Ida Horn", "a title that isn't there"),
        ("N: How many books may be kept?\n", "N: How many?\nA: two\n", "lacks its answer"),
        ("--- Ida Korn", "--- Rules", "another document of this title"),
    ],
)
def test_what_is_missing_in_a_handbook_is_an_error(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        in_some_split(tmp_path, TEXT.replace(old, new, 1))


def test_text_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"=== Caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        load_handbooks("train", tmp_path)


def test_an_unknown_split_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="choose train, val or test"):
        load_handbooks("dev")
    with pytest.raises(UserError, match="no handbook of the split val"):
        load_handbooks("val", tmp_path)


def test_every_answer_stands_in_its_document(books):
    for split in SPLITS:
        for row in books[split].queries:
            told = [books[split].documents[p]["content"] for p in row["positive_ids"]]
            assert (row["answer"] == ABSTENTION) == (row["type"] == "unanswerable")
            holds = [bool(whole_word(row["answer"]).search(text)) for text in told]
            assert not told or any(holds), row
            assert row["hops"] == 1 or not all(holds), row  # else one document would do
            assert len({q.lower() for q in (row["query"], *row["paraphrases"])}) == 1 + len(row["paraphrases"])


def test_splits_share_no_handbook_and_none_is_small(books):
    names = {split: {doc["source"] for doc in books[split].documents.values()} for split in SPLITS}
    assert not names["train"] & names["val"] and not names["val"] & names["test"] and not names["train"] & names["test"]
    for split in SPLITS:
        for name in names[split]:
            assert sum(doc["source"] == name for doc in books[split].documents.values()) == 10, name


def test_no_handbook_is_about_the_museum(books):
    """data/museum is to be new to the model."""
    told = " ".join(doc["content"] for split in SPLITS for doc in books[split].documents.values())
    names = {
        name
        for doc in read_jsonl(DATA / "museum" / "documents.jsonl")
        for name in re.findall(r"(?<=[a-z] )[A-Z][a-z]+ [A-Z][a-z]+", doc["content"])
    }
    assert len(names) > 10 and {name for name in names if name in told} <= {
        "Rope Walk",
        "Chapel Street",
    }  # every town has one


def test_exchanged_answers_stand_in_what_they_cite(books):
    mix = RAGMix(absent=0.2, paired=0.5, counterfactual=1.0, follow_up=1.0, max_docs=2)
    task = HandbookTask(books["train"].queries, books["train"].documents, mix)
    answered = changed = 0
    for i in range(0, len(task), max(1, len(task) // 300)):
        messages = task[i]["messages"]
        shown = {doc.get("number", n): doc for n, doc in enumerate(messages[0]["documents"], 1)}
        changed += any(doc["content"] != books["train"].documents[doc["id"]]["content"] for doc in shown.values())
        for m in messages:
            if m["role"] == "assistant" and m["content"] != ABSTENTION:
                answered += 1
                told = " ".join(shown[c]["content"] for c in extract_citations(m["content"]))
                assert strip_citations(m["content"]).rstrip(".") in told
    assert answered > 300 and changed > 250


def test_what_nothing_answers_is_asked_over_the_document_it_is_about(books):
    rows = [row for row in books["train"].queries if row["type"] == "unanswerable"]
    task = HandbookTask(rows, books["train"].documents, RAGMix(counterfactual=0, follow_up=0, max_docs=1))
    messages = task[0]["messages"]
    assert [doc["id"] for doc in messages[0]["documents"]] == rows[0]["about_ids"]
    assert messages[-1]["content"] == ABSTENTION


@given(st.text(alphabet="aB1 .Korn,Ida2", max_size=60), st.integers(0, 5))
@example("11B.11", 0)
def test_disguise_keeps_what_is_one_one_and_what_is_two_two(text, seed):
    swap = disguise(text, random.Random(seed))
    number = r"(?<![A-Za-z\d])\d+(?![A-Za-z\d])"  # what is part of a word, "11B", stays
    before, after = re.findall(number, text), re.findall(number, swap(text))
    assert [len(n) for n in after] == [len(n) for n in before]
    long = {pair for pair in zip(before, after) if len(pair[0]) > 1}
    assert len(long) == len({b for b, _ in long}) == len({a for _, a in long})
    names = set(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b", text)) & {"Korn", "Ida"}
    assert len({swap(name) for name in names}) == len(names)


def test_disguise_leaves_words_that_only_begin_something():
    text = "She sang in the opera, The Bell. The bell rang in Dorrim."
    assert re.fullmatch(
        r"She sang in the opera, The Bell. The bell rang in \w+.", disguise(text, random.Random(0))(text)
    )


def test_disguise_exchanges_names_and_numbers():
    text = "In 1968 the mayor, Ida Korn, paid 9.50 crowns on Monday. Korn left."
    told = disguise(text, random.Random(0))(text)
    assert not re.search(r"Ida|Korn|9\.50", told) and "Monday" in told and re.search(r"In 19\d\d the mayor", told)
    first, last = re.search(r"mayor, \w+ (\w+), .*\. (\w+) left", told).groups()
    assert first == last


def test_a_split_can_be_written_out(tmp_path):
    main(Config(split="val", output=str(tmp_path)))
    assert list(read_jsonl(tmp_path / "documents.jsonl")) == list(load_handbooks("val").documents.values())
    assert list(read_jsonl(tmp_path / "queries" / "val.jsonl")) == load_handbooks("val").queries
    with pytest.raises(UserError, match="--output"):
        main(Config())


def test_two_documents_of_a_handbook_stay_whole(books):
    books = books["train"]
    two = [r for r in books.queries if r["hops"] > 1]
    mix = RAGMix(absent=0, counterfactual=0, follow_up=0, min_docs=3, max_docs=3, sentences=1)
    cut = 0
    for row, talk in zip(two, HandbookTask(two, books.documents, mix, others=books.queries), strict=True):
        for doc in talk["messages"][0]["documents"]:  # which sentence leads to the other one isn't known
            whole = doc["content"] == books.documents[doc["id"]]["content"]
            assert whole or doc["id"] not in row["positive_ids"]
            cut += not whole
    assert cut > len(two) / 2
