"""The four retrievers, in memory: documents and their indexes -> the best documents for a query.

    retriever = BM25Retriever(documents)  # or SimpleRetriever, DenseRetriever, HybridRetriever(bm25, dense)
    retriever.retrieve("What is machine learning?", top_k=3, filters={"country": "Chad"})

  simple  TF-IDF in numpy: needs only the documents
  bm25    Lucene's BM25 by bm25s, over our own tokens
  dense   sentence vectors (MiniLM, packaged, no download), searched by faiss
  hybrid  bm25 and dense fused: by reciprocal ranks, or weighted

Lexical retrievers return only documents that share a token with the query, so there may be fewer than top_k.
Documents are retrieved by title and content together. PyTorch and faiss take their threads from OMP_NUM_THREADS.
Several threads may ask one retriever.
"""

import copy
import json
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.documents import Document, tokenize, valid_unicode
from nanochat.encoder import get_encoder, get_reranker
from nanochat.passages import sentences

INDEXES = ("auto", "flat", "hnsw", "ivf", "ivfpq")
# A query's work is bounded: what stands behind this many characters is not looked at (about 1,500 English words).
MAX_QUERY_CHARS = 8192
REMEMBERED = 4096  # vectors of queries
REMEMBERED_SENTENCES = 50_000  # and of sentences: 77 MB
CLOSEST = 3  # sentences of a document that are named as closest; reader.py says how many are read
MAX_SENTENCES = 64  # of a document that are compared with a query
POOL = 50  # how many of the best are reranked, or looked at for diversity

Hit = tuple[float, int]  # score, position


def check_choice(what: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise UserError(f"unknown {what} '{name}'; choose one of {', '.join(choices)}")


# ----------------------------------------------------------------------------------------------------------------------
# Indexes


def bm25_index(documents: Sequence[Document], method: str = "lucene") -> tuple[Any, float]:
    """BM25 with k1 = 1.5, b = 0.75 over `tokenize`'s tokens -> bm25s' index and the average length in tokens."""
    import bm25s

    vocabulary = {"": 0}  # bm25s can't index an empty vocabulary; no query token is ever ""
    ids = [[vocabulary.setdefault(t, len(vocabulary)) for t in tokenize(d.text)] or [0] for d in documents]
    index = bm25s.BM25(k1=1.5, b=0.75, method=method)
    index.index((ids, vocabulary), show_progress=False)
    return index, sum(map(len, ids)) / len(ids)


def dense_index(vectors: np.ndarray, kind: str = "auto", seed: int = 0) -> tuple[Any, dict]:
    """Unit vectors (n, dims) float32 -> a faiss index by inner product, and what kb.json says about it.

    auto: exact (flat) below 50,000, HNSW up to 200,000 (its build grows faster than the collection), IVF up to two
    million, IVF-PQ above. How far the approximate ones search is chosen so that they find 95 % of the ten nearest of
    200 queries: stored vectors, moved by half their length.
    """
    import faiss

    n, dims = vectors.shape
    if kind == "auto":
        kind = "flat" if n < 50_000 else "hnsw" if n <= 200_000 else "ivf" if n <= 2_000_000 else "ivfpq"
    if kind.startswith("ivf") and n < 1000:  # too few to learn clusters from
        kind = "flat"
    lists = max(1, min(int(4 * n**0.5), n // 39))
    parts = next(m for m in range(max(1, dims // 4), 0, -1) if dims % m == 0)  # of a vector, a byte each
    spec = {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{lists},Flat", "ivfpq": f"IVF{lists},PQ{parts}np"}
    index = faiss.index_factory(dims, spec[kind], faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = 128
    if not index.is_trained:
        rng = np.random.default_rng(seed)
        index.train(vectors[np.sort(rng.choice(n, min(n, 64 * lists), replace=False))])
    index.add(vectors)
    info: dict = {"kind": kind, "effort": 0}
    if kind == "flat":
        return index, {**info, "recall@10": 1.0}
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((min(n, 200), dims), dtype=np.float32)
    queries = vectors[rng.choice(n, len(noise), replace=False)]
    queries = queries + noise / 2 / np.linalg.norm(noise, axis=1, keepdims=True)
    _, exact = faiss.knn(queries, vectors, min(n, 10), faiss.METRIC_INNER_PRODUCT)
    for info["effort"] in (16, 32, 64, 128, 256, 512, 1024):
        found = [search_dense(index, info, vectors, query, min(n, 10))[1] for query in queries]
        info["recall@10"] = float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)]))
        if info["recall@10"] >= 0.95:
            break
    return index, info


def search_dense(
    index: Any, info: dict, vectors: np.ndarray, query: np.ndarray, k: int, keep: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of one query (dims,), of those where keep (n,) is True -> scores and positions, best first.

    IVF-PQ's candidates are scored anew by their stored vectors.
    """
    import faiss

    kind, share = info["kind"], 1.0
    sel = None
    if keep is not None:
        rows = np.flatnonzero(keep)
        if len(rows) <= 50_000:  # few enough to look at each
            return _nearest(vectors, rows, query, k)
        share, sel = len(rows) / len(keep), faiss.IDSelectorBitmap(np.packbits(keep, bitorder="little"))
    effort = int(info["effort"] / share)
    if kind == "flat":
        params = faiss.SearchParameters(sel=sel)
    elif kind == "hnsw":
        params = faiss.SearchParametersHNSW(sel=sel, efSearch=max(effort, k))
    else:
        params = faiss.SearchParametersIVF(sel=sel, nprobe=effort)
    scores, rows = index.search(query[None], max(10 * k, 200) if kind == "ivfpq" else k, params=params)
    scores, rows = scores[0][rows[0] >= 0], rows[0][rows[0] >= 0]
    return _nearest(vectors, rows, query, k) if kind == "ivfpq" else (scores, rows)


def _nearest(vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = vectors[rows] @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return scores[order], rows[order]


# ----------------------------------------------------------------------------------------------------------------------
# Retrievers


def _best(scores: np.ndarray, positions: np.ndarray, top_k: int) -> list[Hit]:
    """scores (n,) of positions (n,), ascending -> the top_k positive ones; equals in order of position."""
    found = np.flatnonzero(scores > 0)
    if len(found) > top_k:  # every score that ties with the last place is kept until the sort has decided
        last = np.partition(scores[found], -top_k)[-top_k]
        found = found[scores[found] >= last]
    found = found[np.argsort(-scores[found], kind="stable")][:top_k]
    return [(float(scores[i]), int(positions[i])) for i in found]


class Retriever:
    """What the four share. A subclass gives `_search`: queries -> for each a best-first list of (score, position).

    `keep` (n,) is False where a document was removed since the index was made; None if none was.
    """

    def __init__(self, documents: Sequence[Document], keep: np.ndarray | None = None):
        self.documents = documents if hasattr(documents, "containing") else list(documents)
        if not self.documents:
            raise UserError("there are no documents to search")
        self.keep, self.masks, self.lock = keep, OrderedDict(), threading.Lock()

    def retrieve(self, query: str, top_k: int = 5, **options) -> list[Document]:
        """The documents that fit the query best, best first: copies with `score` set, yours to change."""
        return self.retrieve_batch([query], top_k, **options)[0]

    def retrieve_batch(self, queries: Sequence[str], top_k: int = 5, **options) -> list[list[Document]]:
        """`retrieve` for many queries at once; the results are the same. `options` are `search`'s."""
        hits = self.search(queries, top_k, **options)
        return [self.copies(found) for found in hits]

    def copies(self, found: Sequence[Hit]) -> list[Document]:
        """Hits -> documents of the caller's own, with their scores."""
        docs = (self.documents[i] for _, i in found)
        return [replace(doc, score=score, metadata=copy.deepcopy(doc.metadata)) for doc, (score, _) in zip(docs, found)]

    def compare(self, query: str, docs: Sequence[Document]) -> list[Document]:
        """Copies of any documents with `similarity` and `closest` set; where no vectors are compared, unset."""
        return [replace(doc, similarity=None, closest=None) for doc in docs]

    def forget(self) -> None:
        """Drop what earlier questions left in memory, so that the next one takes as long as a first."""

    def search(
        self,
        queries: Sequence[str],
        top_k: int = 5,
        filters: dict | None = None,
        min_score: float | None = None,
        mmr: float | None = None,
        rerank: str = "",
    ) -> list[list[Hit]]:
        """For each query the best (score, position), in this order of steps:

        filters: only documents whose field, or metadata, is the value or one of the values: {"country": ["Chad"]};
            of a field that is a list, one item is enough. Numbers may be given as text.
        rerank: the best 50 are scored anew by `get_reranker(rerank)`.
        min_score: what scores less goes. Scores of different retrievers, fusions and rerankers don't compare.
        mmr: of the best 50, one after the other, the one with the highest mmr * score (scaled to 0..1) - (1 - mmr) *
            likeness to one already chosen: cosine of the stored vectors, or the share of common words without those.
        """
        if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool) or top_k < 1:
            raise UserError(f"top_k must be a whole number from 1, not {top_k!r}")
        for query in queries:
            if not isinstance(query, str):
                raise UserError(f"a query must be text, not a {type(query).__name__}")
        for name, value, low, high in (("min_score", min_score, -math.inf, math.inf), ("mmr", mmr, 0, 1)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and low <= value <= high):
                raise UserError(f"{name} must be a number{' from 0 to 1' if name == 'mmr' else ''}, not {value!r}")
        queries = [valid_unicode(query[:MAX_QUERY_CHARS]) for query in queries]
        mask, depth = self._mask(filters), top_k if mmr is None and not rerank else max(POOL, top_k)
        if mask is not None and not mask.any():
            return [[] for _ in queries]
        hits = self._search(queries, min(depth, len(self.documents)), mask)
        if rerank:
            hits = [self._rerank(rerank, query, found) for query, found in zip(queries, hits, strict=True)]
        if min_score is not None:
            hits = [[hit for hit in found if hit[0] >= min_score] for found in hits]
        if mmr is not None:
            hits = [self._diverse(found, top_k, mmr) for found in hits]
        return [found[:top_k] for found in hits]

    def _search(self, queries: list[str], top_k: int, mask: np.ndarray | None) -> list[list[Hit]]:
        raise NotImplementedError

    def _mask(self, filters: dict | None) -> np.ndarray | None:
        """(n,) bool: the documents that pass; None if all do. The last few are remembered."""
        if not filters:
            return self.keep
        if not isinstance(filters, dict):
            raise UserError(f"filters must be a dict of field -> value or values, not {filters!r}")
        wanted = {}
        for name, values in filters.items():
            values = values if isinstance(values, (list, tuple, set)) else [values]
            if not all(isinstance(v, (str, int, float)) for v in values):
                raise UserError(f"the filter {name}={values!r}: values must be text, numbers or true and false")
            wanted[name] = {_spelled(v) for v in values}
        key = json.dumps({name: sorted(values) for name, values in wanted.items()}, sort_keys=True)
        with self.lock:
            if key not in self.masks:
                docs, mask = self.documents, np.zeros(len(self.documents), dtype=bool)
                look = range(len(docs))
                if hasattr(docs, "containing") and docs.positions is None:  # parse only what has the words in it
                    look = set.intersection(*({i for v in w for i in docs.containing(v)} for w in wanted.values()))
                for i in look:
                    row = docs[i].to_dict()
                    mask[i] = all(name in row and _values(row[name]) & values for name, values in wanted.items())
                self.masks[key] = mask if self.keep is None else mask & self.keep
                if len(self.masks) > 16:
                    self.masks.popitem(last=False)
            return self.masks[key]

    def _rerank(self, name: str, query: str, found: list[Hit]) -> list[Hit]:
        if not found:
            return []
        scores = get_reranker(name).score(query, [self.documents[i].text for _, i in found])
        order = np.argsort(-scores, kind="stable")
        return [(float(scores[i]), found[i][1]) for i in order]

    def _diverse(self, found: list[Hit], top_k: int, mmr: float) -> list[Hit]:
        if not found:
            return []
        scores = np.array([score for score, _ in found])
        value = mmr * _scaled(scores)
        alike = self._likeness([i for _, i in found])
        chosen, nearest = [], np.zeros(len(found))
        while len(chosen) < min(top_k, len(found)):
            gain = value - (1 - mmr) * nearest
            gain[chosen] = -np.inf
            chosen.append(int(np.argmax(gain)))
            nearest = np.maximum(nearest, alike[chosen[-1]])
        return [found[i] for i in chosen]

    def _likeness(self, positions: list[int]) -> np.ndarray:
        """(p, p): 1 for equal documents."""
        words = [set(tokenize(self.documents[i].text)) for i in positions]
        return np.array([[len(a & b) / max(1, len(a | b)) for b in words] for a in words])


def _spelled(value: object) -> str:
    value = int(value) if isinstance(value, float) and value.is_integer() else value  # 3.0 is 3
    return value if isinstance(value, str) else json.dumps(value)


def _values(value: object) -> set[str]:
    return {_spelled(v) for v in value} if isinstance(value, list) else {_spelled(value)}


def _scaled(scores: np.ndarray) -> np.ndarray:
    """Scores -> 0 (the least) to 1 (the most); all 1 if they are equal."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones(len(scores))


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

    def _search(self, queries: list[str], top_k: int, mask: np.ndarray | None) -> list[list[Hit]]:
        hits, positions = [], np.arange(len(self.documents))
        for query in queries:
            scores = self._scores(tokenize(query))
            hits.append(_best(scores if mask is None else scores * mask, positions, top_k))
        return hits

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
    """BM25 with k1 = 1.5, b = 0.75 over `tokenize`'s tokens; the index is bm25s'.

    `method` is bm25s': "lucene" (idf never negative, so a word that most documents hold still counts a little) or
    "robertson" (Okapi's idf; ranks as rank-bm25's BM25Okapi does unless a query word is in half the documents).
    With an `index`, that is used. Documents beyond those it holds, the tail, are scored by its formula with its idf and
    its `average` length: right but for the little that they, and documents removed, would change in those two.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        method: str = "lucene",
        index=None,
        average: float = 0.0,
        keep: np.ndarray | None = None,
    ):
        super().__init__(documents, keep)
        self.index = index or bm25_index(self.documents, method)[0]
        scores = self.index.scores
        self.base, self.vocabulary = int(scores["num_docs"]), self.index.vocab_dict
        self.data, self.rows, self.starts = scores["data"], scores["indices"], scores["indptr"]
        self.tail: dict[str, list[Hit]] = {}  # token -> (weight, position) of the documents of the tail that have it
        for position in range(self.base, len(self.documents)):
            tokens = tokenize(self.documents[position].text)
            norm = 1.5 * (0.25 + 0.75 * len(tokens) / average)
            for token, count in Counter(tokens).items():
                self.tail.setdefault(token, []).append((count / (count + norm), position))

    def _search(self, queries: list[str], top_k: int, mask: np.ndarray | None) -> list[list[Hit]]:
        return [self._find(Counter(tokenize(query)), top_k, mask) for query in queries]

    def _find(self, tokens: Counter, top_k: int, mask: np.ndarray | None) -> list[Hit]:
        """The best of base and tail.

        Words are added in the order of the most they can give to a document. As soon as all that are left can't lift
        an unseen document to the top_k-th best score so far, only those are finished that still can get there.
        """
        terms = []
        for token, count in tokens.items():
            if (term := self.vocabulary.get(token)) is not None:
                span = slice(int(self.starts[term]), int(self.starts[term + 1]))
                if span.stop > span.start:
                    terms.append((float(self.data[span].max()) * count, term, count, span))
        terms.sort(key=lambda t: (-t[0], t[1]))
        scores, seen, found = np.zeros(len(self.documents), dtype=np.float32), [], None
        for n, (_, _, count, span) in enumerate(terms):
            rows, left = self.rows[span], sum(term[0] for term in terms[n:]) * 1.00001  # sums of float32 are rounded
            if found is None and seen and sum(map(len, seen)) + 1000 < len(rows):
                at = np.unique(np.concatenate(seen))
                at = at if mask is None else at[mask[at]]
                last = np.partition(scores[at], -top_k)[-top_k] if len(at) >= top_k else 0.0
                found = at[scores[at] >= last - left] if last > left else None
            if found is None:
                scores[rows] += self.data[span] * np.float32(count)
                seen.append(rows)
            else:
                where = np.minimum(np.searchsorted(rows, found), len(rows) - 1)
                has = rows[where] == found
                scores[found[has]] += self.data[span][where[has]] * np.float32(count)
        for token in tokens.keys() & self.tail.keys():
            term = self.vocabulary.get(token)
            df = 0 if term is None else int(self.starts[term + 1] - self.starts[term])
            idf = math.log(1 + (self.base - df + 0.5) / (df + 0.5))
            for weight, position in self.tail[token]:
                scores[position] += tokens[token] * idf * weight
        if found is None:
            found = np.arange(len(scores))
        elif len(scores) > self.base:
            found = np.concatenate([found, np.arange(self.base, len(scores))])
        found = found if mask is None else found[mask[found]]
        return _best(scores[found], found, top_k)


class DenseRetriever(Retriever):
    """Cosine of sentence vectors by faiss: `index`, as `described`, holds the first of `vectors`, the others (the tail)
    are compared one by one. Without an index, all are; without vectors, the documents are embedded.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        encoder=None,
        vectors: Sequence[np.ndarray] | None = None,
        index=None,
        described: dict | None = None,
        keep: np.ndarray | None = None,
    ):
        super().__init__(documents, keep)
        self.encoder, self.known = encoder or get_encoder(), OrderedDict()
        self.known_sentences, self.n_sentences = OrderedDict(), 0
        vectors = vectors or [self.encoder.encode_passages([doc.text for doc in self.documents])]
        self.base, tail = vectors[0], vectors[1:]
        self.tail = np.concatenate(tail) if tail else np.zeros((0, self.base.shape[1]), dtype=np.float32)
        self.index, self.described = (index, described) if index else dense_index(self.base, "flat")

    def _search(self, queries: list[str], top_k: int, mask: np.ndarray | None) -> list[list[Hit]]:
        if not queries:
            return []
        vectors = self._encode(queries)
        hits, base = [], len(self.base)
        extra = min(top_k + 16, base)  # room to put documents that tie at the last place in order
        rest = np.arange(base, base + len(self.tail))
        rest = rest if mask is None else rest[mask[base:]]
        for vector in vectors:
            keep = None if mask is None else mask[:base]
            scores, found = search_dense(self.index, self.described, self.base, vector, extra, keep)
            scores = [*scores.tolist(), *(self.tail[rest - base] @ vector).tolist()]
            hits.append(sorted(zip(scores, [*found.tolist(), *rest.tolist()]), key=lambda h: (-h[0], h[1]))[:top_k])
        return hits

    def _encode(self, queries: list[str]) -> list[np.ndarray]:
        """Queries -> vectors (dims,); the last few thousand are remembered."""
        with self.lock:  # the fast tokenizers are not made for several threads
            if missing := list(dict.fromkeys(query for query in queries if query not in self.known)):
                self.known.update(zip(missing, self.encoder.encode_queries(missing), strict=True))
            vectors = [self.known[query] for query in queries]
            while len(self.known) > REMEMBERED:
                self.known.popitem(last=False)
        return vectors

    def _rows(self, positions: list[int]) -> np.ndarray:
        base = len(self.base)
        rows = [self.base[i] if i < base else self.tail[i - base] for i in positions]
        return np.array(rows, dtype=np.float32).reshape(-1, self.base.shape[1])

    def _likeness(self, positions: list[int]) -> np.ndarray:
        rows = self._rows(positions)
        return rows @ rows.T

    def compare(self, query: str, docs: Sequence[Document]) -> list[Document]:
        """Copies with the `CLOSEST` sentences as `closest` and the highest cosine of the query with one, titled, as
        `similarity`.

        A passage of several facts is as far from a question as its other facts are; its best sentence isn't. On the
        Factbook this tells right passages from wrong ones far better than the passage's own cosine (docs/LOG.md). It
        takes a few milliseconds a document; what was compared last is remembered.
        """
        [vector] = self._encode([valid_unicode(query[:MAX_QUERY_CHARS])])
        found = []
        for doc in docs:
            told, vectors = self._sentences(doc)
            likeness = vectors @ vector
            closest = [told[i] for i in np.argsort(-likeness, kind="stable")[:CLOSEST]] if told else None
            found.append(replace(doc, similarity=float(likeness.max()), closest=closest))
        return found

    def forget(self) -> None:
        with self.lock:
            self.known.clear()
            self.known_sentences.clear()
            self.n_sentences = 0

    def _sentences(self, doc: Document) -> tuple[list[str], np.ndarray]:
        """A document's sentences and the vectors (sentences, dims) of each with the title before it.

        Of a document of more than MAX_SENTENCES, the vectors of the first and no sentence: it is to be read as a whole.
        A document is a batch of its own: what else is compared then can't change the last bits of its vectors.
        """
        with self.lock:
            key = doc.title, doc.content
            if key not in self.known_sentences:
                told = list(islice(sentences(doc.content), MAX_SENTENCES + 1))
                texts = [f"{doc.title}\n{sentence}" for sentence in told[:MAX_SENTENCES]]
                vectors = self.encoder.encode_together(texts or [doc.text])
                self.known_sentences[key] = told if len(told) <= MAX_SENTENCES else [], vectors
                self.n_sentences += len(vectors)
                while self.n_sentences > REMEMBERED_SENTENCES and len(self.known_sentences) > 1:
                    self.n_sentences -= len(self.known_sentences.popitem(last=False)[1][1])
            self.known_sentences.move_to_end(key)
            return self.known_sentences[key]


class HybridRetriever(Retriever):
    """Two retrievers' lists in one, bm25's and dense's.

    rrf: reciprocal rank fusion, the sum of 1 / (K + rank) over the lists. Cormack et al. (2009) have K = 60, at which
    being in both lists counts for more than being first in one; on the Factbook's validation questions that lost 3 %
    of the two-hop pairs that dense alone finds, and 10 lost none (docs/LOG.md). weighted: alpha * the last part's
    score + (1 - alpha) * the other's, each list scaled to 0..1; who is not in a list has 0 there. Each list goes 100
    deep whatever top_k, so that a smaller top_k gives the beginning of a larger one's answer.
    """

    K, DEPTH = 10, 100

    def __init__(self, *parts: Retriever, fusion: str = "rrf", alpha: float = 0.7):
        check_choice("fusion", fusion, ("rrf", "weighted"))
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be a number from 0 to 1, not {alpha!r}")
        super().__init__(parts[0].documents, parts[0].keep)
        self.parts, self.fusion, self.shares = parts, fusion, [1 - alpha, alpha]
        self._likeness, self.compare, self.forget = parts[-1]._likeness, parts[-1].compare, parts[-1].forget

    def _search(self, queries: list[str], top_k: int, mask: np.ndarray | None) -> list[list[Hit]]:
        depth = min(max(self.DEPTH, top_k), len(self.documents))
        fused: list[Counter] = [Counter() for _ in queries]
        for part, share in zip(self.parts, self.shares, strict=True):
            for scores, found in zip(fused, part._search(queries, depth, mask), strict=True):
                scaled = share * _scaled(np.array([score for score, _ in found])) if found else []
                for rank, (_, position) in enumerate(found):
                    scores[position] += 1 / (self.K + rank + 1) if self.fusion == "rrf" else float(scaled[rank])
        hits = [
            sorted(((score, position) for position, score in scores.items()), key=lambda h: (-h[0], h[1]))
            for scores in fused
        ]
        return [found[:top_k] for found in hits]
