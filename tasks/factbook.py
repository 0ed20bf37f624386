"""The World Factbook data that ships with the repo: passages, questions by split, cloze items, chat pairs.

Splits are by country: no country of a validation or test question has a training question, nor its passages in the
pretraining corpus. data/README.md describes the files.
"""

import random
from collections.abc import Container, Sequence
from functools import lru_cache
from pathlib import Path

from nanochat.common import DATA, UserError, read_jsonl
from nanochat.rag_utils import ABSTENTION
from tasks.common import JSONLTask, Task, whole_word

FACTBOOK = DATA / "factbook"


@lru_cache(maxsize=4)
def load_documents(path: str | Path = FACTBOOK / "knowledge_base" / "documents.jsonl") -> dict[str, dict]:
    """The passages of a knowledge base by id."""
    return {row["id"]: row for row in read_jsonl(path, required=("id", "title", "content"))}


TYPES = ("single", "two_hop", "unanswerable")
TEXTS = "id query answer type country relation bridge bridge_relation reason wording split".split()
TEXTS += "title date passage passage_undated".split()  # of a side of a contradiction
LISTS = "answers positive_ids paraphrases about_ids".split()


def load_queries(path: str | Path) -> list[dict]:
    """Questions in the format of docs/formats.md. `path` may be 'train', 'val' or 'test' for the factbook's.

    A field that is null counts as left out. Raises UserError naming the record that isn't a question or has the id of
    another.
    """
    if str(path) in ("train", "val", "test"):
        path = FACTBOOK / "queries" / f"{path}.jsonl"
    rows: dict[str, dict] = {}
    for n, row in enumerate(read_jsonl(path, required=("id", "query", "answer")), 1):
        row, where = {key: value for key, value in row.items() if value is not None}, f"{path}, record {n}"
        if not all(isinstance(row.get(key), str) for key in ("id", "query", "answer")):
            raise UserError(f"{where}: 'id', 'query' and 'answer' must be text")
        kind = "unanswerable" if not row.get("positive_ids") and row["answer"] in ("", ABSTENTION) else "single"
        kind = "two_hop" if row.get("hops") == 2 else kind
        hops = 2 if row.get("type") == "two_hop" else 1
        row = {"answers": [row["answer"]], "positive_ids": [], "hops": hops, "type": kind, "paraphrases": [], **row}
        check_fields(row, where)
        row["answers"] = row["answers"] or [row["answer"]]
        if not row["query"].strip():
            raise UserError(f"{where}: 'query' is empty")
        if row["type"] not in TYPES:
            raise UserError(f"{where}: the type {row['type']!r}; choose {', '.join(TYPES)}")
        if isinstance(row["hops"], bool) or not isinstance(row["hops"], int):
            raise UserError(f"{where}: 'hops' must be a whole number")
        if row["id"] in rows:
            raise UserError(f"{where}: another question has the id {row['id']!r}, too; give each its own")
        rows[row["id"]] = row
    if not rows:
        raise UserError(f"{path} holds no question")
    return list(rows.values())


def check_fields(row: dict, where: str) -> None:
    """Raises UserError unless the fields of a question, or of a side of a contradiction, are what they should be."""
    for key in row.keys() & TEXTS:
        if not isinstance(row[key], str):
            raise UserError(f"{where}: '{key}' must be text")
    for key in row.keys() & LISTS:
        if not isinstance(row[key], list) or not all(isinstance(x, str) for x in row[key]):
            raise UserError(f"{where}: '{key}' must be a list of texts")


def judgeable(rows: Sequence[dict], documents: Container[str]) -> list[dict]:
    """The questions that a knowledge base with these ids has all gold documents of, one or more, of two hops two or
    more; and those that nothing answers.
    """
    least = {"unanswerable": 0, "two_hop": 2}
    enough = lambda row: len({*row["positive_ids"]}) >= least.get(row["type"], 1)
    return [row for row in rows if enough(row) and all(p in documents for p in row["positive_ids"])]


class FactbookQA(Task):
    """Closed-book question and answer, no documents: what the model may remember from pretraining."""

    def __init__(self, split: str = "train"):
        self.rows = [r for r in load_queries(split) if r["type"] == "single"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        query = self.rng(i).choice([row["query"], *row["paraphrases"]])
        return {"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": row["answer"] + "."}]}


class ChatPairs(JSONLTask):
    """Small talk and who the assistant is: data/chat/chat.jsonl. One in twenty is the validation split."""

    def __init__(self, split: str = "train"):
        super().__init__(DATA / "chat" / "chat.jsonl")
        self.examples = [e for i, e in enumerate(self.examples) if (i % 20 == 7) == (split == "val")]


def cloze_items(split: str = "train", n: int = 500, seed: int = 0) -> list[dict]:
    """Multiple-choice cloze over facts: {"context", "choices", "gold"}.

    The context is a passage's sentence up to the answer; the wrong choices answer the same relation for other
    countries. On training countries it measures what pretraining left in the weights.
    """
    documents, rng = load_documents(), random.Random(seed)
    rows = [r for r in load_queries(split) if r["type"] == "single" and r["positive_ids"]]
    by_relation: dict[str, set[str]] = {}
    for row in rows:
        by_relation.setdefault(row["relation"], set()).add(row["answer"])
    rng.shuffle(rows)
    items = []
    for row in rows:
        text = documents[row["positive_ids"][0]]["content"]
        found = whole_word(row["answer"]).search(text)
        others = sorted(by_relation[row["relation"]] - {row["answer"], *row["answers"]})
        if not found or text[: found.start()][-1:] != " " or len(others) < 3:
            continue
        stop = text.rfind(". ", 0, found.start())
        begin, at = stop + 2 if stop >= 0 else 0, found.start() - 1  # the space before the answer isn't context
        if at - begin < 15 or row["answer"] in text[begin:at]:  # the answer opens its sentence, or was given away
            continue
        choices = [row["answer"], *rng.sample(others, 3)]
        rng.shuffle(choices)
        items.append({"context": text[begin:at], "choices": choices, "gold": choices.index(row["answer"])})
        if len(items) == n:
            break
    return items
