"""Handbooks: small collections of documents about invented things, written without templates, with questions to them.

    books = load_handbooks("train")
    task = HandbookTask(books.queries, books.documents)
    python -m tasks.handbooks --split val --output DIR     # documents.jsonl and queries/, to make a knowledge base of

The factbook is one kind of prose, and whoever trains on it reads that kind. Here are many: rules, letters, catalogues,
biographies, minutes, manuals. A handbook belongs to one split, which the checksum of its name decides; nobody and
nothing in it exists, so that whatever a model answers it has read. data/handbooks has the texts, a line each:

    === a handbook's name
    --- a document's title
    The document's text.
    Q: a question || the same in other words
    A: its answer, word for word from the text || other spellings that are right
    N: a question about the same thing that no document of the handbook answers
    H: a question that needs two documents   (with an A: line)
    F: title of the first + title of the second
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zlib import crc32

from nanochat.common import DATA, UserError, print0, write_jsonl
from nanochat.config import run
from nanochat.rag_utils import ABSTENTION
from tasks.fiction_words import SPLITS, slug
from tasks.rag_task import RAGTask, invent_name

NAMES_KEPT = set(  # capitalised words that are nobody's name
    "I Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August "
    "September October November December Christmas Easter Mr Mrs Ms Dr Professor Sir Lady Saint St".split()
)


@dataclass
class Handbooks:
    """Documents by id and questions, in the formats of docs/formats.md and data/README.md."""

    documents: dict[str, dict]
    queries: list[dict]


@lru_cache(maxsize=4)
def load_handbooks(split: str = "train", folder: str | Path = DATA / "handbooks") -> Handbooks:
    """The handbooks of a split: train, val or test. Raises UserError naming a line that it can't read."""
    if split not in SPLITS:
        raise UserError(f"no split '{split}'; choose train, val or test")
    documents: dict[str, dict] = {}
    queries: list[dict] = []
    for path in sorted(Path(folder).glob("*.txt")):
        book, chosen, doc, row = "", False, {}, {}
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as e:
            raise UserError(f"{path} is not text in UTF-8: {e.reason}") from e
        for n, line in enumerate(lines, 1):
            key, _, text = line.partition(" ")
            if key == "===":
                book, chosen, doc, row = text, crc32(f"book {text}".encode()) % 10 in SPLITS[split], {}, {}
            elif not chosen or not line:
                continue
            elif key == "---":
                doc = {
                    "id": f"{slug(book)}--{slug(text)}",
                    "title": text,
                    "content": "",
                    "source": book,
                    "split": split,
                }
                if doc["id"] in documents:
                    raise UserError(f"{path}, line {n}: this handbook has another document of this title")
                documents[doc["id"]], row = doc, {}
            elif doc and key in ("Q:", "N:", "H:"):
                asked = text.split(" || ")
                row = {"id": f"{doc['id']}-{n}", "query": asked[0], "paraphrases": asked[1:], "relation": book}
                row |= {"answer": ABSTENTION, "answers": [ABSTENTION], "positive_ids": [], "about_ids": [doc["id"]]}
                row |= {"hops": 1, "type": "unanswerable"}
                if key != "N:":
                    row |= {"positive_ids": [doc["id"]] if key == "Q:" else [], "type": "single"}
                queries.append(row)
            elif key == "A:" and row and row["answer"] == ABSTENTION:
                row["answer"], row["answers"] = text.split(" || ")[0], text.split(" || ")
            elif key == "F:" and row:
                ids = [f"{slug(book)}--{slug(title)}" for title in text.split(" + ")]
                row |= {"positive_ids": ids, "about_ids": ids, "hops": 2, "type": "two_hop"}
            elif doc and not doc["content"]:
                doc["content"] = line
            else:
                raise UserError(f"{path}, line {n}: neither a title, a text, a question nor an answer")
    if not documents:
        raise UserError(f"{folder} has no handbook of the split {split}")
    for row in queries:
        known = row["type"] != "unanswerable"
        given = {row["answer"] != ABSTENTION, bool(row["positive_ids"])}
        if given != {known} or not all(p in documents for p in row["about_ids"]):
            raise UserError(f"{folder}: {row['query']!r} lacks its answer, or names a title that isn't there")
    return Handbooks(documents, queries)


class HandbookTask(RAGTask):
    """RAGTask, but what is exchanged in a counterfactual are all names and numbers, whatever they stand for."""

    def _counterfactual(self, questions: list[dict], shown: list[dict], turns: list, rng: random.Random) -> list:
        told = " ".join(f"{doc['title']}. {doc['content']}" for doc in shown)
        swap = disguise(told, rng)
        for doc in shown:
            doc["title"], doc["content"] = swap(doc["title"]), swap(doc["content"])
        return [
            [swap(query), answer if answer == ABSTENTION else swap(answer), cited] for query, answer, cited in turns
        ]


def disguise(text: str, rng: random.Random) -> Callable[[str], str]:
    """A function that replaces the names and numbers of `text` by others, wherever they stand: each always by the same,
    and no two by one (but among single digits, of which there are few).

    Names are words with a capital where no sentence begins, and nowhere without it; numbers keep their length and first
    digit, years their century.
    """
    names = dict.fromkeys(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b", text))
    names = [name for name in names if name not in NAMES_KEPT and not re.search(rf"\b{name.lower()}\b", text)]
    new: dict[str, str] = {}
    for old in [*names, *dict.fromkeys(re.findall(r"\d+", text))]:
        for _ in range(30):
            new[old] = invent_name(rng).split()[0] if old in names else _number(old, rng)
            if list(new.values()).count(new[old]) == 1:
                break
    if not new:
        return lambda text: text
    some = re.compile(
        r"(?<![A-Za-z\d])(?:" + "|".join(map(re.escape, sorted(new, key=len, reverse=True))) + r")(?![A-Za-z\d])"
    )
    return lambda text: some.sub(lambda found: new[found.group()], text)


def _number(old: str, rng: random.Random) -> str:
    kept = 2 if re.match(r"(17|18|19|20)..$", old) else min(1, len(old) - 1)
    return old[:kept] + "".join(str(rng.randint(not k + kept, 9)) for k in range(len(old) - kept))


@dataclass
class Config:
    """The handbooks to write out."""

    split: str = "test"  # train, val or test
    output: str = ""  # the folder to write documents.jsonl and queries/ into


def main(config: Config) -> None:
    if not config.output:
        raise UserError("give --output, the folder to write")
    books, output = load_handbooks(config.split), Path(config.output)
    write_jsonl(output / "documents.jsonl", books.documents.values())
    write_jsonl(output / "queries" / f"{config.split}.jsonl", books.queries)
    print0(f"{output}: {len(books.documents)} documents, {len(books.queries)} questions")


if __name__ == "__main__":
    run(main, Config)
