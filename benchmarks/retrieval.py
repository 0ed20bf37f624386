"""Search among many passages: build time, memory, cold opening and latency; rank-bm25 and exact search beside them.

    python -m benchmarks.retrieval --passages 100000 --output retrieval.json   # a million: some ten minutes

Passages are real text: 100-word pieces of the embedded corpus, again and again, each time with a tenth of the words
exchanged for others of the corpus. Queries are eight words in a row from passages, with one word exchanged. Vectors are
made: 384 dimensions, clusters of different widths (independent noise has no neighbours to find; real text has).
Every stage runs in a process of its own, whose peak memory is its own; for the cold opening the files are dropped from
the page cache first.
"""

import concurrent.futures
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.common import interleave, report
from nanochat.common import DATA
from nanochat.config import run
from nanochat.documents import Document, tokenize
from nanochat.knowledge_base import build_kb
from nanochat.retrieval import load_retriever
from nanochat.retrievers import BM25Retriever, dense_index, search_dense


@dataclass
class Config:
    passages: int = 100_000  # for BM25
    beside: int = 100_000  # passages for BM25 beside rank-bm25; 0 leaves it out
    vectors: int = 50_000  # for dense search; 0 leaves it out
    index: str = "auto"  # of the vectors: auto, flat, hnsw, ivf or ivfpq
    queries: int = 300  # for latencies
    folder: str = ""  # where to build; a temporary folder by default
    seed: int = 0
    output: str = ""  # where to write the figures as JSON


def corpus() -> tuple[list[list[str]], list[str]]:
    """The embedded corpus as pieces of 100 words, and all its words as often as they occur."""
    texts = [
        text for file in sorted(DATA.glob("corpus/train-*.parquet")) for text in pq.read_table(file)["text"].to_pylist()
    ]
    words = " ".join(texts).split()
    return [words[i : i + 100] for i in range(0, len(words) - 99, 100)], words


def passages(n: int, seed: int) -> Iterator[Document]:
    rng, (pieces, words) = random.Random(seed), corpus()
    for i in range(n):
        piece = list(pieces[i % len(pieces)])
        if i >= len(pieces):
            for _ in range(10):
                piece[rng.randrange(100)] = rng.choice(words)
        yield Document(f"p{i}", f"Passage {i}", " ".join(piece))


def questions(n: int, seed: int) -> list[str]:
    rng, (pieces, words) = random.Random(seed + 1), corpus()
    found = []
    for _ in range(n):
        start = rng.randrange(92)
        piece = rng.choice(pieces)[start : start + 8]
        piece[rng.randrange(8)] = rng.choice(words)
        found.append(" ".join(piece))
    return found


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def build(path: str, config: Config) -> dict:
    documents = list(passages(config.passages, config.seed))
    before, start = peak_gb(), time.perf_counter()
    build_kb(documents, path, "bm25")
    seconds = time.perf_counter() - start
    size = sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file()) / 1e9
    return {"n": config.passages, "build_s": seconds, "peak_gb": peak_gb(), "documents_gb": before, "disk_gb": size}


def ask(path: str, config: Config) -> dict:
    for file in Path(path).rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    import bm25s  # noqa: F401  importing is not opening

    start = time.perf_counter()
    retriever = load_retriever(path, "bm25")
    opened, times = time.perf_counter() - start, []
    for query in questions(config.queries + 1, config.seed):
        start = time.perf_counter()
        retriever.retrieve(query, 10)
        times.append((time.perf_counter() - start) * 1000)
    row = {
        "open_s": opened,
        "first_ms": times[0],
        "p50_ms": np.median(times[1:]),
        "p95_ms": np.quantile(times[1:], 0.95),
    }
    return {**row, "rss_gb": peak_gb()}


def beside(path: str, config: Config) -> dict:
    """Queries a second of both on the same tokens, in turns."""
    from rank_bm25 import BM25Okapi

    documents, asked = list(passages(config.beside, config.seed)), questions(200, config.seed)
    ours, okapi = BM25Retriever(documents), BM25Okapi([tokenize(doc.text) for doc in documents])

    def search_ours() -> int:
        return len([ours.retrieve(query, 10) for query in asked])

    def search_okapi() -> int:
        return len([np.argsort(-okapi.get_scores(tokenize(query)))[:10] for query in asked[:5]])

    rates = interleave({"bm25": search_ours, "rank-bm25": search_okapi}, 3)
    ratio = {"times_rank_bm25": rates["bm25"]["rate"] / rates["rank-bm25"]["rate"]}
    rows = {name: {"n": config.beside, "queries_per_s": rate["rate"]} for name, rate in rates.items()}
    return {"bm25 beside": {**rows["bm25"], **ratio}, "rank-bm25": rows["rank-bm25"]}


def dense(path: str, config: Config) -> dict:
    import faiss

    n, rng = config.vectors, np.random.default_rng(config.seed)
    centres = rng.standard_normal((max(1, n // 50), 384), dtype=np.float32)
    width = rng.uniform(0.3, 1.2, (n, 1)).astype(np.float32)
    vectors = centres[rng.integers(0, len(centres), n)] + width * rng.standard_normal((n, 384), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, vectors = vectors[: config.queries].copy(), vectors[config.queries :]
    start = time.perf_counter()
    index, info = dense_index(vectors, config.index)
    row, times, found = {"n": len(vectors), "build_s": time.perf_counter() - start, "peak_gb": peak_gb()}, [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search_dense(index, info, vectors, query, 10)[1])
        times.append((time.perf_counter() - start) * 1000)
    start = time.perf_counter()
    _, exact = faiss.knn(queries, vectors, 10, faiss.METRIC_INNER_PRODUCT)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)])
    row |= {"p50_ms": np.median(times), "p95_ms": np.quantile(times, 0.95), "recall@10": recall}
    return {f"dense {info['kind']}": {**row, "effort": info["effort"]}}


def alone(stage, *args):
    """Run a stage in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(stage, *args).result()


def main(config: Config) -> None:
    rows = {}
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        path = str(Path(folder) / "kb")
        if config.passages:
            rows["bm25"] = alone(build, path, config)
            rows["bm25"] |= alone(ask, path, config)
        if config.beside:
            rows |= alone(beside, path, config)
        if config.vectors:
            rows |= alone(dense, path, config)
    rows = {name: {k: float(v) for k, v in row.items()} for name, row in rows.items()}
    report(rows, vars(config), ("bm25s", "rank-bm25", "faiss-cpu", "numpy"), config.output)


if __name__ == "__main__":
    run(main, Config)
