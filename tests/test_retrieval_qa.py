"""Public data sets in our format, and questions with what retrieval finds: every answer stands in what it cites."""

import json
import re
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError, read_jsonl
from nanochat.documents import read_documents
from nanochat.rag_utils import ABSTENTION
from nanochat.retrieval import build_kb
from tasks.factbook import load_documents, load_queries
from tasks.rag_task import MultiHopRAGTask, RAGMix, RAGTask
from tasks.retrieval_qa import Config, RetrievalQA, load_hotpot, load_natural_questions, load_squad2, main

OWLS = "Owls hunt at night. The largest owl is Blakiston's fish owl."
ELMS = "Elms are trees. A disease spread by beetles has killed most elms in Europe since 1910."


def qa(id, question, *answers):
    found = [{"text": a, "answer_start": (OWLS + ELMS).find(a)} for a in answers]
    return {"id": id, "question": question, "answers": found, "is_impossible": not answers}


SQUAD = {"version": "v2.0", "data": [
    {"title": "Night_birds", "paragraphs": [{"context": OWLS, "qas": [
        qa("s1", "When do owls hunt?", "night", "at night", "night"), qa("s2", "When do owls sleep?")]}]},
    {"title": "Trees", "paragraphs": [{"context": ELMS, "qas": [qa("s3", "Which insects kill elms?", "beetles")]}]},
]}  # fmt: skip
FILM = ["The Kestrel is a 1969 film.", " It was directed by Ann Orr."]
ORR = ["Ann Orr (born 1930 in Leeds) directs films."]
HOTPOT = [
    {"_id": "h1", "question": "Where was the director of The Kestrel born?", "answer": "Leeds", "type": "bridge",
     "supporting_facts": [["Ann Orr (director)", 0], ["The Kestrel", 1], ["The Kestrel", 0]],
     "context": [["Ann Orr (director)", ORR], ["Owls", [OWLS]], ["The Kestrel", FILM]], "level": "hard"},
    {"_id": "h2", "question": "Which is older, The Kestrel or Elms?", "answer": "Elms", "type": "comparison",
     "supporting_facts": [["The Kestrel", 0], ["Elms", 0]], "context": [["The Kestrel", FILM], ["Elms", [ELMS]]]},
    {"_id": "h3", "question": "Are both films?", "answer": "no", "type": "comparison",
     "supporting_facts": [["The Kestrel", 0], ["Elms", 0]], "context": [["The Kestrel", FILM], ["Elms", [ELMS]]]},
]  # fmt: skip
PAGE = "Owl - Wikipedia <H1> Owl </H1> <P> Owls ( birds ) hunt at night . </P> <Table> <P> 7 </P> </Table>"
PAGE = (PAGE + " <P> They fly . </P>").split(" ")
STARTS = [n for n, token in enumerate(PAGE) if token in ("<P>", "<Table>")]
NOTHING = {"start_token": -1, "end_token": -1, "candidate_index": -1}


def span(first, last, start=0):
    """The place of words in the page, both included."""
    at = PAGE.index(first, start)
    return {"start_token": at, "end_token": PAGE.index(last, at) + 1}


def annotation(long, *short):
    return {"long_answer": long, "short_answers": list(short), "yes_no_answer": "NONE"}


FIRST, THEY = span("<P>", "</P>"), span("<P>", "</P>", STARTS[-1])
CANDIDATES = [FIRST | {"top_level": True}, span("<Table>", "</Table>") | {"top_level": True},
              span("<P>", "</P>", STARTS[1]) | {"top_level": False}, THEY | {"top_level": True}]  # fmt: skip
NIGHT, WHEN = span("night", "night"), span("at", "night")
ANNOTATIONS = {
    "n1": [annotation(NOTHING), annotation(FIRST, NIGHT), annotation(FIRST, WHEN)],
    "n2": [annotation(NOTHING)],
    "n3": [annotation(FIRST)],  # a long answer only
    "n4": [annotation(FIRST, NIGHT, span("birds", "birds"))],  # a list
    "n5": [annotation(span("<Table>", "</Table>"), span("7", "7"))],
}
NQ = [
    {"example_id": id, "question_text": f"{id} when do owls hunt", "document_text": " ".join(PAGE),
     "long_answer_candidates": CANDIDATES, "annotations": found}
    for id, found in ANNOTATIONS.items()
]  # fmt: skip


def columns(records):
    """A list of records as the hub writes it: a record of lists."""
    return {key: [r[key] for r in records] for key in records[0]} if records else {"start_token": [], "end_token": []}


def of_the_hub(row):
    """A row in the hub's form."""
    if "annotations" in row:
        found = [{**a, "short_answers": columns(a["short_answers"])} for a in row["annotations"]]
        return {
            "id": row["example_id"],
            "question": {"text": row["question_text"]},
            "document": {"title": "Owl", "tokens": {"token": PAGE, "is_html": [t[0] == "<" for t in PAGE]}},
            "long_answer_candidates": columns(row["long_answer_candidates"]),
            "annotations": columns(found),
        }
    if "_id" in row:
        context = dict(zip(("title", "sentences"), map(list, zip(*row["context"]))))
        facts = dict(zip(("title", "sent_id"), map(list, zip(*row["supporting_facts"]))))
        return {**row, "id": row["_id"], "context": context, "supporting_facts": facts, "level": ""}
    texts = [a["text"] for a in row["answers"]]
    return {**row, "answers": {"text": texts, "answer_start": [a["answer_start"] for a in row["answers"]]}}


FLAT = [{**qa, "title": a["title"], "context": p["context"]}
        for a in SQUAD["data"] for p in a["paragraphs"] for qa in p["qas"]]  # fmt: skip
LOADERS = {"squad2": (load_squad2, SQUAD, FLAT), "hotpot": (load_hotpot, HOTPOT, HOTPOT),
           "nq": (load_natural_questions, NQ, NQ)}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(rows, suffix):
        path = tmp_path / f"rows{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
        return path

    return write


def test_squad_gives_paragraphs_and_questions_with_all_accepted_answers(write):
    documents, rows = load_squad2(write(SQUAD, ".json"), split="val")
    owls, elms = documents.values()
    assert (owls["title"], owls["content"], owls["split"]) == ("Night birds", OWLS, "val")
    assert [r["type"] for r in rows] == ["single", "unanswerable", "single"] and rows[2]["positive_ids"] == [elms["id"]]
    assert rows[0]["answer"] == "night" and rows[0]["answers"] == ["night", "at night"]
    assert rows[0]["positive_ids"] == [owls["id"]]
    assert (rows[1]["answer"], rows[1]["positive_ids"], rows[1]["hops"]) == (ABSTENTION, [], 1)


def test_of_two_hops_the_document_that_names_the_other_comes_first(write):
    documents, rows = load_hotpot(write(HOTPOT, ".json"))
    first, second = ([documents[p]["title"] for p in r["positive_ids"]] for r in rows)
    assert first == ["The Kestrel", "Ann Orr (director)"] and second == ["The Kestrel", "Elms"]
    assert [r["bridge"] for r in rows] == ["Ann Orr", "Elms"] and rows[1]["bridge_relation"] == "compare"
    assert {(r["type"], r["hops"]) for r in rows} == {("two_hop", 2)} and len(documents) == 4
    assert documents[rows[0]["positive_ids"][0]]["content"] == "".join(FILM)


def test_natural_questions_give_the_paragraphs_of_a_page_as_prose(write):
    documents, rows = load_natural_questions(write(NQ, ".jsonl"))
    assert [r["id"] for r in rows] == ["n1", "n2"]  # lists, tables and whole paragraphs are no short answers
    assert {d["title"] for d in documents.values()} == {"Owl"}
    assert [d["content"] for d in documents.values()] == ["Owls (birds) hunt at night.", "They fly."]
    assert rows[0]["answers"] == ["night", "at night"] and rows[0]["positive_ids"] == list(documents)[:1]
    assert rows[1]["type"] == "unanswerable"
    full = [{**{k: v for k, v in r.items() if k != "document_text"}, "document_title": "Owl",
             "document_tokens": [{"token": t, "html_token": t[0] == "<"} for t in PAGE]} for r in NQ]  # fmt: skip
    assert load_natural_questions(write(full, ".jsonl")) == (documents, rows)


@pytest.mark.parametrize("name", LOADERS)
def test_rows_of_the_hub_give_the_same_in_every_file_and_from_the_hub_itself(write, monkeypatch, name):
    loader, own, flat = LOADERS[name]
    wanted, rows, asked = loader(write(own, ".jsonl" if name == "nq" else ".json")), [of_the_hub(r) for r in flat], []
    for suffix in (".json", ".jsonl", ".parquet"):
        assert loader(write(rows, suffix)) == wanted
    hub = SimpleNamespace(load_dataset=lambda *hub, **how: asked.append((hub, how)) or iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert loader() == wanted and asked[0][1]["split"] == "validation"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets.*--file"):
        loader()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("squad2", {"context": None}, "row 2: .*None is not text"),
        ("squad2", {"question": 5}, "row 2: .*5 is not text"),
        ("squad2", {"answers": {"text": ["a", "b"], "answer_start": [1]}}, "row 2: not in the format of squad2"),
        ("squad2", {"id": "s1"}, "row 2: .*s1 has been used"),
        ("hotpot", {"supporting_facts": [["Nobody", 0]]}, "row 2: .*no field 'Nobody'"),
        ("hotpot", {"context": [["The Kestrel"]]}, "row 2: not in the format of hotpot"),
        ("nq", {"annotations": [{}]}, "row 2: .*no field 'long_answer'"),
        ("nq", {"annotations": [annotation({"start_token": 9999, "end_token": 10000}, NIGHT)]}, "row 2: not in"),
        ("nq", {"question_text": None}, "row 2: .*no field 'question'"),
    ],
)
def test_a_malformed_row_is_named_by_its_number(write, name, change, says):
    loader, _, rows = LOADERS[name]
    with pytest.raises(UserError, match=says):
        loader(write([rows[0], {**rows[1], **change}], ".jsonl"))


def test_files_that_hold_no_rows_say_so(write, tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "bad.parquet").write_text("PAR")
    for path, says in [
        ("x.csv", "give a .json, .jsonl or .parquet file"),
        ("none.json", "cannot read"),
        ("bad.parquet", "not a readable parquet file"),
        ({"rows": []}, "neither a list of rows"),
        ([], "no question to use"),
        ([3], "row 1: not in the format"),
        ({"data": [{"paragraphs": 3}]}, "row 1: not in the format"),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            load_squad2(tmp_path / path if isinstance(path, str) else write(path, ".json"))


def test_the_command_writes_splits_that_knowledge_base_and_tasks_take(write, tmp_path, capsys):
    file, out = str(write(FLAT, ".jsonl")), tmp_path / "out"
    make = lambda **more: main(Config(**{"dataset": "squad2", "file": file, "output": str(out), **more}))
    make(split="train", max_examples=1)
    make(split="test", skip=1)  # the owls are now both splits'
    assert "2 documents, 2 questions for test" in capsys.readouterr().out
    make(split="train", max_examples=1)  # again: nothing changes
    splits = {d.title: d.metadata.get("split") for d in read_documents(out / "documents.jsonl")}
    assert splits == {"Night birds": None, "Trees": "test"}
    assert [len(list(read_jsonl(out / "queries" / f"{s}.jsonl"))) for s in ("train", "test")] == [1, 2]

    make(dataset="hotpot", file=str(write(HOTPOT, ".json")), split="test")
    documents, rows = load_documents(out / "documents.jsonl"), load_queries(out / "queries" / "test.jsonl")
    always = RAGMix(absent=0, counterfactual=0, follow_up=0)
    assert RAGTask(rows, documents, always)[0]["messages"][-1]["content"].startswith("Leeds. [")
    searches = MultiHopRAGTask(rows, documents, always)[0]["messages"][:2]
    assert [m["query"] for m in searches] == ["Where was the director of The Kestrel born?", "Ann Orr"]

    for change, says in [({"dataset": "squad"}, "choose squad2, hotpot, nq"), ({"output": ""}, "--output"),
                         ({"split": "dev"}, "choose train, val or test"), ({"skip": -1}, "at least 0")]:  # fmt: skip
        with pytest.raises(UserError, match=says):
            make(**change)


def test_retrieval_qa_answers_from_what_is_found_and_abstains_from_the_rest(tmp_path, write, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    main(Config("squad2", str(write(SQUAD, ".json")), str(tmp_path)))
    kb, queries = tmp_path / "kb", tmp_path / "queries" / "test.jsonl"
    build_kb(read_documents(tmp_path / "documents.jsonl"), kb, "simple")
    for _ in range(2):  # the second time from the cache
        task = RetrievalQA(queries, kb, top_k=1)
        found, asked, wrong = (task[i]["messages"] for i in range(3))
        assert [m["role"] for m in found] == ["retrieval", "user", "assistant"] and "hop" not in found[0]
        assert [d["content"] for d in found[0]["documents"]] == [OWLS]
        assert found[2]["content"] == "night. [1]" and asked[2]["content"] == ABSTENTION
        assert wrong[2]["content"] == "beetles. [1]" and wrong[0]["query"] == "Which insects kill elms?"
    assert (tmp_path / "cache" / "retrieval.sqlite").exists()
    rows = [{**r, "query": "trees"} for r in read_jsonl(queries)]  # finds the elms only
    queries.write_text("\n".join(map(json.dumps, rows)))
    assert RetrievalQA(queries, kb)[0]["messages"][2]["content"] == ABSTENTION
