"""The committed data keeps its promises: disjoint splits, gold passages that hold the answers, nothing leaked."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat import common
from nanochat.common import UserError
from tasks.factbook import load_queries

DATA = Path(__file__).parent.parent / "data"
FACTBOOK = DATA / "factbook"
SPLITS = ("train", "val", "test")
ABSTENTION = "I don't know based on the provided documents."


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    return {d["id"]: d for d in read_jsonl(FACTBOOK / "knowledge_base" / "documents.jsonl")}


@pytest.fixture(scope="module")
def countries() -> dict[str, list[str]]:
    return json.loads((FACTBOOK / "splits.json").read_text())


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict]]:
    return {split: load_queries(split) for split in SPLITS}


def test_splits_are_disjoint_and_cover_all_countries_of_the_knowledge_base(countries, documents):
    assert [len(countries[s]) for s in SPLITS] == [177, 36, 36]
    everyone = [c for s in SPLITS for c in countries[s]]
    assert len(set(everyone)) == 249
    assert {d["country"] for d in documents.values()} == set(everyone)
    assert all(d["country"] in countries[d["split"]] for d in documents.values())


def test_passages_have_unique_ids_and_about_seventy_words(documents):
    lines = (FACTBOOK / "knowledge_base" / "documents.jsonl").read_text().count("\n")
    assert len(documents) == lines
    words = [len(d["content"].split()) for d in documents.values()]
    assert 55 < sum(words) / len(words) < 80 and max(words) < 120
    assert all(d["title"] == f"{d['country']} - {d['section']}" for d in documents.values())


def test_a_question_touches_only_countries_of_its_split(questions, documents, countries):
    for split in SPLITS:
        for q in questions[split]:
            golds = {documents[i]["split"] for i in q["positive_ids"]}
            assert golds <= {split}, q["id"]
            assert q["country"] in countries[split] or q.get("reason") == "invented_country", q["id"]


def test_ids_are_unique_across_splits_and_rows_have_every_field(questions):
    ids = [q["id"] for split in SPLITS for q in questions[split]]
    assert len(ids) == len(set(ids))
    fields = {"id", "query", "paraphrases", "answer", "answers", "positive_ids", "hops", "type", "relation", "country"}
    for split in SPLITS:
        for q in questions[split]:
            assert fields <= q.keys(), q["id"]
            assert q["answers"][0] == q["answer"] and q["query"] and q["query"] not in q["paraphrases"], q["id"]
            assert q["query"][0].isupper() or not q["query"][0].isalpha(), q["query"]
            assert not re.search(r"[{}<>]|\bNone\b", q["query"]), q["query"]


def test_answers_stand_word_for_word_in_their_gold_passage(questions, documents):
    for split in SPLITS:
        for q in questions[split]:
            if q["type"] == "single":
                assert all(q["answer"] in documents[i]["content"] for i in q["positive_ids"]), q["id"]
            elif q["type"] == "two_hop" and q["bridge_relation"] != "compare":
                assert q["answer"] in documents[q["positive_ids"][-1]]["content"], q["id"]
                assert len(q["positive_ids"]) == 2, q["id"]
            elif q["type"] == "two_hop":
                assert q["answer"] in {q["country"], q["bridge"]}, q["id"]


TOLD = {  # how a passage tells what is compared
    "area": r"total area of .+? is ([\d.,]+(?: million)?) sq km",
    "population": r"population of .+? is ([\d,]+(?:\.\d+ million)?|no permanent inhabitants|uninhabited)",
    "median_age": r"median age in .+? is ([\d.]+) years",
    "life_expectancy": r"Life expectancy at birth in .+? is ([\d.]+) years",
    "airports": r"Number of airports in .+?: ([\d,]+)",
    "coastline": r"coastline of .+? is ([\d.,]+) km",
    "unemployment": r"Unemployment in .+? stands at ([\d.]+)%",
}


def figure(text: str) -> float:
    """What a passage's figure counts as; nobody is 0."""
    if not text[0].isdigit():
        return 0.0
    number, _, scale = text.replace(",", "").partition(" ")
    return float(number) * {"": 1, "million": 1e6}[scale]


def test_what_wins_a_comparison_is_what_the_passages_say_is_more(questions, documents):
    seen = Counter()
    for row in (q for split in SPLITS for q in questions[split] if q.get("bridge_relation") == "compare"):
        found = [re.search(TOLD[row["relation"]], documents[i]["content"]) for i in row["positive_ids"]]
        assert all(found), row
        x, y = (figure(m[1]) for m in found)
        assert abs(x - y) > 0.1 * max(x, y), row
        assert row["answer"] == (row["country"] if x > y else row["bridge"]), row
        seen[row["relation"]] += 1
    assert seen.keys() == TOLD.keys() and min(seen.values()) > 20


def test_unanswerable_questions_abstain_and_name_no_passage(questions):
    for split in SPLITS:
        rows = [q for q in questions[split] if q["type"] == "unanswerable"]
        assert {q["reason"] for q in rows} == {"missing_field", "never_covered", "invented_country"}
        assert all(q["answer"] == ABSTENTION and q["positive_ids"] == [] for q in rows)


def test_there_are_enough_questions_of_every_type_and_many_relations(questions):
    for split, least in (("train", (15_000, 3_000, 1_000)), ("val", (1_500, 500, 200)), ("test", (1_500, 500, 200))):
        counts = Counter(q["type"] for q in questions[split])
        assert counts["single"] >= least[0] and counts["two_hop"] >= least[1] and counts["unanswerable"] >= least[2]
        assert len({q["relation"] for q in questions[split] if q["type"] == "single"}) >= 90


def test_held_out_wordings_never_occur_in_training(questions):
    def shape(text: str, q: dict) -> str:
        return text.replace(q["country"], "X").replace("the X", "X").replace("X'", "X's").replace("'ss", "'s")

    trained = {shape(t, q) for q in questions["train"] if q["hops"] == 1 for t in (q["query"], *q["paraphrases"])}
    for split in ("val", "test"):
        held = [q for q in questions[split] if q["wording"] == "held_out" and q["hops"] == 1]
        assert len(held) > 300
        assert not [q["query"] for q in held if shape(q["query"], q) in trained]


def test_known_traps_are_gone(documents):
    text = "\n".join(f"{d['title']}\n{d['content']}" for d in documents.values())
    assert not re.search(r"&[a-z]+;|<\w+>|, The - |Republic, The|\{|\}", text)
    leaders = re.findall(r"The (?:chief of state|head of government) of .+? is ([^.(]+)", text)
    fine = re.compile(r"^(?:[IVX]+|GNU|CNSP)$")  # numerals of monarchs, and two governing bodies in titles
    shouted = [n for n in leaders if any(len(w) > 2 and w.isupper() and not fine.match(w) for w in n.split())]
    assert len(leaders) > 400 and not shouted


def test_two_capital_countries_accept_both(questions):
    capitals = {
        q["country"]: q for s in SPLITS for q in questions[s] if q["id"].endswith("-capital") and q["hops"] == 1
    }
    for country, city in (("Bolivia", "Sucre"), ("Benin", "Cotonou"), ("Burundi", "Bujumbura")):
        if country in capitals:
            text = json.dumps(capitals[country])
            assert city in text or len(capitals[country]["answers"]) > 1


def test_contradictions_differ_and_their_passages_hold_their_answers(documents, countries):
    rows = read_jsonl(FACTBOOK / "queries" / "contradictions.jsonl")
    assert len(rows) > 1_000
    for r in rows:
        assert r["country"] in countries[r["split"]]
        assert r["old"]["answer"] != r["new"]["answer"] and r["old"]["date"] < r["new"]["date"]
        for side in (r["old"], r["new"]):
            assert side["answer"] in side["passage"], r["id"]
            assert side["answer"] in side["passage_undated"] and "20" + side["date"][2:] not in side["passage_undated"]
        assert all(r["new"]["answer"] in documents[i]["content"] for i in r["new"]["doc_ids"]), r["id"]


def test_corpus_is_clean_text_without_factbook_passages_of_held_out_countries(documents):
    shards = sorted((DATA / "corpus").glob("train-*.parquet"))
    assert len(shards) >= 2
    texts = {}
    for path in [*shards, DATA / "corpus" / "val.parquet"]:
        table = pq.read_table(path)
        assert table.column_names == ["text", "source"]
        texts[path.name] = list(zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True))
    val = {t for t, _ in texts.pop("val.parquet")}
    train = [row for rows in texts.values() for row in rows]
    assert not val & {t for t, _ in train}
    assert 28e6 < sum(len(t.encode()) for t, _ in train) < 45e6 and sum(map(len, val)) > 8e5
    assert all(0 < len(t) <= 3_100 for t, _ in train)
    factbook = "\n".join(t for t, source in train if source == "factbook") + "\n".join(val)
    held_out = [d for d in documents.values() if d["split"] != "train"]
    # Twin territories share a sentence now and then; a whole passage never.
    assert not [d["id"] for d in held_out if d["content"] in factbook or d["title"] + "\n" in factbook]


def test_chat_is_made_of_conversations_that_alternate_and_know_their_name():
    rows = read_jsonl(DATA / "chat" / "chat.jsonl")
    assert len(rows) > 400
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m["content"].strip() for m in row["messages"])
    assert any("nanochat-RAG" in m["content"] for row in rows for m in row["messages"])


def test_everything_fits_in_25_megabytes_and_names_no_machine():
    files = [
        p for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts and "rag_examples" not in p.parts
    ]
    assert sum(p.stat().st_size for p in files) <= 25e6
    for path in files:
        if path.suffix in {".py", ".md"}:
            assert not re.search(r"/(?:work|root|home)/", path.read_text()), path


def test_a_compressed_file_is_read_like_any_other_and_a_cut_one_is_named(tmp_path):
    whole = (FACTBOOK / "queries" / "train.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz is not a whole gzip file"):
        list(common.read_jsonl(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "not.jsonl.gz").write_text("{}")
    with pytest.raises(UserError, match=r"not\.jsonl\.gz is not a whole gzip file"):
        list(common.read_jsonl(tmp_path / "not.jsonl.gz"))
