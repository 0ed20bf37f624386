"""Measure a RAG model: does it answer from documents about entities it has never seen, cite them, and abstain?

    python -m scripts.rag_eval --source rag --knowledge_base KB --queries Q/test.jsonl --output rag_eval.json

Every row asks questions of `--queries` in another setting:

    closed_book         no documents: what the weights know
    oracle              the gold document alone
    oracle_distractors_p1 ... _pk   the gold document at position 1 ... k among what else the retriever finds
    retrieved           what the retriever finds in the whole knowledge base, whether the gold is there or not
    distractors_only    what the retriever finds, without any document that holds the answer: should abstain
    unanswerable        questions the knowledge base has no answer to, with what the retriever finds: should abstain
    two_hop             two-hop questions with both gold documents among three distractors
    always_abstain, first_entity   trivial baselines on the documents of `retrieved`: never answer; answer with the
                        first capitalised words of document 1

f1 and em are those of the answer without its citations, the best over accepted variants. hallucination: answered,
and no shown document holds the answer. citation precision and recall are over gold ids. Intervals are 95 % bootstrap.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanochat.checkpoint_manager import load_model, versions
from nanochat.common import UserError, init_distributed, print0, write_json, write_jsonl
from nanochat.config import run
from nanochat.documents import Document
from nanochat.engine import Engine
from nanochat.rag_utils import (
    ABSTENTION,
    all_gold_at_k,
    answer_f1,
    bootstrap_interval,
    citation_precision_recall,
    exact_match,
    extract_citations,
    hallucination,
    is_abstention,
    is_supported,
    recall_at_k,
    strip_citations,
)
from nanochat.retrieval import RetrievalManager
from tasks.factbook import load_queries


@dataclass
class Config:
    source: str = "rag"  # stage of the checkpoint, or a path to a step folder
    model_tag: str = ""  # its tag; empty: the newest
    step: int = 0  # its step; 0: the last
    knowledge_base: str = ""  # folder of the knowledge base
    queries: str = ""  # questions: a .jsonl file
    retriever_type: str = ""  # simple, bm25, dense or hybrid; empty: what the knowledge base was built for
    top_k: int = 5  # documents shown
    max_examples: int = 500  # questions a row
    seed: int = 0  # which questions
    batch_size: int = 32  # answers generated at a time
    max_tokens: int = 48  # tokens an answer may have
    rows: str = ""  # only these rows, comma-separated; empty: all
    show: int = 0  # print this many answers of each row
    device: str = ""  # cpu, cuda or mps; empty: the best one present
    output: str = ""  # write the table here as JSON (answers beside it as .answers.jsonl)


def main(config: Config) -> dict:
    # 1. Model, knowledge base, questions
    if not config.knowledge_base or not config.queries:
        raise UserError("--knowledge_base and --queries are needed, e.g. KB and Q/test.jsonl")
    d = init_distributed(config.device)
    manager = RetrievalManager(retriever_type=config.retriever_type, knowledge_base_path=config.knowledge_base)
    documents = {doc.id: doc for doc in manager.documents}
    rows = load_queries(config.queries)
    model, tokenizer, meta = load_model(
        config.source, d.device, model_tag=config.model_tag or None, step=config.step or None
    )
    engine = Engine(model, tokenizer)

    # 2. The questions of each type, and what the retriever finds for them
    rng = random.Random(config.seed)
    by_type = {
        kind: rng.sample(found, min(config.max_examples, len(found)))
        for kind in ("single", "two_hop", "unanswerable")
        if (found := [r for r in rows if r["type"] == kind and all(p in documents for p in r["positive_ids"])])
    }
    if "single" not in by_type:
        raise UserError(f"{config.queries} has no single-hop question whose gold documents are in this knowledge base")
    asked = [r for kind in by_type.values() for r in kind]
    deep = manager.retrieve_batch([r["query"] for r in asked], config.top_k + 10)
    found = {r["id"]: docs for r, docs in zip(asked, deep)}

    def gold(row: dict) -> list[Document]:
        return [documents[p] for p in row["positive_ids"]]

    def without_answer(row: dict) -> list[Document]:
        """Retrieved documents that aren't gold and don't hold the answer about the same entity."""
        return [doc for doc in found[row["id"]] if doc.id not in row["positive_ids"] and not _holds(doc, row)]

    def at_position(row: dict, p: int) -> list[Document]:
        docs = without_answer(row)[: config.top_k - 1]
        return docs[: p - 1] + gold(row)[:1] + docs[p - 1 :]

    def among(row: dict, golds: list[Document]) -> list[Document]:
        docs = golds + without_answer(row)[: config.top_k - len(golds)]
        return random.Random(row["id"]).sample(docs, len(docs))

    settings: dict[str, tuple[str, Callable[[dict], list[Document]]]] = {
        "closed_book": ("single", lambda r: []),
        "oracle": ("single", lambda r: gold(r)[:1]),
        **{f"oracle_distractors_p{p}": ("single", partial(at_position, p=p)) for p in range(1, config.top_k + 1)},
        "retrieved": ("single", lambda r: found[r["id"]][: config.top_k]),
        "distractors_only": ("single", lambda r: without_answer(r)[: config.top_k]),
        "unanswerable": ("unanswerable", lambda r: found[r["id"]][: config.top_k]),
        "two_hop": ("two_hop", lambda r: among(r, gold(r))),
        "always_abstain": ("single", lambda r: found[r["id"]][: config.top_k]),
        "first_entity": ("single", lambda r: found[r["id"]][: config.top_k]),
    }
    wanted = [name.strip() for name in config.rows.split(",") if name.strip()] or list(settings)
    if unknown := [name for name in wanted if name not in settings]:
        raise UserError(f"--rows {unknown[0]}: choose from {', '.join(settings)}")

    # 3. Ask and judge
    table, log = {}, []
    for name in wanted:
        kind, choose = settings[name]
        if kind not in by_type:
            continue
        questions = by_type[kind]
        shown = [choose(r) for r in questions]
        if name == "always_abstain":
            answers = [ABSTENTION] * len(questions)
        elif name == "first_entity":
            answers = [_first_entity(docs) for docs in shown]
        else:
            conversations = [ask(r["query"], docs) for r, docs in zip(questions, shown)]
            answers = engine.answer_batch(conversations, config.batch_size, config.max_tokens, progress=True)
        judged = [judge(r, docs, a) for r, docs, a in zip(questions, shown, answers)]
        table[name] = summarize(judged, config.seed)
        log += [
            {"row": name, "id": r["id"], "query": r["query"], "answer": a, "answers": r["answers"],
             "documents": [doc.id for doc in docs], "positive_ids": r["positive_ids"]}
            for r, docs, a in zip(questions, shown, answers)
        ]  # fmt: skip
        print0(
            f"{name:20s}" + "  ".join(f"{k} {v:.3g}" for k, v in table[name].items() if not k.endswith(("_lo", "_hi")))
        )
        for r, a in list(zip(questions, answers))[: config.show]:
            print0(f"    {r['query']} -> {a}   (wanted: {r['answer']})")

    used = vars(config) | {"checkpoint_step": meta["step"], "block_pattern": model.config.block_pattern}
    result = {"rows": table, "config": used, "versions": versions()}
    if config.output and d.rank == 0:
        write_json(config.output, result)
        write_jsonl(config.output.removesuffix(".json") + ".answers.jsonl", log)
    return result


def ask(query: str, docs: list[Document]) -> dict:
    """The conversation that asks `query` over `docs` (none: closed book)."""
    user = {"role": "user", "content": query}
    shown = [doc.to_dict() for doc in docs]
    return {"messages": [{"role": "retrieval", "query": query, "documents": shown}, user] if docs else [user]}


def judge(row: dict, docs: list[Document], answer: str) -> dict[str, float]:
    """All measures of one answer. Questions without gold among `docs` count for abstention, the others against it."""
    text = strip_citations(answer)
    refused = is_abstention(answer)
    shown = {doc.id for doc in docs}
    here = [p for p in row["positive_ids"] if p in shown]
    answerable = bool(here) and (row["hops"] == 1 or len(here) == len(row["positive_ids"]))
    out = {
        "f1": 0.0 if refused else answer_f1(text, row["answers"]),
        "em": 0.0 if refused else exact_match(text, row["answers"]),
        "hallucination": 0.0 if refused else hallucination(answer, docs),
        "over_abstention" if answerable else "abstention": float(refused),
    }
    if row["type"] == "unanswerable":
        out["f1"] = out["em"] = float(refused)
    if answerable and not refused:
        gold = row["positive_ids"] if row["hops"] > 1 else here
        precision, recall = citation_precision_recall(extract_citations(answer), docs, gold)
        out |= {"citation_precision": precision, "citation_recall": recall if row["hops"] > 1 else float(precision > 0)}
    if docs:
        ranked = [doc.id for doc in docs]
        if row["positive_ids"]:
            out["recall@k"] = recall_at_k(ranked, row["positive_ids"], len(ranked))
            out["all_gold"] = all_gold_at_k(ranked, row["positive_ids"], len(ranked))
    return out


def summarize(judged: list[dict[str, float]], seed: int) -> dict[str, float]:
    """Means with 95 % bootstrap intervals, each over the answers it is defined for."""
    out: dict[str, float] = {"n": len(judged)}
    for key in sorted({k for j in judged for k in j}, key=list(COLUMNS).index):
        values = [j[key] for j in judged if key in j]
        out[key] = sum(values) / len(values)
        if key in ("f1", "em", "abstention", "over_abstention", "hallucination"):
            out[f"{key}_lo"], out[f"{key}_hi"] = bootstrap_interval(values, seed=seed)
    return out


COLUMNS = ("f1", "em", "citation_precision", "citation_recall", "hallucination", "abstention", "over_abstention",
           "recall@k", "all_gold")  # fmt: skip


def _holds(doc: Document, row: dict) -> bool:
    """Whether a document that isn't marked gold states the answer all the same: same country, answer in its text."""
    country = row.get("country", "")
    return (not country or country in doc.title) and any(is_supported(a, [doc]) for a in row["answers"])


def _first_entity(docs: list[Document]) -> str:
    """The first run of capitalised words in document 1, after its first word: a guess that reads nothing."""
    text = docs[0].content.split(" ", 1)[-1] if docs else ""
    found = re.search(r"[A-Z]\w+(?: [A-Z]\w+)*", text)
    return found.group() + ". [1]" if found else ABSTENTION


if __name__ == "__main__":
    run(main, Config)
