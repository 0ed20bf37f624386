"""Measure a RAG model: does it answer from documents about entities it has never seen, cite them, and abstain?

    python -m scripts.rag_eval --source rag --knowledge_base KB --queries Q/test.jsonl --output rag_eval.json
    torchrun --standalone --nproc_per_node=2 -m scripts.rag_eval ...    # the processes share the questions

Every row asks questions of `--queries` in another setting:

    closed_book         no documents: what the weights know
    oracle              the gold document alone
    oracle_distractors_p1 ... _pk   the gold document at position 1 ... k among what else the retriever finds
    retrieved           what the retriever finds in the whole knowledge base, whether the gold is there or not
    retrieved_together  the same, documents read two by two, too
    retrieved_held_out_wording   the same for questions whose `wording` is "held_out": phrased as none in training
    distractors_only    what the retriever finds, without any document that holds the answer: should abstain
    counterfactual      the gold document with names and answers exchanged: what the weights remember is of no use
    unanswerable        questions the knowledge base has no answer to, with what the retriever finds: should abstain
    contradictory_dated, contradictory_undated   two documents that disagree, among distractors: with a date, the newer
                        one's answer is right; without, both, each with its citation
    two_hop             two-hop questions with both gold documents among three distractors
    two_hop_half        the same with one of the two: should abstain (unless a distractor tells what the other did)
    always_abstain, first_entity   trivial baselines on the documents of `retrieved`: never answer; answer with the
                        first capitalised words of document 1
    oracle_among        the gold document somewhere among distractors; only where --rows asks, like the following
    retrieved_simple, retrieved_bm25 ...   with another retriever than the knowledge base's own

With `--read each` (the default) every document is read alone and the answer comes from the one that speaks most for
itself (nanochat/reader.py). How the model's odds, an evidence reader's and the retriever's opinion are weighed, whose
words are said, and from where on it is better to abstain, `--calibrate Q/val.jsonl` learns beforehand and keeps with
the checkpoint; it takes several files (commas between them), and one that has a knowledge base of its own,
Q/../knowledge_base, is asked of that. With `--read together` the closest sentences of every two are one text to the
evidence reader, too, and what is surest is said, of one or of two (of two only, where calibration had no questions
that take two); without such a reader all are one context to the language model. Always so in `two_hop`,
`two_hop_half` and `retrieved_together`.

Where the retriever finds too few documents, random ones of the knowledge base stand in as distractors. f1 and em are
those of the answer without its citations, the best over accepted variants, contains: whether one of these stands in
it (a quoted sentence may hold the answer without being it); of documents that disagree, what is said first counts, in
contradictory_undated both sides, half each. hallucination: answered, and no shown document holds the answer. Citation
precision and recall are over gold ids, averaged over the `citation_n` questions that were answered and could be; a
single-hop question's recall is 1 if any of its gold documents is cited. ttft_ms: median time from question and
documents to the first token of the answer (to all of it where a calibrated model weighs its words before it speaks),
five asked one at a time with nothing remembered of earlier ones; tokens: what the language model reads for them, on
average, or would if its vote counted. With `--quote true` an answer is always some document's words, so that
hallucination says little: look at f1. Intervals are 95 % bootstrap.
"""

import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanochat.checkpoint_manager import find_checkpoint, list_steps, load_model, run_dir
from nanochat.common import (
    UserError,
    init_distributed,
    is_main,
    over_ranks,
    print0,
    read_jsonl,
    versions,
    write_json,
    write_jsonl,
)
from nanochat.config import run
from nanochat.documents import Document
from nanochat.engine import Engine
from nanochat.knowledge_base import kb_info, kb_serves
from nanochat.rag_utils import (
    ABSTENTION,
    all_gold_at_k,
    answer_f1,
    citation_precision_recall,
    exact_match,
    extract_citations,
    hallucination,
    is_abstention,
    is_supported,
    main_answer,
    mean_with_intervals,
    recall_at_k,
    statements,
    strip_citations,
)
from nanochat.reader import (
    answer_each,
    answer_together,
    answer_views,
    confidence,
    fit_confidence,
    fit_words,
    focus,
    look,
    look_together,
    one_document_each,
    stream_each,
)
from nanochat.retrieval import RetrievalManager
from tasks.factbook import check_fields, judgeable, load_queries
from tasks.rag_task import RAGMix, RAGTask, states_answer

if TYPE_CHECKING:
    from nanochat.evidence import EvidenceReader

SIDE = {"answer", "answers", "date", "title", "passage", "passage_undated"}  # fields of a side of a contradiction
TOGETHER = ("two_hop", "two_hop_half", "retrieved_together")  # rows that are about more than one document
FEW = 200  # questions: with fewer, calibration is luck
TIMED = 5  # questions a row whose first token's time is taken


@dataclass
class Config:
    source: str = "rag"  # stage of the checkpoint, or a path to a step folder
    model_tag: str = ""  # its tag; empty: the newest
    step: int = 0  # its step; 0: the last
    knowledge_base: str = ""  # folder of the knowledge base
    queries: str = ""  # questions: a .jsonl file
    contradictions: str = ""  # documents that disagree: a .jsonl file; empty: contradictions.jsonl beside the questions
    calibrate: str = ""  # validation questions, .jsonl files, to learn from when to abstain; kept with the checkpoint
    evidence: str = ""  # evidence reader to calibrate with, by its tag; empty: the model's tag; none: without
    abstain: float = 0.9  # share of the validation questions without their document that calibration abstains from
    abstain_together: float = 0.6  # in which share of them no two documents answer; one alone still may
    retriever_type: str = ""  # simple, bm25, dense or hybrid; empty: what the knowledge base was built for
    top_k: int = 5  # documents shown
    read: str = "each"  # each: documents are read one by one; together: two by two, too
    quote: bool = True  # answers over documents are in their words; false: the model says what it likes
    max_examples: int = 500  # questions a row
    seed: int = 0  # which questions
    batch_size: int = 32  # answers generated at a time
    max_tokens: int = 48  # tokens an answer may have
    context: int = 0  # tokens of context, more than the model was trained with if you like; 0: as it was trained
    rows: str = ""  # only these rows, comma-separated; empty: all
    show: int = 0  # print this many answers of each row
    device: str = ""  # cpu, cuda or mps; empty: the best one present
    output: str = ""  # write the table here as JSON (answers beside it as .answers.jsonl)


def main(config: Config) -> dict:
    # 1. Model, knowledge base, questions
    if not config.knowledge_base or not config.queries:
        raise UserError("--knowledge_base and --queries are needed, e.g. KB and Q/test.jsonl")
    if config.read not in ("each", "together"):
        raise UserError(f"--read {config.read}: choose each or together")
    for name in ("abstain", "abstain_together"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} {getattr(config, name)}: a share, from 0 to 1")
    for name, least in {"top_k": 1, "max_examples": 1, "batch_size": 1, "max_tokens": 1, "context": 0}.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: at least {least}")
    if config.evidence and not config.calibrate:
        raise UserError("--evidence is for --calibrate, which learns whose words are said; give both")
    d = init_distributed(config.device)
    manager = RetrievalManager(config.retriever_type, config.knowledge_base, cached=True)
    documents = {doc.id: doc for doc in manager.documents}
    rows = load_queries(config.queries)
    checkpoint = find_checkpoint(config.source, config.model_tag or None, config.step or None)
    model, tokenizer, meta = load_model(str(checkpoint), d.device)
    model.config.sequence_len = config.context or model.config.sequence_len
    engine = Engine(model, tokenizer)

    # 2. The questions of each kind, and what the retriever finds for them
    kept = judgeable(rows, documents)
    if len(kept) < len(rows):
        left = f"{len(rows) - len(kept)} of {len(rows)} questions are left out"
        print0(f"{left}: their gold documents (positive_ids) aren't in this knowledge base, or they name none")
    rows = kept
    pools = {kind: [r for r in rows if r["type"] == kind] for kind in ("single", "two_hop", "unanswerable")}
    pools["held_out"] = [r for r in pools["single"] if r.get("wording") == "held_out"]
    rng = random.Random(config.seed)
    by_type = {kind: rng.sample(pool, min(config.max_examples, len(pool))) for kind, pool in pools.items() if pool}
    if "single" not in by_type:
        raise UserError(f"{config.queries} has no single-hop question whose gold documents are in this knowledge base")
    of = {documents[p].metadata.get("split") for r in rows for p in r["positive_ids"]}
    disagree = contradictions(config, of)
    by_type |= {kind: pool for kind, pool in disagree.items() if pool}
    asked = list({r["id"]: r for kind in by_type.values() for r in kind}.values())
    deep = over_ranks(lambda part: manager.retrieve_batch(part, config.top_k + 10), [r["query"] for r in asked])
    found = {r["id"]: docs for r, docs in zip(asked, deep)}

    def gold(row: dict) -> list[Document]:
        known = {doc.id: doc for doc in found[row["id"]]}  # with what the retriever thinks of them
        return [known.get(p) or documents[p] for p in row["positive_ids"]]

    def without_answer(row: dict) -> list[Document]:
        """Retrieved documents that aren't gold and don't hold the answer about the same entity."""
        return [doc for doc in found[row["id"]] if _is_distractor(doc, row)]

    def distractors(row: dict, n: int) -> list[Document]:
        """`n` of them; where the retriever found fewer, random documents of the knowledge base fill up."""
        docs = without_answer(row)[:n]
        if len(docs) < n:
            have = {doc.id for doc in docs}
            order = random.Random(f"{config.seed}/{row['id']}").sample(manager.documents, len(documents))
            more = (doc for doc in order if doc.id not in have and _is_distractor(doc, row))
            docs += islice(more, n - len(docs))
        if len(docs) < n:
            raise UserError(f"the knowledge base has too few documents for --top_k {config.top_k}; lower it")
        return docs

    def at_position(row: dict, p: int) -> list[Document]:
        docs = distractors(row, config.top_k - 1)
        return docs[: p - 1] + gold(row)[:1] + docs[p - 1 :]

    @cache
    def opened(type: str) -> RetrievalManager:
        return RetrievalManager(type, config.knowledge_base, cached=True)

    def by_retriever(type: str, row: dict) -> list[Document]:
        return opened(type).retrieve_batch([row["query"]], config.top_k)[0]

    def among(row: dict, golds: list[Document]) -> list[Document]:
        docs = golds + distractors(row, max(0, config.top_k - len(golds)))
        return random.Random(row["id"]).sample(docs, len(docs))

    others = [t for t in kb_serves(kb_info(config.knowledge_base)) if t != manager.retriever_type]
    by_type["counterfactual"], changed = counterfactual(by_type["single"], pools["single"], documents, config.seed)
    if not by_type["counterfactual"]:
        del by_type["counterfactual"]

    settings: dict[str, tuple[str, Callable[[dict], list[Document]]]] = {
        "closed_book": ("single", lambda r: []),
        "oracle": ("single", lambda r: gold(r)[:1]),
        **{f"oracle_distractors_p{p}": ("single", partial(at_position, p=p)) for p in range(1, config.top_k + 1)},
        "retrieved": ("single", lambda r: found[r["id"]][: config.top_k]),
        "retrieved_together": ("single", lambda r: found[r["id"]][: config.top_k]),
        "retrieved_held_out_wording": ("held_out", lambda r: found[r["id"]][: config.top_k]),
        "distractors_only": ("single", lambda r: without_answer(r)[: config.top_k]),
        "counterfactual": ("counterfactual", lambda r: changed[r["id"]]),
        "unanswerable": ("unanswerable", lambda r: found[r["id"]][: config.top_k]),
        **{f"contradictory_{kind}": (kind, lambda r: among(r, r["sides"])) for kind in ("dated", "undated")},
        "two_hop": ("two_hop", lambda r: among(r, gold(r))),
        "two_hop_half": ("two_hop", lambda r: among(r, random.Random(f"{r['id']}/half").sample(gold(r), 1))),
        "always_abstain": ("single", lambda r: found[r["id"]][: config.top_k]),
        "first_entity": ("single", lambda r: found[r["id"]][: config.top_k]),
        "oracle_among": ("single", lambda r: among(r, gold(r)[:1])),
        **{f"retrieved_{t}": ("single", partial(by_retriever, t)) for t in others},
    }
    if config.read == "together":
        del settings["retrieved_together"]  # it would be the same as retrieved
    wanted = [name.strip() for name in config.rows.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in settings]:
        raise UserError(f"--rows {unknown[0]}: choose from {', '.join(settings)}")
    usual = [name for name in settings if name.removeprefix("retrieved_") not in others and name != "oracle_among"]
    wanted = wanted or [name for name in usual if settings[name][0] in by_type]
    if empty := [name for name in wanted if settings[name][0] not in by_type]:
        asked = config.contradictions or "contradictions.jsonl beside it" if empty[0].startswith("contra") else ""
        beside = f", nor has {asked} of the same split" if asked else ""
        raise UserError(f"--rows {empty[0]}: {config.queries} has no question for it in this knowledge base{beside}")

    # 3. How sure is sure enough?
    if config.calibrate:
        model.evidence = evidence_reader(config, meta["tag"], d.device)
        model.confidence = calibrate(engine, manager, config, {r["id"] for r in rows})
        if d.rank == 0:
            settings_used = {"queries": config.calibrate, "retriever": manager.retriever_type, "top_k": config.top_k}
            settings_used |= {"abstain": config.abstain, "abstain_together": config.abstain_together}
            told = {"confidence": model.confidence, "calibrated": settings_used}
            told["evidence"] = model.evidence and model.evidence.told
            write_json(checkpoint / "meta.json", meta | told)

    # 4. What an answer costs: on one rank, the others wait, and before what is compared is remembered
    baselines = {"always_abstain": lambda docs: ABSTENTION, "first_entity": _first_entity}
    asks = {name: [(r["query"], settings[name][1](r)) for r in by_type[settings[name][0]]] for name in wanted}
    timed = [name for name in wanted if name not in baselines]
    cost = lambda: {name: what_it_costs(engine, manager, config, name, asks[name]) for name in timed}
    costs = over_ranks(lambda part: [{} if n else cost() for n in part], range(d.world_size))[0]

    # 5. Ask and judge
    table, log, known = {}, [], {}
    for name in wanted:
        questions, shown = by_type[settings[name][0]], [docs for _, docs in asks[name]]
        if name in baselines:
            answers, confidences = [baselines[name](docs) for docs in shown], [math.nan] * len(shown)
        else:
            reader = partial(read_and_answer, engine, manager, config, name, known)
            answers, confidences = zip(*over_ranks(reader, asks[name]))
        judged = [judge(r, docs, a) for r, docs, a in zip(questions, shown, answers)]
        cited = sum("citation_precision" in scores for scores in judged)
        table[name] = mean_with_intervals(judged, config.seed) | ({"citation_n": cited} if cited else {})
        table[name] |= costs.get(name, {})
        log += [
            {"row": name, "id": r["id"], "query": r["query"], "answer": a, "answers": r["answers"],
             "documents": [doc.id for doc in docs], "positive_ids": r["positive_ids"], "f1": scores["f1"]}
            | ({"confidence": p} if math.isfinite(p) else {})
            for r, docs, a, p, scores in zip(questions, shown, answers, confidences, judged)
        ]  # fmt: skip
        print0(
            f"{name:27s}" + "  ".join(f"{k} {v:.3g}" for k, v in table[name].items() if not k.endswith(("_lo", "_hi")))
        )
        for r, a in list(zip(questions, answers))[: config.show]:
            print0(f"    {r['query']} -> {a}   (wanted: {r['answer']})")

    used = vars(config) | {
        "confidence": model.confidence,
        "evidence_reader": model.evidence and model.evidence.told,
        "checkpoint_step": meta["step"],
        "block_pattern": model.config.block_pattern,
    }
    result = {"rows": table, "config": used, "versions": versions()}
    if config.output and d.rank == 0:
        write_json(config.output, result)
        write_jsonl(config.output.removesuffix(".json") + ".answers.jsonl", log)
    return result


def evidence_reader(config: Config, tag: str, device: torch.device) -> "EvidenceReader | None":
    """The evidence reader that `--evidence` means, for a model with this tag."""
    if config.evidence == "none":
        return None
    if not config.evidence and not list_steps(run_dir("evidence", tag)):
        print0(f"calibrating without an evidence reader: none is called {tag} (scripts.evidence_train)")
        return None
    from nanochat.evidence import load_evidence

    return load_evidence(config.evidence or tag, device=device)


def reads_each(config: Config, row: str) -> bool:
    return config.read == "each" and not row.startswith(TOGETHER)


def read_and_answer(
    engine: Engine,
    manager: RetrievalManager,
    config: Config,
    row: str,
    known: dict,
    asks: list[tuple[str, list[Document]]],
) -> list[tuple[str, float]]:
    """A row's answers over documents, and their confidence. Where none was found, as in the chat, the abstention."""
    c, answers = config, [(ABSTENTION, math.nan)] * len(asks)
    open_book = [n for n, (_, docs) in enumerate(asks) if docs or row == "closed_book"]
    conversations = [ask(query, manager.compare(query, docs)) for query, docs in (asks[n] for n in open_book)]
    how = (engine, conversations, c.batch_size, c.max_tokens, c.quote, is_main(), known)
    said = zip(*answer_each(*how)) if reads_each(c, row) else ((a, math.nan) for a in answer_together(*how))
    for n, answer in zip(open_book, said):
        answers[n] = answer
    return answers


def what_it_costs(
    engine: Engine, manager: RetrievalManager, config: Config, row: str, asks: list[tuple[str, list[Document]]]
) -> dict[str, float]:
    """`ttft_ms` and `tokens` (see the module's docstring) of a row that asks this."""
    times, tokens, each = [], [], reads_each(config, row)
    for query, docs in [one for one in asks if one[1] or row == "closed_book"][:TIMED]:
        manager.forget()
        start = time.perf_counter()
        conversation = ask(query, manager.compare(query, docs))
        if each:
            [heard] = focus(engine, [conversation], config.max_tokens)
            pieces = stream_each(engine, heard, config.max_tokens, config.quote)
        else:
            pieces = iter(answer_together(engine, [conversation], 1, config.max_tokens, config.quote))
        next(pieces, None)
        times.append(1000 * (time.perf_counter() - start))
        fitted, pointed = engine.model.confidence, engine.model.evidence and config.quote
        alone = each or (pointed and fitted and fitted["together"])  # each is read alone first, then every two
        views = (one_document_each(conversation) if alone else []) or [conversation]
        asked = views if alone or not (pointed and docs) else []  # the evidence reader needs no language model
        tokens.append(sum(len(engine.prompt(view, config.max_tokens)) for view in asked))
    return {"ttft_ms": float(np.median(times)), "tokens": float(np.mean(tokens))} if times else {}


def calibrate(engine: Engine, manager: RetrievalManager, config: Config, judged: set[str]) -> dict:
    """How sure an answer is and from where on it is given (`fit_confidence`), from the files of `--calibrate`.

    `judged` are the ids of the questions that are to be judged; none of them may be learned from.
    """
    asked, without, views, together = [], [], [], []
    engine.model.confidence = None  # an earlier calibration's may spare the model from being asked
    for path in map(str.strip, config.calibrate.split(",")):
        rows = load_queries(path)
        if {r["id"] for r in rows} & judged:
            raise UserError(
                f"--calibrate {path} has questions that --queries has, too; give it the validation questions"
            )
        own = Path(path).resolve().parent.parent / "knowledge_base"
        other = (own / "kb.json").exists() and own.resolve() != Path(config.knowledge_base).resolve()
        of = RetrievalManager(manager.retriever_type, own, cached=True) if other else manager
        there, gone, read = calibration_features(engine, of, config, rows, path)
        asked, without, views = asked + there, without + gone, views + read
        together += features_together(engine, of, config, rows)
    fitted = fit_confidence(asked, without, config.abstain)
    known = sum(mask.any() for _, mask in asked)
    print0(f"calibrated on {known} questions that a document found answers, {len(asked) - known} that none does")
    if len(asked) < FEW:
        print0(f"fewer than {FEW} are little to learn from: it may answer and abstain worse than before")
    # And with the documents that these weights choose, whose words are to be trusted
    rows, best = [], []
    for (features, mask), (row, each) in zip(asked, views):
        if mask.any():
            rows.append(row)
            best.append(each[confidence(features, fitted).argmax()])
    engine.model.confidence = fitted  # from here on, abstaining is not the model's affair
    speak = lambda part: answer_views(engine, part, config.batch_size, config.max_tokens, progress=is_main())
    sure, better = [], []
    for (answer, logprob), view, row in zip(over_ranks(speak, best), best, rows):
        if evidence := view.get("evidence"):
            own, other = (answer_f1(text, row["answers"]) for text in (main_answer(answer), evidence["text"]))
            if own != other:
                sure.append((logprob, evidence["logprob"]))
                better.append(own > other)
    right = [(f, mask) for f, mask, whole in together if whole]
    wrong = [f for f, _, whole in together if not whole]
    learnt = wrong and any(mask.any() for _, mask in right)
    two = fit_confidence(right, wrong, config.abstain_together, count_rivals=False) if learnt else None
    return fitted | {"words": fit_words(sure, better), "together": two}


def features_together(
    engine: Engine, manager: RetrievalManager, config: Config, rows: list[dict]
) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """What `fit_confidence` takes for two documents: `look_together`'s features, in which two that a question takes the
    right words were found, and whether it can be answered. Of 100 two-hop questions, once with both their documents
    among distractors and once with one, and of 100 others without the document that answers.
    """
    if engine.model.evidence is None:
        return []
    documents, asks = {doc.id: doc for doc in manager.documents}, []
    for kind in ("two_hop", "single"):
        pool = [r for r in rows if r["type"] == kind and documents.keys() >= {*r["positive_ids"]}]
        pool = [r for r in pool if kind == "single" or len({*r["positive_ids"]}) == 2]
        pool = random.Random(config.seed).sample(pool, min(config.max_examples, 100, len(pool)))
        found = over_ranks(lambda part: manager.retrieve_batch(part, config.top_k + 10), [r["query"] for r in pool])
        for row, docs in zip(pool, found):
            rng, known = random.Random(row["id"]), {doc.id: doc for doc in docs}
            gold = [known.get(p) or documents[p] for p in row["positive_ids"]]
            others = [doc for doc in docs if _is_distractor(doc, row)]
            for kept in (gold, rng.sample(gold, 1)) if kind == "two_hop" else ([],):
                if shown := kept + others[: max(0, config.top_k - len(kept))]:
                    asks.append((row, rng.sample(shown, len(shown)), kept is gold))

    def read(part: list[tuple[dict, list[Document], bool]]) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        conversations = [ask(row["query"], manager.compare(row["query"], docs)) for row, docs, _ in part]
        out = []
        for (row, docs, whole), (texts, found, features) in zip(part, look_together(engine, conversations)):
            two = [{docs[doc["number"] - 1].id for doc in text} for text in texts]
            said = [answer_f1(e.text, row["answers"]) if e else 0.0 for e in found]
            right = [ids >= {*row["positive_ids"]} and f1 > 0.5 for ids, f1 in zip(two, said)]
            out.append((features, np.array(right), whole))
        return out

    return over_ranks(read, asks)


def calibration_features(
    engine: Engine, manager: RetrievalManager, config: Config, rows: list[dict], path: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray], list[tuple[dict, list[dict]]]]:
    """What `fit_confidence` takes: 300 questions with what the retriever finds, and 250 that nothing answers, though
    passages may be about the very thing asked; and the 300 without their gold documents.

    And of each of the former, the question and its documents one by one.
    """
    rng, drawn = random.Random(config.seed), []
    for kind, most in (("single", 300), ("unanswerable", 250)):
        pool = [r for r in rows if r["type"] == kind]
        drawn += rng.sample(pool, min(config.max_examples, most, len(pool)))
    found = over_ranks(lambda part: manager.retrieve_batch(part, config.top_k + 10), [r["query"] for r in drawn])
    asked = []  # the question, all that is found, and of that what doesn't answer: one rank reads what both have once
    for row, docs in zip(drawn, found):
        asked.append((row, docs[: config.top_k], [doc for doc in docs if _is_distractor(doc, row)][: config.top_k]))

    def views(part: list[tuple[dict, list[Document], list[Document]]]) -> list:
        both = [(row["query"], docs) for row, *each in part for docs in each]
        read = [ask(query, manager.compare(query, docs)) for query, docs in both]
        looked = look(engine, read, config.max_tokens, config.batch_size, is_main())
        return list(zip(looked[::2], looked[1::2]))

    there, gone, read = [], [], []
    for (row, docs, others), ((shown, features), (_, without)) in zip(asked, over_ranks(views, asked)):
        answered = any(_is_gold(doc, row) for doc in docs)
        if answered or (docs and row["type"] == "unanswerable"):
            there.append((features, np.array([not _is_distractor(doc, row) for doc in docs])))
            read.append((row, shown))
        if others and row["type"] == "single":
            gone.append(without)
    if not any(mask.any() for _, mask in there) or not gone:
        raise UserError(f"--calibrate {path}: no question of one hop finds its gold document, or nothing else")
    return there, gone, read


def contradictions(config: Config, splits: set) -> dict[str, list[dict]]:
    """Questions to which two documents, `sides`, give different answers, dated and undated ones: where they and the
    questions to be judged have splits, those of these `splits`.
    """
    path = Path(config.contradictions or Path(config.queries).parent / "contradictions.jsonl")
    if not config.contradictions and not path.exists():
        return {}
    rows = [{k: v for k, v in r.items() if v is not None} for r in read_jsonl(path, ("id", "query", "old", "new"))]
    for n, r in enumerate(rows, 1):
        check_fields(r, f"{path}, record {n}")
        for age in ("old", "new"):
            if not isinstance(r.get(age), dict) or not r[age].keys() >= SIDE:
                raise UserError(f"{path}: 'old' and 'new' of {r['id']!r} need {', '.join(sorted(SIDE))}")
            check_fields(r[age], f"{path}, record {n}, '{age}'")
    rows = [r for r in rows if "split" not in r or r["split"] in splits or splits <= {None}]
    rows = random.Random(config.seed).sample(rows, min(config.max_examples, len(rows)))
    out: dict[str, list[dict]] = {}
    for kind, key in (("dated", "passage"), ("undated", "passage_undated")):
        out[kind] = []
        for r in rows:
            dates = [{"date": r[age]["date"]} if kind == "dated" else {} for age in ("old", "new")]
            old, new = (
                Document(f"{r['id']}-{age}", r[age]["title"], r[age][key], metadata=date)
                for age, date in zip(("old", "new"), dates)
            )
            told = {"answer": r["new"]["answer"], "answers": r["new"]["answers"], "also": r["old"]["answers"]}
            told |= {"positive_ids": [old.id, new.id], "sides": [old, new], "hops": 2, "type": kind}
            out[kind].append({**r, **told, "id": f"{r['id']}-{kind}"})
    return out


def counterfactual(
    rows: list[dict], pool: list[dict], documents: dict[str, Document], seed: int
) -> tuple[list[dict], dict[str, list[Document]]]:
    """The questions, and by their ids their gold documents, with names and answers exchanged.

    The country gets an invented name, and the answer is that to one of `pool` about another country; questions where it
    can't be exchanged consistently are left out.
    """
    mix = RAGMix(absent=0, counterfactual=1, follow_up=0, max_docs=1)
    task = RAGTask(pool, {i: doc.to_dict() for i, doc in documents.items()}, mix, seed=seed)
    places = {row["id"]: i for i, row in enumerate(task.rows)}
    asked, shown = [], {}
    for row in rows:
        read, question, answer = task[places[row["id"]]]["messages"]
        wanted = strip_citations(answer["content"]).rstrip(".")
        if wanted == row["answer"]:  # it could not be exchanged
            continue
        asked.append({**row, "query": question["content"], "answer": wanted, "answers": [wanted]})
        shown[row["id"]] = [Document.from_dict({**doc, "score": None}) for doc in read["documents"]]
    return asked, shown


def ask(query: str, docs: list[Document]) -> dict:
    """The conversation that asks `query` over `docs` (none: closed book)."""
    user = {"role": "user", "content": query}
    shown = [doc.shown() for doc in docs]
    return {"messages": [{"role": "retrieval", "query": query, "documents": shown}, user] if docs else [user]}


def judge(row: dict, docs: list[Document], answer: str) -> dict[str, float]:
    """All measures of one answer. Questions without gold among `docs` count for abstention, the others against it."""
    text, said = main_answer(answer), statements(answer)
    refused = is_abstention(answer)
    shown = {doc.id for doc in docs}
    here = [p for p in row["positive_ids"] if p in shown]
    answerable = bool(here) and (row["hops"] == 1 or len(here) == len(row["positive_ids"]))
    out = {
        "f1": 0.0 if refused else answer_f1(text, row["answers"]),
        "em": 0.0 if refused else exact_match(text, row["answers"]),
        "contains": float(
            not refused and any(is_supported(a, [{"title": "", "content": text}]) for a in row["answers"])
        ),
        "hallucination": 0.0 if refused else max((hallucination(words, docs) for words, _ in said), default=0.0),
        "over_abstention" if answerable else "abstention": float(refused),
    }
    if row["type"] == "undated":  # each side counts where its own document is cited for it
        places = {doc.id: n for n, doc in enumerate(docs, 1)}
        sides = list(zip(row["positive_ids"], (row["also"], row["answers"])))
        for name, measure in (("f1", answer_f1), ("em", exact_match)):
            best = [max((measure(w, a) for w, cites in said if places.get(p) in cites), default=0.0) for p, a in sides]
            out[name] = sum(best) / 2
    if row["type"] == "unanswerable":
        out["f1"] = out["em"] = out["contains"] = float(refused)
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


def _is_distractor(doc: Document, row: dict) -> bool:
    """Neither gold nor, though not marked so, an answer all the same."""
    told = states_answer(doc, row) or ("also" in row and states_answer(doc, row | {"answers": row["also"]}))
    return not _is_gold(doc, row) and not told


def _is_gold(doc: Document, row: dict) -> bool:
    return doc.id in row["positive_ids"]


def _first_entity(docs: list[Document]) -> str:
    """The first run of capitalised words in document 1, after its first word: a guess that reads nothing."""
    text = docs[0].content.split(" ", 1)[-1] if docs else ""
    found = re.search(r"[A-Z]\w+(?: [A-Z]\w+)*", text)
    return found.group() + ". [1]" if found else ABSTENTION


if __name__ == "__main__":
    run(main, Config)
