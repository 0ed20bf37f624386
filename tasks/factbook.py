"""The World Factbook data that ships with the repo: passages, questions by split, cloze items, chat pairs.

Splits are by country: no country of a validation or test question has a training question, nor its passages in the
pretraining corpus. data/README.md describes the files.
"""

import random
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


def load_queries(path: str | Path) -> list[dict]:
    """Questions in the format of docs/formats.md. `path` may be 'train', 'val' or 'test' for the factbook's."""
    if str(path) in ("train", "val", "test"):
        path = FACTBOOK / "queries" / f"{path}.jsonl"
    rows = []
    for n, row in enumerate(read_jsonl(path, required=("id", "query", "answer")), 1):
        kind = "unanswerable" if not row.get("positive_ids") and row["answer"] in ("", ABSTENTION) else "single"
        row = {"answers": [row["answer"]], "positive_ids": [], "hops": 1, "type": kind, "paraphrases": [], **row}
        if not all(isinstance(row[key], str) for key in ("id", "query", "answer")):
            raise UserError(f"{path}, record {n}: 'id', 'query' and 'answer' must be text")
        for key in ("answers", "positive_ids", "paraphrases"):
            if not isinstance(row[key], list) or not all(isinstance(x, str) for x in row[key]):
                raise UserError(f"{path}, record {n}: '{key}' must be a list of texts")
        if isinstance(row["hops"], bool) or not isinstance(row["hops"], int):
            raise UserError(f"{path}, record {n}: 'hops' must be a whole number")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no question")
    return rows


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
