"""Find passages: four retrievers over a knowledge base, their options, and the one door to them, `RetrievalManager`.

    python -m nanochat.retrieval prepare_kb --documents FILE_OR_FOLDER --output kb [--type simple|bm25|dense|hybrid]
    python -m nanochat.retrieval query --knowledge_base kb --query "What is machine learning?" --top_k 5
    python -m nanochat.retrieval add --knowledge_base kb --documents more.jsonl
    python -m nanochat.retrieval remove --knowledge_base kb --ids first,second
    python -m nanochat.retrieval eval --knowledge_base kb --queries queries/test.jsonl --output retrieval_eval.json

    manager = RetrievalManager(retriever_type="simple", knowledge_base_path="kb")
    for doc in manager.retrieve("What is machine learning?", top_k=3): print(f"{doc.score:.3f}: {doc.title}")

The retrievers themselves are in retrievers.py, the folder's format in knowledge_base.py.
"""

import copy
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from nanochat.documents import Document
from nanochat.knowledge_base import (
    TYPES,
    Documents,
    KnowledgeBase,
    add_documents,
    build_kb,
    check_files,
    get_kb_encoder,
    kb_info,
    kb_serves,
    open_kb,
    remove_documents,
)
from nanochat.rag_utils import document_text, judge_retrieval, mean_with_intervals, ndcg_at_k
from nanochat.retrievers import (
    INDEXES,
    MAX_QUERY_CHARS,
    BM25Retriever,
    DenseRetriever,
    HybridRetriever,
    Retriever,
    SimpleRetriever,
    check_choice,
)
from nanochat.tokenizer import check_conversation

SEARCH_VERSION = 1  # part of the cache's key: raise it when the same question gets another answer
# below this many documents, the indexes of a changed knowledge base are made anew when it is opened
REINDEX = 20_000

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
    described = kb.info["index"]
    if described["kind"] not in INDEXES or not isinstance(described["effort"], int):
        raise ValueError("kb.json doesn't say what index.faiss is")
    return DenseRetriever(documents, encoder, vectors, index, described, keep)


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
        """The best documents for the query, best first: copies with `score` and, where vectors are compared,
        `similarity` set. `options` as in `Retriever.search`."""
        return self.compare(query, self.retrieve_batch([query], top_k, **options)[0])

    def compare(self, query: str, documents: Sequence[Document]) -> list[Document]:
        """Copies of any documents with their `similarity` to the query, if this retriever compares vectors."""
        return self.retriever.compare(query, documents)

    def forget(self) -> None:
        """Drop what earlier comparisons left in memory, so that the next one takes as long as a first."""
        self.retriever.forget()

    def retrieve_batch(self, queries: Sequence[str], top_k: int | None = None, **options) -> list[list[Document]]:
        """The documents for many queries at once, not compared: that takes a few milliseconds a document."""
        retriever, top_k, options = self.retriever, self.top_k if top_k is None else top_k, {**self.options, **options}
        if self.cache is None or not all(isinstance(query, str) for query in queries):
            return retriever.retrieve_batch(queries, top_k, **options)
        asked = [SEARCH_VERSION, retriever.kb.digest, self.retriever_type, self.fusion, self.alpha, top_k, options]
        asked = json.dumps(asked, sort_keys=True, default=str).encode()
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
        documents = [doc.shown() for doc in self.retrieve(query, top_k, **options)]
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
    chunk_tokens: int = 128  # the most tokens of a passage; documents in .jsonl files stay whole, unless --split
    overlap: int = 24  # tokens that a passage repeats of the one before it
    split: bool = False  # cut the documents of .jsonl files, too


@dataclass
class AddConfig:
    """add: files -> more documents in a knowledge base; only they are embedded."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    documents: str = ""  # a file or folder as for prepare_kb; it is cut into passages as that was
    update: bool = False  # replace what has the same id or was in the same file; else a known id is an error


@dataclass
class RemoveConfig:
    """remove: take documents out of a knowledge base."""

    knowledge_base: str = ""  # a folder made by prepare_kb
    ids: str = ""  # the documents' ids, with commas between them; or @FILE with one in each line


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
    rerank: str = "late"  # a further row: the 50 best of the last one (hybrid, if served), reranked; empty for none
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
    check_choice("retriever type", config.type, TYPES)
    if Path(config.output).is_file():
        raise UserError(f"--output {config.output} is a file; name a folder")
    if (Path(config.output) / "kb.json").is_file():
        print0(f"{config.output}: a knowledge base, which is replaced when the new one is complete")
    how = {"chunk_tokens": config.chunk_tokens, "overlap": config.overlap}
    if config.split:
        how["chunk"] = True
    documents, start = _read(config.documents, **how), time.time()
    built_from = sha256_of(Path(config.documents)) if Path(config.documents).is_file() else ""
    build_kb(documents, config.output, config.type, built_from, config.encoder, config.index, how)
    print0(f"built in {time.time() - start:.1f} s")
    _summary(config.output)


def add(config: AddConfig) -> None:
    _require(config, "knowledge_base", "documents")
    passages = kb_info(config.knowledge_base)["passages"]
    how = {name: passages[name] for name in ("chunk_tokens", "overlap", "chunk") if name in passages}
    documents, kb = _read(config.documents, **how), open_kb(config.knowledge_base)
    # of a file that was read again, the passages it no longer has
    files, ids = {doc.source for doc in documents if "start" in doc.metadata}, {doc.id for doc in documents}
    old = kb.documents if files else ()
    outdated = [doc.id for doc in old if doc.source in files and "start" in doc.metadata and doc.id not in ids]
    if outdated and not config.update:
        print0(f"{len(outdated)} passages that these files no longer have stay; --update true takes them out")
        outdated = []
    known = kb.everything.find([doc.id for doc in documents], kb.keep)  # ids of passages say what is in them
    new = [doc for doc in documents if not ("start" in doc.metadata and doc.id in known)]
    if len(new) < len(documents):
        print0(f"{len(documents) - len(new)} passages are there already")
    if new or outdated:
        add_documents(config.knowledge_base, new, config.update, outdated)
    _summary(config.knowledge_base)


def remove(config: RemoveConfig) -> None:
    _require(config, "knowledge_base", "ids")
    ids = config.ids.split(",")
    if config.ids.startswith("@"):  # an id may have a comma in it
        try:
            ids = Path(config.ids[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--ids {config.ids}: cannot read the file ({e})") from e
    ids = [i.strip() for i in ids if i.strip()]
    if not ids:
        raise UserError("--ids names no document; query shows ids")
    remove_documents(config.knowledge_base, ids)
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
        print0(f"{doc.score:.4f}  {doc.id}\n{document_text(doc, n)}\n")
    if not found:
        asked = config.filters or config.min_score is not None
        print0(
            "no document shares a word with the query" + (" and passes the filters and --min_score" if asked else "")
        )


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
    if config.output and Path(config.output).is_dir():
        raise UserError(f"--output {config.output} is a folder; name a file")
    rows = [row for row in read_jsonl(config.queries, ("query",)) if row.get("positive_ids")]
    for row in rows:
        ids = row["positive_ids"]
        if not isinstance(row["query"], str) or not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise UserError(f"{config.queries}: a query must be text and positive_ids a list of document ids")
    if config.max_examples and len(rows) > config.max_examples:
        rows = random.Random(config.seed).sample(rows, config.max_examples)
    if not rows:
        raise UserError(f"{config.queries} has no question with positive_ids, the documents that answer it")
    known = load_retriever(config.knowledge_base, "simple").kb
    wanted = {i for row in rows for i in row["positive_ids"]}
    if not known.everything.find(sorted(wanted), known.keep):
        raise UserError(f"{config.queries}: none of its positive_ids is in {config.knowledge_base}; is it another's?")
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
