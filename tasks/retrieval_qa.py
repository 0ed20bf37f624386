"""Questions with what retrieval finds for them, and public data sets of questions brought into our format.

    python -m tasks.retrieval_qa --dataset squad2 --file dev-v2.0.json --output DIR     # or hotpot, nq
    python -m nanochat.retrieval prepare_kb --documents DIR/documents.jsonl --output DIR/knowledge_base

    RetrievalQA("DIR/queries/test.jsonl", "DIR/knowledge_base")[0]
    create_rag_task("static", path="conversations/train_rag.jsonl")  # or "retrieval", "multi_hop"

A data set is read from a file of its own format: SQuAD 2.0 (.json), HotpotQA's distractor setting (.json), Natural
Questions (.jsonl, full or simplified), or rows as the hub has them (.jsonl, .parquet); without a file, from the hub.
Answers must stand in a document, so a question answered by yes or no, by a list or by a table is left out.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat.common import UserError, is_main, over_ranks, print0, read_json, read_jsonl, write_jsonl
from nanochat.config import run
from nanochat.documents import read_documents, valid_unicode
from nanochat.rag_utils import ABSTENTION, extract_citations
from nanochat.retrieval import RetrievalManager
from nanochat.retrievers import Retriever
from tasks.common import JSONLTask, Task
from tasks.factbook import load_queries
from tasks.fiction_words import slug
from tasks.rag_task import MultiHopRAGTask, RAGTask, states_answer

# ----------------------------------------------------------------------------------------------------------------------
# Tasks


class RetrievalQA(RAGTask):
    """Questions over the `top_k` documents that the knowledge base's retriever finds for them, in its order.

    The answer cites the gold document if it was found (of two hops, both), else it is the abstention. Left out of what
    was found: documents that hold the answer without being marked, and those of another split than the gold ones.
    """

    def __init__(self, queries: str | Path, knowledge_base: str | Path, retriever_type: str = "", top_k: int = 5):
        self.manager = RetrievalManager(retriever_type, knowledge_base, cached=True)
        self.top_k = top_k
        super().__init__(load_queries(queries), {doc.id: doc.to_dict() for doc in self.manager.documents})

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        query = self.rng(i).choice([row["query"], *row["paraphrases"]])
        docs = [doc for doc in self.manager.retrieve(query, self.top_k + 10) if doc.id in self.allowed]
        ids = [doc.id for doc in docs if doc.id in row["positive_ids"] or not states_answer(doc, row)]
        shown = self._show(ids[: self.top_k])
        return self._conversation(row, [(query, shown)], [(query, *self._answer(row, shown))])


class StaticRAGTask(JSONLTask):
    """Conversations with the documents found for them beforehand, from a .jsonl file, as they stand there.

    Raises UserError naming a record that has no documents, or whose answer cites one that doesn't stand before it.
    """

    def check(self, row: dict) -> None:
        super().check(row)
        numbers = [0]
        for message in row["messages"]:
            if message["role"] == "retrieval":
                for doc in message["documents"]:
                    numbers.append(doc.get("number") or numbers[-1] + 1)
            for cited in extract_citations(message["content"]) if message["role"] == "assistant" else []:
                if cited not in numbers[1:]:
                    raise UserError(f"the answer cites [{cited}], but no document before it has that number")
        if len(numbers) == 1:
            raise UserError("no retrieval message with documents; plain conversations are JSONLTask's")


KINDS: dict[str, Callable[..., Task]] = {"retrieval": RAGTask, "static": StaticRAGTask, "multi_hop": MultiHopRAGTask}


def create_rag_task(kind: str, **options) -> Task:
    """A task by name: retrieval and multi_hop take `rows`, `documents`, `mix`, `retrieved` and `seed`, static a `path`.

    `retrieved` may be a RetrievalManager: it is asked for every row, and `documents` are by default its own.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of RAG task '{kind}'; choose {', '.join(KINDS)}")
    if isinstance(manager := options.get("retrieved"), RetrievalManager):
        options.setdefault("documents", {doc.id: doc.to_dict() for doc in manager.documents})
        options["retrieved"] = retrieve_all(manager, options["rows"])
    return KINDS[kind](**options)


def retrieve_all(manager: RetrievalManager | Retriever, rows: Sequence[dict], top_k: int = 10) -> dict[str, list[str]]:
    """Question id -> ids of the best `top_k` documents; ranks share the questions."""

    def search(part: list[dict]) -> list[list[str]]:
        batches = [[r["query"] for r in part[n : n + 256]] for n in range(0, len(part), 256)]
        batches = tqdm(batches, desc="retrieving", unit="batch", leave=False, disable=not is_main())
        return [[doc.id for doc in docs] for batch in batches for docs in manager.retrieve_batch(batch, top_k)]

    return {row["id"]: ids for row, ids in zip(rows, over_ranks(search, rows))}


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: a row -> its documents, and its question or None if that is to be left out

Converted = tuple[list[dict], dict | None]
NQ_PARAGRAPHS = 10  # of a Natural Questions page, beside the one that answers


def squad2(row: dict) -> Converted:
    """A paragraph and a question to it; without answers, one that the paragraph only seems to answer."""
    doc = _document(row["title"].replace("_", " "), row["context"], "SQuAD 2.0")
    answers = [_text(a["text"]) for a in _items(row["answers"])]
    return [doc], _question(row["id"], row["question"], answers, [doc] if answers else [])


def hotpot(row: dict) -> Converted:
    """Ten paragraphs and a question to two of them: first the one that names the other, which is the bridge."""
    pairs = lambda name: [tuple(x.values()) if isinstance(x, dict) else x for x in _items(row[name])]
    docs = {title: _document(title, "".join(sentences), "HotpotQA") for title, sentences in pairs("context")}
    gold = [docs[title] for title in dict.fromkeys(title for title, _ in pairs("supporting_facts"))]
    answer, id = _text(row["answer"]), row["id"] if "id" in row else row["_id"]
    if len(gold) != 2:
        return list(docs.values()), None
    name = lambda doc: re.sub(r" \(.*\)$", "", doc["title"])  # without "(film)"
    leads = lambda a, b: (name(b) in a["content"]) + (answer in b["content"])
    if row["type"] == "bridge" and leads(*gold[::-1]) > leads(*gold):
        gold.reverse()
    more = {"bridge": name(gold[1])} | ({"bridge_relation": "compare"} if row["type"] == "comparison" else {})
    return list(docs.values()), _question(id, row["question"], [answer], gold, **more)


def natural_questions(row: dict) -> Converted:
    """Paragraphs of a page and a question to one of them, or to none. Annotators who gave one short answer count."""
    page, tokens = row.get("document", row), row.get("document_text", "").split(" ")
    if "document_tokens" in row or "document" in row:
        tokens = [t["token"] for t in _items(row["document_tokens"] if "document_tokens" in row else page["tokens"])]
    head = next((n for n, token in enumerate(tokens) if token.startswith("<")), 0)
    title = page.get("title") or row.get("document_title") or _prose(tokens[:head]).removesuffix(" - Wikipedia")
    span = lambda x: (x["start_token"], x["end_token"])
    prose = lambda x: _prose(tokens[slice(*span(x))])
    is_paragraph = lambda x: tokens[x["start_token"]] == "<P>"
    answered = [a for a in _items(row["annotations"]) if a["long_answer"]["start_token"] >= 0]
    short = [a for a in answered if len(_items(a["short_answers"])) == 1 and is_paragraph(a["long_answer"])]
    if answered and not short:
        return [], None
    others = [x for x in _items(row["long_answer_candidates"]) if x["top_level"] and is_paragraph(x)]
    gold = [a["long_answer"] for a in short][:1]
    texts = [prose(_items(a["short_answers"])[0]) for a in short if span(a["long_answer"]) == span(gold[0])]
    docs = [_document(title, prose(x), "Natural Questions") for x in gold + others[:NQ_PARAGRAPHS]]
    id, query = row["id"] if "id" in row else row["example_id"], row.get("question_text") or row["question"]["text"]
    return docs, _question(str(id), query, texts, docs[: len(gold)])


def _items(value: Any) -> list:
    """The hub writes a list of records as a record of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, record)) for record in zip(*value.values(), strict=True)]
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is not text")
    return valid_unicode(value).strip()


def _prose(tokens: Sequence[str]) -> str:
    """Tokens of a page as text, without tags and without spaces around punctuation."""
    text = " ".join(t for t in tokens if not re.fullmatch(r"<[^<>]*>", t)).replace("``", '"').replace("''", '"')
    return re.sub(r"([(\[]) | (?=[.,;:!?%)\]]|'s\b|n't\b)", r"\1", text)


def _document(title: str, content: str, source: str) -> dict:
    """The same title and content give the same id, whatever row or file they are from."""
    title, content = _text(title), _text(content)
    digest = hashlib.sha256(f"{title}\n{content}".encode()).hexdigest()[:12]
    return {"id": f"{slug(title)}-{digest}".lstrip("-"), "title": title, "content": content, "source": source}


def _question(id: str, query: str, answers: list[str], gold: list[dict], **more) -> dict | None:
    """A question to its gold documents, or an unanswerable one if there are none. None if they hold no answer."""
    kept = [a for a in dict.fromkeys(answers) if a and any(a in f"{doc['title']}\n{doc['content']}" for doc in gold)]
    if gold and not kept:
        return None
    kept, type = kept or [ABSTENTION], {0: "unanswerable", 1: "single", 2: "two_hop"}[len(gold)]
    row = {"id": _text(id), "query": _text(query), "answer": kept[0], "answers": kept}
    return row | {"positive_ids": [doc["id"] for doc in gold], "hops": max(1, len(gold)), "type": type} | more


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing them


def load_squad2(path: str | Path = "", **how) -> tuple[dict[str, dict], list[dict]]:
    """SQuAD 2.0: documents by id, and questions of one hop and unanswerable ones. `_load` has the options."""
    return _load(squad2, path, ("rajpurkar/squad_v2",), **how)


def load_hotpot(path: str | Path = "", **how) -> tuple[dict[str, dict], list[dict]]:
    """HotpotQA: documents by id, and questions of two hops. `_load` has the options."""
    return _load(hotpot, path, ("hotpotqa/hotpot_qa", "distractor"), **how)


def load_natural_questions(path: str | Path = "", **how) -> tuple[dict[str, dict], list[dict]]:
    """Natural Questions: documents by id, and questions of one hop and unanswerable ones. `_load` has the options."""
    return _load(natural_questions, path, ("google-research-datasets/natural_questions", "default"), **how)


LOADERS = {"squad2": load_squad2, "hotpot": load_hotpot, "nq": load_natural_questions}


def _load(
    convert: Callable[[dict], Converted],
    path: str | Path,
    hub: tuple[str, ...],
    split: str = "test",
    skip: int = 0,
    max_examples: int = 0,
) -> tuple[dict[str, dict], list[dict]]:
    """Convert the rows after the first `skip` until there are `max_examples` questions (0: all rows).

    Documents are marked with the split. Raises UserError naming a malformed row, or if no question is left.
    """
    documents: dict[str, dict] = {}
    queries: dict[str, dict] = {}
    n, left_out = skip, 0
    try:
        for row in islice(_rows(path, hub, split), skip, None):
            docs, query = convert(row)
            if query and query["id"] in queries:
                raise ValueError(f"the id {query['id']} has been used before")
            documents |= {doc["id"]: {**doc, "split": split} for doc in docs if doc["content"]}
            queries |= {query["id"]: query} if query else {}
            n, left_out = n + 1, left_out + (query is None)
            if len(queries) == max_examples > 0:
                break
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        why = f"no field {e}" if isinstance(e, KeyError) else e
        raise UserError(f"{path or hub[0]}, row {n + 1}: not in the format of {convert.__name__} ({why})") from e
    if not queries:
        raise UserError(f"{path or hub[0]} holds no question to use behind row {skip}")
    print0(
        f"{path or hub[0]}: {n - skip} rows read, {left_out} left out (no short answer that stands in the documents)"
    )
    return documents, list(queries.values())


def _rows(path: str | Path, hub: tuple[str, ...], split: str) -> Iterator[Any]:
    """Rows of a file or, if there is none, of the hub, whose validation split is our val and test."""
    suffix = Path(path).suffix
    if not path:
        try:
            from datasets import load_dataset
        except ImportError as e:
            raise UserError(
                "to read from the hub: pip install datasets; else give --file, a file of the data set"
            ) from e
        try:
            yield from load_dataset(*hub, split="train" if split == "train" else "validation", streaming=True)
        except OSError as e:
            raise UserError(f"cannot read {hub[0]} from the hub ({e}); download it and give --file") from e
    elif suffix == ".json":
        rows = read_json(path)
        rows = rows.get("data") if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise UserError(f"{path} is neither a list of rows nor has one as 'data'")
        for row in rows:
            if "paragraphs" not in row:
                yield row
            else:  # SQuAD's own nesting
                yield from ({**row, **part, **qa} for part in row["paragraphs"] for qa in part["qas"])
    elif suffix == ".jsonl":
        yield from read_jsonl(path)
    elif suffix == ".parquet":
        try:
            for batch in pq.ParquetFile(path).iter_batches(256):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as e:
            raise UserError(f"{path} is not a readable parquet file: {str(e).splitlines()[0]}") from e
    else:
        raise UserError(f"{path}: give a .json, .jsonl or .parquet file")


@dataclass
class Config:
    """The data set to bring into our format. Documents of other splits in the same folder stay."""

    dataset: str = ""  # squad2, hotpot or nq (Natural Questions)
    file: str = ""  # a .json, .jsonl or .parquet file of it; empty: from the hub (val and test: its validation split)
    output: str = ""  # the folder to write documents.jsonl and queries/ into
    split: str = "test"  # train, val or test: the name the questions get
    skip: int = 0  # rows to pass over first: val and test may be parts of one file
    max_examples: int = 0  # stop at this many questions (0: take all)


def main(config: Config) -> None:
    if config.dataset not in LOADERS:
        raise UserError(f"--dataset {config.dataset or '?'}: choose {', '.join(LOADERS)}")
    if not config.output:
        raise UserError("give --output, the folder to write")
    if config.split not in ("train", "val", "test"):
        raise UserError(f"--split {config.split}: choose train, val or test")
    if min(config.skip, config.max_examples) < 0:
        raise UserError("--skip and --max_examples: at least 0")
    how = {"split": config.split, "skip": config.skip, "max_examples": config.max_examples}
    documents, queries = LOADERS[config.dataset](config.file, **how)
    path = Path(config.output) / "documents.jsonl"
    for doc in (doc.to_dict() for doc in (read_documents(path) if path.exists() else [])):
        if doc["id"] not in documents:
            documents |= {doc["id"]: doc} if doc.get("split") != config.split else {}
        elif doc.get("split") != config.split:  # one of several splits' is no distractor in any
            del documents[doc["id"]]["split"]
    write_jsonl(path, documents.values())
    write_jsonl(path.parent / "queries" / f"{config.split}.jsonl", queries)
    print0(f"{path.parent}: {len(documents)} documents, {len(queries)} questions for {config.split}")


if __name__ == "__main__":
    run(main, Config)
