"""Find passages: documents, four retrievers, knowledge bases on disk, and the one door to them, `RetrievalManager`.

    python -m nanochat.retrieval prepare_kb --documents docs.jsonl --output kb [--type simple|bm25|dense|hybrid]
    python -m nanochat.retrieval query --knowledge_base kb --query "What is machine learning?" --top_k 5
    python -m nanochat.retrieval eval --knowledge_base kb --queries queries/test.jsonl --output retrieval_eval.json

    manager = RetrievalManager(retriever_type="simple", knowledge_base_path="kb")
    for doc in manager.retrieve("What is machine learning?", top_k=3): print(f"{doc.score:.3f}: {doc.title}")

A knowledge base is a folder: kb.json (version, counts, checksums, encoder), documents.jsonl, bm25/, embeddings.npy,
index.faiss. Nothing in it is pickled; it is written whole or not at all; every file is checked before it is read.

  simple  TF-IDF in numpy, indexed at load: needs only the documents
  bm25    Lucene's BM25 by bm25s, over our own tokens
  dense   MiniLM sentence vectors (packaged, no download), exact inner product by faiss
  hybrid  reciprocal rank fusion of bm25 and dense

Lexical retrievers return only documents that share a token with the query, so there may be fewer than top_k.
Documents are retrieved by title and content together. PyTorch and faiss take their threads from OMP_NUM_THREADS.
"""

import copy
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from nanochat.common import (
    UserError,
    atomic_dir,
    print0,
    read_json,
    read_jsonl,
    sha256_of,
    versions,
    write_json,
    write_jsonl,
)
from nanochat.config import run
from nanochat.documents import Document, read_documents, tokenize, valid_unicode
from nanochat.encoder import Encoder, get_encoder
from nanochat.rag_utils import document_text, judge_retrieval, mean_with_intervals
from nanochat.tokenizer import check_conversation

TYPES = ("simple", "bm25", "dense", "hybrid")
KB_VERSION = 1
ENCODER = {"name": Encoder.NAME, "sha256": Encoder.SHA256, "dims": Encoder.DIMS}
REBUILD = "build it again with python -m nanochat.retrieval prepare_kb"
# A query's work is bounded: what stands behind this many characters is not looked at (about 1,500 English words).
MAX_QUERY_CHARS = 8192

# ----------------------------------------------------------------------------------------------------------------------
# Retrievers


def _best(scores: np.ndarray, top_k: int) -> list[tuple[float, int]]:
    """scores (n,) -> the top_k positive ones as (score, position); equals in order of position."""
    found = np.flatnonzero(scores > 0)
    if len(found) > top_k:  # every score that ties with the last place is kept until the sort has decided
        last = np.partition(scores[found], -top_k)[-top_k]
        found = found[scores[found] >= last]
    found = found[np.argsort(-scores[found], kind="stable")][:top_k]
    return [(float(scores[i]), int(i)) for i in found]


class Retriever:
    """What the four share. A subclass gives `_search`: queries -> for each a best-first list of (score, position)."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = list(documents)
        if not self.documents:
            raise UserError("there are no documents to search")

    def retrieve(self, query: str, top_k: int = 5) -> list[Document]:
        """The documents that fit the query best, best first: copies with `score` set, yours to change."""
        return self.retrieve_batch([query], top_k)[0]

    def retrieve_batch(self, queries: Sequence[str], top_k: int = 5) -> list[list[Document]]:
        """`retrieve` for many queries at once; the results are the same."""
        if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool) or top_k < 1:
            raise UserError(f"top_k must be a whole number from 1, not {top_k!r}")
        for query in queries:
            if not isinstance(query, str):
                raise UserError(f"a query must be text, not a {type(query).__name__}")
        queries = [valid_unicode(query[:MAX_QUERY_CHARS]) for query in queries]
        hits = self._search(queries, min(top_k, len(self.documents)))
        docs, likeness = self.documents, self._similarities(queries, hits)
        return [
            [
                replace(docs[i], score=score, similarity=x, metadata=copy.deepcopy(docs[i].metadata))
                for (score, i), x in zip(found, near)
            ]
            for found, near in zip(hits, likeness)
        ]

    def _similarities(self, queries: list[str], hits: list[list[tuple[float, int]]]) -> list[list[float | None]]:
        return [[None] * len(found) for found in hits]

    def _search(self, queries: list[str], top_k: int) -> list[list[tuple[float, int]]]:
        raise NotImplementedError


class SimpleRetriever(Retriever):
    """TF-IDF: q·d / (|q| sqrt|d|) with weights (1 + ln tf) · (1 + ln((1 + N) / (1 + df))).

    A plain cosine, which divides by |d|, favours short passages: recall@5 on 882 World Factbook validation questions
    is 0.695 with it and 0.826 with the square root.
    """

    def __init__(self, documents: Sequence[Document]):
        super().__init__(documents)
        self.vocabulary: dict[str, int] = {}
        terms, docs, counts = [], [], []
        for position, doc in enumerate(self.documents):
            for token, count in Counter(tokenize(doc.text)).items():
                terms.append(self.vocabulary.setdefault(token, len(self.vocabulary)))
                docs.append(position)
                counts.append(count)
        terms, docs = np.array(terms, dtype=np.int64), np.array(docs, dtype=np.int64)
        df = np.bincount(terms, minlength=len(self.vocabulary))
        self.idf = 1 + np.log((1 + len(self.documents)) / (1 + df))
        weights = (1 + np.log(np.array(counts, dtype=np.float64))) * self.idf[terms]
        weights /= (np.bincount(docs, weights**2, minlength=len(self.documents)) ** 0.25)[docs]
        order = np.argsort(terms, kind="stable")  # postings: the documents of term t are docs[starts[t]:starts[t + 1]]
        self.docs, self.weights = docs[order], weights[order]
        self.starts = np.concatenate([[0], np.cumsum(df)])

    def _search(self, queries: list[str], top_k: int) -> list[list[tuple[float, int]]]:
        return [_best(self._scores(tokenize(query)), top_k) for query in queries]

    def _scores(self, tokens: list[str]) -> np.ndarray:
        scores, square = np.zeros(len(self.documents)), 0.0
        for token, count in Counter(tokens).items():
            if (term := self.vocabulary.get(token)) is not None:
                weight = (1 + math.log(count)) * self.idf[term]
                span = slice(self.starts[term], self.starts[term + 1])
                scores[self.docs[span]] += weight * self.weights[span]
                square += weight**2
        return scores / math.sqrt(square) if square else scores


class BM25Retriever(Retriever):
    """BM25 with k1 = 1.5, b = 0.75 over `tokenize`'s tokens, scored and stored by bm25s.

    `method` is bm25s': "lucene" (idf never negative, so a word that most documents hold still counts a little) or
    "robertson" (Okapi's idf; ranks as rank-bm25's BM25Okapi does unless a query word is in half the documents).
    With a `folder`, the index is read from there instead of built.
    """

    def __init__(self, documents: Sequence[Document], folder: str | Path | None = None, method: str = "lucene"):
        import bm25s

        super().__init__(documents)
        if folder is not None:
            self.index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
            return
        vocabulary = {"": 0}  # bm25s can't index an empty vocabulary; no query token is ever ""
        ids = [[vocabulary.setdefault(t, len(vocabulary)) for t in tokenize(d.text)] or [0] for d in self.documents]
        self.index = bm25s.BM25(k1=1.5, b=0.75, method=method)
        self.index.index((ids, vocabulary), show_progress=False)

    def save(self, folder: str | Path) -> None:
        self.index.save(folder, show_progress=False)

    def _search(self, queries: list[str], top_k: int) -> list[list[tuple[float, int]]]:
        found = [self.index.get_tokens_ids(tokenize(query)) for query in queries]
        return [_best(self.index.get_scores_from_ids(ids), top_k) if ids else [] for ids in found]


class DenseRetriever(Retriever):
    """Cosine of sentence vectors by exact search (faiss, flat inner product). With a `folder`, the index is read."""

    def __init__(self, documents: Sequence[Document], folder: str | Path | None = None, encoder: Encoder | None = None):
        import faiss

        super().__init__(documents)
        self.encoder = encoder or get_encoder()
        if folder is not None:
            self.index = faiss.read_index(str(Path(folder) / "index.faiss"))
            return
        self.index = faiss.IndexFlatIP(Encoder.DIMS)
        self.index.add(self.encoder.encode_passages([doc.text for doc in self.documents]))

    def save(self, folder: str | Path) -> None:
        import faiss

        vectors = self.index.reconstruct_n(0, self.index.ntotal)  # (n, dims)
        np.save(Path(folder) / "embeddings.npy", vectors, allow_pickle=False)
        faiss.write_index(self.index, str(Path(folder) / "index.faiss"))

    def _search(self, queries: list[str], top_k: int) -> list[list[tuple[float, int]]]:
        if not queries:
            return []
        vectors, hits = self.encoder.encode_queries(queries), []
        extra = min(top_k + 16, len(self.documents))  # room to put documents that tie at the last place in order
        for start in range(0, len(vectors), 16):  # from 20 queries on faiss changes kernels, and with them the last bit
            for row in zip(*self.index.search(vectors[start : start + 16], extra), strict=True):
                found = sorted(zip(*row, strict=True), key=lambda hit: (-hit[0], hit[1]))
                hits.append([(float(score), int(position)) for score, position in found[:top_k]])
        return hits


class HybridRetriever(Retriever):
    """Reciprocal rank fusion: a document's score is the sum of 1 / (60 + rank) over the parts' lists.

    k = 60 is the constant of Cormack et al. (2009). Each list goes 100 deep whatever top_k, so that a smaller top_k
    gives the beginning of a larger one's answer.
    """

    K, DEPTH = 60, 100

    def __init__(self, *parts: Retriever):
        super().__init__(parts[0].documents)
        self.parts = parts

    def _search(self, queries: list[str], top_k: int) -> list[list[tuple[float, int]]]:
        depth = min(max(self.DEPTH, top_k), len(self.documents))
        fused: list[Counter] = [Counter() for _ in queries]
        for part in self.parts:
            for scores, found in zip(fused, part._search(queries, depth), strict=True):
                for rank, (_, position) in enumerate(found, 1):
                    scores[position] += 1 / (self.K + rank)
        hits = [
            sorted(((score, position) for position, score in scores.items()), key=lambda h: (-h[0], h[1]))
            for scores in fused
        ]
        return [found[:top_k] for found in hits]

    def _similarities(self, queries, hits):
        dense = self.parts[-1]
        if not isinstance(dense, DenseRetriever):
            return super()._similarities(queries, hits)
        vectors = dense.encoder.encode_queries(queries)
        return [[float(vector @ dense.index.reconstruct(i)) for _, i in found] for vector, found in zip(vectors, hits)]


# ----------------------------------------------------------------------------------------------------------------------
# Knowledge bases on disk


def _check_type(name: str) -> None:
    if name not in TYPES:
        raise UserError(f"unknown retriever type '{name}'; choose one of {', '.join(TYPES)}")


def build_kb(documents: Sequence[Document], output: str | Path, type: str = "hybrid", built_from: str = "") -> dict:
    """Write a knowledge base that serves `type` and whatever that includes; returns what kb.json holds.

    An older knowledge base at `output` is replaced; a folder with anything else in it is refused. `built_from`
    (a checksum of the source) lets a caller see that there is nothing to do.
    """
    _check_type(type)
    output = Path(output)
    if output.exists() and not (output / "kb.json").exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not a knowledge base; choose another --output")
    if (output / "kb.json").exists():
        old = read_json(output / "kb.json")  # of any version
        ours = {"kb.json", *(old.get("files", ()) if isinstance(old, dict) else ())}
        there = (f.relative_to(output).as_posix() for f in output.rglob("*") if f.is_file())
        if foreign := next((name for name in sorted(there) if name not in ours), ""):
            raise UserError(
                f"{output} holds {foreign}, which isn't the knowledge base's; move it away: it would be lost"
            )
    info = {"format": "nanochat-kb", "version": KB_VERSION, "type": type, "documents": len(documents)}
    with atomic_dir(output) as folder:
        write_jsonl(folder / "documents.jsonl", (doc.to_dict() for doc in documents))
        if type in ("bm25", "hybrid"):
            BM25Retriever(documents).save(folder / "bm25")
        if type in ("dense", "hybrid"):
            DenseRetriever(documents).save(folder)
            info["encoder"] = ENCODER
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        info["files"] = {
            f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files
        }
        info["built_from"] = built_from
        write_json(folder / "kb.json", info)
    return info


def kb_info(path: str | Path) -> dict:
    """What kb.json says. Raises UserError if `path` isn't a knowledge base this version reads."""
    path = Path(path)
    if (path / "knowledge_base" / "kb.json").is_file():
        raise UserError(f"{path} is not a knowledge base, but {path / 'knowledge_base'} is: name that")
    if not (path / "kb.json").is_file():
        how = "python -m nanochat.retrieval prepare_kb --documents docs.jsonl --output kb"
        raise UserError(f"{path} is not a knowledge base (no kb.json in it); make one with {how}")
    info = read_json(path / "kb.json")
    files = info.get("files") if isinstance(info, dict) and info.get("format") == "nanochat-kb" else None
    sound = isinstance(files, dict) and all(isinstance(f, dict) and "sha256" in f for f in files.values())
    if not sound or "documents.jsonl" not in files:
        raise UserError(f"{path}/kb.json is not that of a knowledge base; {REBUILD}")
    if info.get("version") != KB_VERSION:
        raise UserError(f"{path} has format version {info.get('version')}, not {KB_VERSION}; {REBUILD}")
    if info.get("type") not in TYPES:
        raise UserError(f"{path}/kb.json doesn't say which retriever it was built for (field 'type'); {REBUILD}")
    return info


def kb_retrievers(info: dict) -> list[str]:
    """The retriever types a knowledge base serves."""
    built = {"bm25": "bm25/params.index.json" in info["files"], "dense": "index.faiss" in info["files"]}
    return [t for t in TYPES if t == "simple" or built.get(t, all(built.values()))]


def load_retriever(path: str | Path, type: str) -> Retriever:
    """Open a knowledge base. Raises UserError if a file is missing or changed, or the index for `type` wasn't built."""
    _check_type(type)
    path, info = Path(path), kb_info(path)
    if type not in kb_retrievers(info):
        lacks = "dense" if "index.faiss" not in info["files"] else "bm25"
        raise UserError(f"{path} has no {lacks} index; build it again with prepare_kb --type {type}")
    if type in ("dense", "hybrid") and info.get("encoder") != ENCODER:
        raise UserError(f"{path} was embedded by another encoder; build it again with prepare_kb --type {type}")
    needed = {"bm25": ("bm25/",), "dense": ("index.faiss",), "hybrid": ("bm25/", "index.faiss")}.get(type, ())
    for name, known in info["files"].items():
        if not name.startswith(("documents.jsonl", *needed)):
            continue
        if not (path / name).is_file() or sha256_of(path / name) != known["sha256"]:
            raise UserError(f"{path / name} is missing or was changed since it was built; {REBUILD}")
    documents = [Document.from_dict(row) for row in read_jsonl(path / "documents.jsonl")]
    bm25 = BM25Retriever(documents, path / "bm25") if type in ("bm25", "hybrid") else None
    dense = DenseRetriever(documents, path) if type in ("dense", "hybrid") else None
    if type == "hybrid":
        return HybridRetriever(bm25, dense)
    return bm25 or dense or SimpleRetriever(documents)


class RetrievalManager:
    """The one door to retrieval: opens a knowledge base with a retriever, by default the one it was built for.

    `knowledge_base` is another name for `knowledge_base_path`; `top_k` is what the methods take when not told.
    """

    def __init__(
        self,
        retriever_type: str = "",
        knowledge_base_path: str | Path | None = None,
        knowledge_base: str | Path | None = None,
        top_k: int = 5,
    ):
        path = knowledge_base_path or knowledge_base
        if not path:
            raise UserError("no knowledge base given; name a folder made by python -m nanochat.retrieval prepare_kb")
        self.path, self.top_k = Path(path), top_k
        self.retriever_type = retriever_type or kb_info(path)["type"]
        self.retriever = load_retriever(path, self.retriever_type)
        self.documents = self.retriever.documents

    def retrieve(self, query: str, top_k: int | None = None) -> list[Document]:
        """The best documents for the query, best first: copies with `score` set."""
        return self.retriever.retrieve(query, self.top_k if top_k is None else top_k)

    def retrieve_batch(self, queries: Sequence[str], top_k: int | None = None) -> list[list[Document]]:
        """`retrieve` for many queries at once."""
        return self.retriever.retrieve_batch(queries, self.top_k if top_k is None else top_k)

    def augment_conversation(self, conversation: dict, top_k: int | None = None) -> dict:
        """A copy of the conversation with what was retrieved for it, put right before its last user message.

        The query is that message as it stands: "And its capital?" is not resolved against earlier turns.
        """
        messages = copy.deepcopy(check_conversation(conversation)["messages"])
        at = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if at is None:
            raise UserError("the conversation has no user message to retrieve for")
        query = messages[at]["content"][:MAX_QUERY_CHARS]
        keys = ("id", "title", "content", "score", "similarity", "source")
        documents = [{key: getattr(doc, key) for key in keys} for doc in self.retrieve(query, top_k)]
        messages.insert(at, {"role": "retrieval", "query": query, "documents": documents})
        return {**copy.deepcopy(conversation), "messages": messages}


# ----------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class PrepareConfig:
    """prepare_kb: documents -> a knowledge base."""

    documents: str = ""  # a .jsonl file; a line is {"id": ..., "title": ..., "content": ..., "source": ...}
    output: str = ""  # the folder to write; an older knowledge base there is replaced
    type: str = "hybrid"  # which index to build: simple, bm25, dense or hybrid (bm25 and dense)


@dataclass
class QueryConfig:
    """query: print the passages found for a question."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    query: str = ""  # the question
    top_k: int = 5  # how many passages
    retriever_type: str = ""  # simple, bm25, dense or hybrid; by default what the knowledge base was built for


@dataclass
class EvalConfig:
    """eval: recall of every retriever that the knowledge base serves."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    queries: str = ""  # a .jsonl file with query and positive_ids; questions without positive_ids are left out
    output: str = ""  # where to write the figures as JSON
    max_examples: int = 0  # a random sample of this many questions; 0 takes all
    seed: int = 0  # of the sample and of the bootstrap


def _require(config: object, *names: str) -> None:
    if missing := [name for name in names if not getattr(config, name)]:
        raise UserError(f"give --{missing[0]}; --help lists what can be given")


def prepare_kb(config: PrepareConfig) -> None:
    _require(config, "documents", "output")
    start = time.time()
    info = build_kb(read_documents(config.documents), config.output, config.type, sha256_of(Path(config.documents)))
    size = sum(entry["bytes"] for entry in info["files"].values()) / 1e6
    serves = ", ".join(kb_retrievers(info))
    print0(
        f"{config.output}: {info['documents']} documents, {size:.1f} MB, {time.time() - start:.1f} s; serves {serves}"
    )


def query(config: QueryConfig) -> None:
    _require(config, "knowledge_base", "query")
    found = RetrievalManager(config.retriever_type, config.knowledge_base).retrieve(config.query, config.top_k)
    for n, doc in enumerate(found, 1):
        print0(f"{doc.score:.4f}  {document_text(doc, n)}\n")
    if not found:
        print0("no document shares a word with the query")


def evaluate(config: EvalConfig) -> dict:
    """Measure every retriever of the knowledge base; prints a table, writes --output, returns what was written."""
    _require(config, "knowledge_base", "queries")
    info = kb_info(config.knowledge_base)
    if config.max_examples < 0:
        raise UserError(f"--max_examples {config.max_examples}: at least 0 (0 takes all)")
    rows = [row for row in read_jsonl(config.queries, ("query", "positive_ids")) if row["positive_ids"]]
    for row in rows:
        ids = row["positive_ids"]
        if not isinstance(row["query"], str) or not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise UserError(f"{config.queries}: a query must be text and positive_ids a list of document ids")
    if config.max_examples and len(rows) > config.max_examples:
        rows = random.Random(config.seed).sample(rows, config.max_examples)
    if not rows:
        raise UserError(f"{config.queries} has no question with positive_ids")
    kinds = sorted({str(row.get("type", "all")) for row in rows})
    result: dict = {"rows": {}, "by_type": {k: {} for k in kinds}, "config": asdict(config)}
    result["versions"] = versions("bm25s", "faiss-cpu")
    for name in kb_retrievers(info):
        retriever, start = load_retriever(config.knowledge_base, name), time.time()
        ranked = [[doc.id for doc in found] for found in retriever.retrieve_batch([row["query"] for row in rows], 10)]
        ms = (time.time() - start) / len(rows) * 1000
        judged = [judge_retrieval(found, row["positive_ids"]) for found, row in zip(ranked, rows, strict=True)]
        result["rows"][name] = {**mean_with_intervals(judged, config.seed), "ms_per_query": ms}
        for kind in kinds:
            part = [scores for scores, row in zip(judged, rows, strict=True) if str(row.get("type", "all")) == kind]
            result["by_type"][kind][name] = mean_with_intervals(part, config.seed)
    metrics = list(judge_retrieval([], [""]))
    for title, table in [("all", result["rows"]), *(result["by_type"].items() if len(kinds) > 1 else ())]:
        print0(f"\n{title:14} {'n':>6} " + " ".join(f"{metric:>10}" for metric in metrics))
        for name, row in table.items():
            print0(f"{name:14} {row['n']:6d} " + " ".join(f"{row[metric]:10.3f}" for metric in metrics))
    if config.output:
        write_json(config.output, result)
    return result


COMMANDS = {"prepare_kb": (prepare_kb, PrepareConfig), "query": (query, QueryConfig), "eval": (evaluate, EvalConfig)}


def cli(argv: list[str]) -> None:
    """`prepare_kb`, `query` or `eval`, then options; options alone mean prepare_kb."""
    if argv in (["-h"], ["--help"]):
        print0(f"{__doc__}\nCommands, each with its own --help: {', '.join(COMMANDS)} (the default is prepare_kb)")
        return
    name = argv[0] if argv and not argv[0].startswith("-") else "prepare_kb"
    if name not in COMMANDS:
        print0(f"error: unknown command '{name}'; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run(*COMMANDS[name], argv[1:] if argv[:1] == [name] else argv)


if __name__ == "__main__":
    cli(sys.argv[1:])
