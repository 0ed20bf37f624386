"""Find passages: four retrievers over a knowledge base, their options, and the one door to them, `RetrievalManager`.

    python -m nanochat.retrieval prepare_kb --documents FILE_OR_FOLDER --output kb [--type simple|bm25|dense|hybrid]
    python -m nanochat.retrieval query --knowledge_base kb --query "What is machine learning?" --top_k 5
    python -m nanochat.retrieval add --knowledge_base kb --documents more.jsonl
    python -m nanochat.retrieval remove --knowledge_base kb --ids first,second
    python -m nanochat.retrieval eval --knowledge_base kb --queries queries/test.jsonl --output retrieval_eval.json

    manager = RetrievalManager(retriever_type="simple", knowledge_base_path="kb")
    for doc in manager.retrieve("What is machine learning?", top_k=3): print(f"{doc.score:.3f}: {doc.title}")

  simple  TF-IDF in numpy, indexed at load: needs only the documents
  bm25    Lucene's BM25 by bm25s, over our own tokens
  dense   sentence vectors (MiniLM, packaged, no download), searched by faiss
  hybrid  bm25 and dense fused: by reciprocal ranks, or weighted

Lexical retrievers return only documents that share a token with the query, so there may be fewer than top_k.
Documents are retrieved by title and content together. PyTorch and faiss take their threads from OMP_NUM_THREADS.
"""

import copy
import hashlib
import json
import math
import random
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat.cache import Cache
from nanochat.common import (
    UserError,
    get_base_dir,
    init_distributed,
    print0,
    read_jsonl,
    sha256_of,
    versions,
    write_json,
)
from nanochat.config import run
from nanochat.documents import Document, tokenize, valid_unicode
from nanochat.encoder import get_encoder, get_reranker
from nanochat.knowledge_base import (
    REINDEX,
    TYPES,
    Documents,
    KnowledgeBase,
    add_documents,
    bm25_index,
    build_kb,
    check_choice,
    check_files,
    dense_index,
    get_kb_encoder,
    kb_info,
    kb_serves,
    open_kb,
    remove_documents,
    search_dense,
)
from nanochat.rag_utils import document_text, judge_retrieval, mean_with_intervals, ndcg_at_k
from nanochat.tokenizer import check_conversation

# A query's work is bounded: what stands behind this many characters is not looked at (about 1,500 English words).
MAX_QUERY_CHARS = 8192
POOL = 50  # how many of the best are reranked, or looked at for diversity

Hit = tuple[float, int]  # score, position

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
        self.documents = documents if isinstance(documents, Documents) else list(documents)
        if not self.documents:
            raise UserError("there are no documents to search")
        self.keep, self.masks, self.lock = keep, OrderedDict(), threading.Lock()

    def retrieve(self, query: str, top_k: int = 5, **options) -> list[Document]:
        """The documents that fit the query best, best first: copies with `score` set, yours to change."""
        return self.retrieve_batch([query], top_k, **options)[0]

    def retrieve_batch(self, queries: Sequence[str], top_k: int = 5, **options) -> list[list[Document]]:
        """`retrieve` for many queries at once; the results are the same. `options` are `search`'s."""
        return [self.copies(found) for found in self.search(queries, top_k, **options)]

    def copies(self, found: Sequence[Hit]) -> list[Document]:
        """Hits -> documents of the caller's own."""
        docs = [(score, self.documents[i]) for score, i in found]
        return [replace(doc, score=score, metadata=copy.deepcopy(doc.metadata)) for score, doc in docs]

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
            if value is not None and (isinstance(value, bool) or not low <= float(value) <= high):
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
                if isinstance(docs, Documents) and docs.positions is None:  # first what costs little: the spelling
                    look = set(look).intersection(
                        *({i for v in w for i in docs.containing(v)} for w in wanted.values())
                    )
                for i in look:
                    doc = docs[i]
                    row = {
                        **doc.metadata,
                        "id": doc.id,
                        "title": doc.title,
                        "content": doc.content,
                        "source": doc.source,
                    }
                    mask[i] = all(_values(row.get(name)) & values for name, values in wanted.items())
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
        self.encoder = encoder or get_encoder()
        vectors = vectors or [self.encoder.encode_passages([doc.text for doc in self.documents])]
        self.base, tail = vectors[0], vectors[1:]
        self.tail = np.concatenate(tail) if tail else np.zeros((0, self.base.shape[1]), dtype=np.float32)
        self.index, self.described = (index, described) if index else dense_index(self.base, "flat")

    def _search(self, queries: list[str], top_k: int, mask: np.ndarray | None) -> list[list[Hit]]:
        if not queries:
            return []
        with self.lock:  # the fast tokenizers are not made for several threads
            vectors = self.encoder.encode_queries(queries)
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

    def _likeness(self, positions: list[int]) -> np.ndarray:
        base = len(self.base)
        rows = np.stack([self.base[i] if i < base else self.tail[i - base] for i in positions])
        return rows @ rows.T


class HybridRetriever(Retriever):
    """Two retrievers' lists in one, bm25's and dense's.

    rrf: reciprocal rank fusion, the sum of 1 / (60 + rank) over the lists; k = 60 is the constant of Cormack et al.
    (2009). weighted: alpha * the last part's score + (1 - alpha) * the other's, each list scaled to 0..1; who is not
    in a list has 0 there. Each list goes 100 deep whatever top_k, so that a smaller top_k gives the beginning of a
    larger one's answer.
    """

    K, DEPTH = 60, 100

    def __init__(self, *parts: Retriever, fusion: str = "rrf", alpha: float = 0.7):
        check_choice("fusion", fusion, ("rrf", "weighted"))
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be a number from 0 to 1, not {alpha!r}")
        super().__init__(parts[0].documents, parts[0].keep)
        self.parts, self.fusion, self.shares = parts, fusion, [1 - alpha, alpha]
        self._likeness = parts[-1]._likeness

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


# ----------------------------------------------------------------------------------------------------------------------
# The one door


def load_retriever(path: str | Path, type: str, fusion: str = "rrf", alpha: float = 0.7) -> Retriever:
    """Open a knowledge base. Raises UserError if a file is missing or changed, or the index for `type` wasn't built."""
    check_choice("retriever type", type, TYPES)
    info = kb_info(path)
    if type not in kb_serves(info):
        lacks = "dense" if "index.faiss" not in info["files"] else "bm25"
        raise UserError(f"{path} has no {lacks} index; build it again with prepare_kb --type {type}")
    encoder = get_kb_encoder(info, Path(path)) if type in ("dense", "hybrid") else None

    def load(kb: KnowledgeBase) -> Retriever:
        changed, whole = kb.info["segments"] or kb.info["removed"], len(kb.everything)
        # the indexes of a changed knowledge base are made anew if that is quick; else they stay, and the tail is scored
        anew = changed and whole < REINDEX
        documents, keep = (kb.documents, None) if anew else (kb.everything, kb.keep if kb.info["removed"] else None)
        bm25 = dense = None
        if type in ("bm25", "hybrid"):
            bm25 = BM25Retriever(documents) if anew else _saved_bm25(kb, documents, keep)
        if type in ("dense", "hybrid"):
            vectors = kb.vectors()
            if [len(v) for v in vectors] != [len(ix) for ix in kb.everything.index]:
                raise ValueError("there are not as many vectors as documents")
            if anew:
                dense = DenseRetriever(documents, encoder, [np.concatenate(vectors)[kb.keep]])
            else:
                dense = _saved_dense(kb, documents, encoder, vectors, keep)
        if type == "hybrid":
            retriever = HybridRetriever(bm25, dense, fusion=fusion, alpha=alpha)
        else:
            retriever = bm25 or dense or SimpleRetriever(kb.documents)
        retriever.kb = kb
        return retriever

    return open_kb(path, type, load)


def _saved_bm25(kb: KnowledgeBase, documents: Documents, keep: np.ndarray | None) -> BM25Retriever:
    import bm25s

    index = bm25s.BM25.load(kb.path / "bm25", mmap=True, show_progress=False)
    if index.scores["num_docs"] != len(kb.everything.index[0]):
        raise ValueError("bm25/ is that of another knowledge base")
    return BM25Retriever(documents, index=index, average=kb.info["average_length"], keep=keep)


def _saved_dense(kb: KnowledgeBase, documents: Documents, encoder, vectors, keep) -> DenseRetriever:
    import faiss

    index = faiss.read_index(str(kb.path / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
    if index.ntotal != len(vectors[0]) or index.d != vectors[0].shape[1]:
        raise ValueError("index.faiss is that of another knowledge base")
    return DenseRetriever(documents, encoder, vectors, index, kb.info["index"], keep)


class RetrievalManager:
    """The one door to retrieval: opens a knowledge base with a retriever, by default the one it was built for.

    `knowledge_base` is another name for `knowledge_base_path`. `top_k` and the options of `Retriever.search` (filters,
    min_score, mmr, rerank) are what the methods take when not told; `fusion` and `alpha` are the hybrid retriever's.
    With `cached`, what was found is kept in BASE/cache/retrieval.sqlite for the same question to the same contents.
    What other processes add or remove is seen after `refresh`.
    """

    def __init__(
        self,
        retriever_type: str = "",
        knowledge_base_path: str | Path | None = None,
        knowledge_base: str | Path | None = None,
        top_k: int = 5,
        fusion: str = "rrf",
        alpha: float = 0.7,
        cached: bool = False,
        **options,
    ):
        path = knowledge_base_path or knowledge_base
        if not path:
            raise UserError("no knowledge base given; name a folder made by python -m nanochat.retrieval prepare_kb")
        for name in options:
            check_choice("option", name, ("filters", "min_score", "mmr", "rerank"))
        self.path, self.top_k, self.options = Path(path), top_k, options
        self.retriever_type = retriever_type or kb_info(path)["type"]
        self.fusion, self.alpha = fusion, alpha
        self.cache = Cache(get_base_dir() / "cache" / "retrieval.sqlite") if cached else None
        self.retriever = load_retriever(path, self.retriever_type, fusion, alpha)

    @property
    def documents(self) -> Documents:
        """All documents, in order; each is parsed when asked for."""
        return self.retriever.kb.documents

    def retrieve(self, query: str, top_k: int | None = None, **options) -> list[Document]:
        """The best documents for the query, best first: copies with `score` set. `options` as in `Retriever.search`."""
        return self.retrieve_batch([query], top_k, **options)[0]

    def retrieve_batch(self, queries: Sequence[str], top_k: int | None = None, **options) -> list[list[Document]]:
        """`retrieve` for many queries at once."""
        retriever, top_k, options = self.retriever, self.top_k if top_k is None else top_k, {**self.options, **options}
        if self.cache is None or not all(isinstance(query, str) for query in queries):
            return retriever.retrieve_batch(queries, top_k, **options)
        asked = [retriever.kb.digest, self.retriever_type, self.fusion, self.alpha, top_k, options]
        asked = json.dumps(asked, sort_keys=True, default=sorted).encode()
        keys = [hashlib.sha256(asked + query.encode("utf-8", "surrogatepass")).hexdigest() for query in queries]
        known = {key: json.loads(value) for key, value in self.cache.get_many(keys).items()}
        missing = {key: query for key, query in zip(keys, queries) if key not in known}
        new = dict(zip(missing, retriever.search(list(missing.values()), top_k, **options), strict=True))
        self.cache.put_many({key: json.dumps(found).encode() for key, found in new.items()})
        return [retriever.copies((known | new)[key]) for key in keys]

    def add_documents(self, documents: Sequence[Document]) -> None:
        """Add documents, durably; only they are embedded. A known id is an error."""
        add_documents(self.path, documents)
        self.refresh()

    def update_documents(self, documents: Sequence[Document]) -> None:
        """Add documents in place of those with the same ids, in one step."""
        add_documents(self.path, documents, replace=True)
        self.refresh()

    def remove_documents(self, ids: Sequence[str]) -> None:
        """Remove documents by id, durably. An unknown id is an error."""
        remove_documents(self.path, ids)
        self.refresh()

    def refresh(self) -> None:
        """See what has been written to the knowledge base. Calls that are under way finish with the old one."""
        if kb_info(self.path) != self.retriever.kb.info:
            self.retriever = load_retriever(self.path, self.retriever_type, self.fusion, self.alpha)

    def augment_conversation(self, conversation: dict, top_k: int | None = None, **options) -> dict:
        """A copy of the conversation with what was retrieved for it, put right before its last user message.

        The query is that message as it stands: "And its capital?" is not resolved against earlier turns.
        """
        messages = copy.deepcopy(check_conversation(conversation)["messages"])
        at = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if at is None:
            raise UserError("the conversation has no user message to retrieve for")
        query = messages[at]["content"][:MAX_QUERY_CHARS]
        keys = ("id", "title", "content", "score", "source")
        documents = [{key: getattr(doc, key) for key in keys} for doc in self.retrieve(query, top_k, **options)]
        messages.insert(at, {"role": "retrieval", "query": query, "documents": documents})
        return {**copy.deepcopy(conversation), "messages": messages}


# ----------------------------------------------------------------------------------------------------------------------

# Command line


@dataclass
class PrepareConfig:
    """prepare_kb: files -> a knowledge base."""

    documents: str = ""  # a .jsonl, .txt, .md, .html or .pdf file, or a folder of such files
    output: str = ""  # the folder to write; an older knowledge base there is replaced
    type: str = "hybrid"  # which index to build: simple, bm25, dense or hybrid (bm25 and dense)
    encoder: str = "minilm"  # minilm, lm:SOURCE (our own model), or a sentence-transformers name or folder
    index: str = "auto"  # of vectors: flat (exact), hnsw, ivf or ivfpq; auto chooses by their number
    chunk_tokens: int = 128  # the most tokens of a passage; documents in .jsonl files stay whole
    overlap: int = 24  # tokens that a passage repeats of the one before it


@dataclass
class AddConfig:
    """add: files -> more documents in a knowledge base; only they are embedded."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    documents: str = ""  # a file or folder as for prepare_kb; it is cut into passages as that was
    update: bool = False  # replace documents that have the same id; else a known id is an error


@dataclass
class RemoveConfig:
    """remove: take documents out of a knowledge base."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    ids: str = ""  # the documents' ids, with commas between them


@dataclass
class StatsConfig:
    """stats: what a knowledge base holds."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    verify: bool = False  # check every byte against its checksum, of the large files, too


@dataclass
class QueryConfig:
    """query: print the passages found for a question."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    query: str = ""  # the question
    top_k: int = 5  # how many passages
    retriever_type: str = ""  # simple, bm25, dense or hybrid; by default what the knowledge base was built for
    filters: str = ""  # only documents with these values: country=Chad,year=2020 (a field twice: one or the other)
    min_score: float | None = None  # nothing that scores less
    mmr: float | None = None  # 0 to 1: diversity; 1 is none, 0.7 a little
    rerank: str = ""  # score the best 50 anew: late (MiniLM's token vectors), or a CrossEncoder's name
    fusion: str = "rrf"  # of hybrid: rrf (reciprocal ranks) or weighted
    alpha: float = 0.7  # weighted: the share of dense


@dataclass
class EvalConfig:
    """eval: every retriever that the knowledge base serves, side by side."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    queries: str = ""  # a .jsonl file with query and positive_ids; questions without positive_ids are left out
    output: str = ""  # where to write the figures as JSON
    max_examples: int = 0  # a random sample of this many questions; 0 takes all
    rerank: str = "late"  # a further row: the best retriever's 50 best, reranked; empty for none
    seed: int = 0  # of the sample and of the bootstrap


def _require(config: object, *names: str) -> None:
    if missing := [name for name in names if not getattr(config, name)]:
        raise UserError(f"give --{missing[0]}; --help lists what can be given")


def _read(path: str, **how) -> list[Document]:
    """Documents of a file or folder; says what was left out."""
    from nanochat.passages import read_passages

    documents, stats = read_passages(path, **how)
    print0(f"{path}: {stats['files']} files, {len(documents)} passages, {stats['duplicates']} duplicates dropped")
    for kind in ("skipped", "warnings"):
        for name, reason in list(stats.get(kind, {}).items())[:20]:
            print0(f"{kind}: {name}: {reason}")
    return documents


def _summary(path: str) -> None:
    info = kb_info(path)
    size = sum(entry["bytes"] for entry in info["files"].values()) / 1e6
    print0(f"{path}: {info['documents']} documents, {size:.1f} MB; serves {', '.join(kb_serves(info))}")


def prepare_kb(config: PrepareConfig) -> None:
    _require(config, "documents", "output")
    init_distributed("cpu")
    how = {"chunk_tokens": config.chunk_tokens, "overlap": config.overlap}
    documents, start = _read(config.documents, **how), time.time()
    built_from = sha256_of(Path(config.documents)) if Path(config.documents).is_file() else ""
    build_kb(documents, config.output, config.type, built_from, config.encoder, config.index, how)
    print0(f"built in {time.time() - start:.1f} s")
    _summary(config.output)


def add(config: AddConfig) -> None:
    _require(config, "knowledge_base", "documents")
    info = kb_info(config.knowledge_base)
    add_documents(config.knowledge_base, _read(config.documents, **info["passages"]), config.update)
    _summary(config.knowledge_base)


def remove(config: RemoveConfig) -> None:
    _require(config, "knowledge_base", "ids")
    remove_documents(config.knowledge_base, [i.strip() for i in config.ids.split(",") if i.strip()])
    _summary(config.knowledge_base)


def stats(config: StatsConfig) -> None:
    _require(config, "knowledge_base")
    info, path = kb_info(config.knowledge_base), Path(config.knowledge_base)
    check_files(path, info, whole=config.verify)
    _summary(config.knowledge_base)
    for name in ("type", "encoder", "index", "passages", "built_from"):
        if info.get(name):
            print0(f"{name}: {json.dumps(info[name]) if isinstance(info[name], dict) else info[name]}")
    print0(f"changes since it was built: {len(info['segments'])} segments, {len(info['removed'])} removed documents")
    print0(f"all {len(info['files'])} files are " + ("unchanged" if config.verify else "there"))


def _filters(text: str) -> dict[str, list[str]]:
    filters: dict[str, list[str]] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--filters {text}: write field=value, with commas between several")
        filters.setdefault(name.strip(), []).append(value.strip())
    return filters


def query(config: QueryConfig) -> None:
    _require(config, "knowledge_base", "query")
    options = {"filters": _filters(config.filters), "min_score": config.min_score, "mmr": config.mmr}
    manager = RetrievalManager(
        config.retriever_type, config.knowledge_base, fusion=config.fusion, alpha=config.alpha, **options
    )
    found = manager.retrieve(config.query, config.top_k, rerank=config.rerank)
    for n, doc in enumerate(found, 1):
        print0(f"{doc.score:.4f}  {document_text(doc, n)}\n")
    if not found:
        print0("no document shares a word with the query" + (" and passes the filters" if config.filters else ""))


def judge(ranked: list[str], gold: list[str]) -> dict[str, float]:
    """One question's metrics."""
    precision = {f"precision@{k}": len(set(ranked[:k]) & set(gold)) / k for k in (1, 5)}
    return {**judge_retrieval(ranked, gold), **precision, "ndcg@10": ndcg_at_k(ranked, gold, 10)}


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
    cases = [(name, name, {}) for name in kb_serves(info)]
    if config.rerank:
        cases.append(("rerank", cases[-1][0], {"rerank": config.rerank}))
    for case, name, options in cases:
        retriever, start, ranked = load_retriever(config.knowledge_base, name), time.time(), []
        for at in tqdm(range(0, len(rows), 64), desc=case, unit="batch", leave=False):
            found = retriever.retrieve_batch([row["query"] for row in rows[at : at + 64]], 10, **options)
            ranked += [[doc.id for doc in docs] for docs in found]
        ms = (time.time() - start) / len(rows) * 1000
        judged = [judge(found, row["positive_ids"]) for found, row in zip(ranked, rows, strict=True)]
        result["rows"][case] = {**mean_with_intervals(judged, config.seed), "ms_per_query": ms}
        for kind in kinds:
            part = [scores for scores, row in zip(judged, rows, strict=True) if str(row.get("type", "all")) == kind]
            result["by_type"][kind][case] = mean_with_intervals(part, config.seed)
    metrics = list(judge([], [""]))
    for title, table in [("all", result["rows"]), *(result["by_type"].items() if len(kinds) > 1 else ())]:
        print0(f"\n{title:11} {'n':>5} " + " ".join(f"{metric:>11}" for metric in metrics))
        for name, row in table.items():  # a mean and half of its 95 % interval's width
            half = {m: (row[f"{m}_hi"] - row[f"{m}_lo"]) / 2 for m in metrics}
            print0(f"{name:11} {row['n']:5d} " + " ".join(f"{row[m]:.3f} ±{half[m]:.3f}" for m in metrics))
    if config.output:
        write_json(config.output, result)
    return result


COMMANDS = {
    "prepare_kb": (prepare_kb, PrepareConfig),
    "add": (add, AddConfig),
    "remove": (remove, RemoveConfig),
    "stats": (stats, StatsConfig),
    "query": (query, QueryConfig),
    "eval": (evaluate, EvalConfig),
}


def cli(argv: list[str]) -> None:
    """A command, then options; options alone mean prepare_kb."""
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
