"""RAG fine-tuning: answer from several documents, cite the one that says so, abstain when none does.

    python -m scripts.rag_finetune --knowledge_base data/rag_examples/knowledge_base
    torchrun --standalone --nproc_per_node=8 -m scripts.rag_finetune --knowledge_base KB --source mid --model_tag d20 \\
        --block_pattern T9,M11 --retriever_type simple --top_k 5 --device_batch_size 4

Questions come from `--queries` (default: the `queries/` folder beside the knowledge base). Each is asked over its gold
document alone or among distractors, many of them what the retriever finds; in a share of examples the gold document is
missing and the answer is the abstention. Documents are drawn, shuffled and numbered anew every epoch
(tasks/rag_task.py). Excerpts of one document are most of the practice, because that is how answers are given by default
(nanochat/reader.py): the model has to know whether this one answers. A few more of them are from handbooks
about everything (tasks/handbooks.py) than from `--queries`. The rest are several documents cut to three sentences, and
whole ones. `--keep_best one_score` (the mean of F1 and abstention over one document) with `--early_stop 3` keeps the
best checkpoint and stops when it gets no better. `--block_pattern`, where given, must be the checkpoint's.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.checkpoint_manager import load_model, parent_meta
from nanochat.common import UserError, init_distributed, parse_pattern
from nanochat.config import run
from nanochat.dataloader import PackedLoader
from nanochat.memory_estimate import checkpoint_shape, dry_run
from nanochat.retrieval import RetrievalManager
from nanochat.train import Eval, TrainConfig, train
from tasks.common import ConversationStream, JSONLTask, MixStream, TaskMixture
from tasks.drills import LADDER, DrillStream
from tasks.factbook import ChatPairs, load_queries
from tasks.fiction import make_world
from tasks.handbooks import HandbookTask, load_handbooks
from tasks.rag_task import RAGMix, RAGTask, reading_eval
from tasks.retrieval_qa import retrieve_all


@dataclass
class Config(TrainConfig):
    knowledge_base: str = ""  # folder of the knowledge base (python -m nanochat.retrieval prepare_kb makes one)
    queries: str = ""  # folder with train.jsonl and val.jsonl; empty: ../queries seen from the knowledge base
    source: str = "mid"  # stage to start from
    source_step: int = 0  # its step; 0: the last
    model_tag: str = ""  # tag to start from and to write under; empty: the newest
    block_pattern: str = ""  # if given, the checkpoint must have this pattern
    retriever_type: str = "simple"  # who finds distractors: simple, bm25, dense or hybrid
    top_k: int = 5  # documents in a context, at most
    num_iterations: int = 400  # optimizer steps
    sequence_len: int = 1024  # tokens per row
    absent: float = 0.3  # share of contexts without their first question's gold document, and of near misses
    paired: float = 0.5  # share of contexts in which every question has a near miss that differs by the country only
    counterfactual: float = 0.25  # share of examples with names and answers exchanged
    bare: float = 0.04  # share of contexts without any document: what is asked is abstained from
    reword: float = 0.4  # share of questions put into a frame that no question file has
    conversations: str = ""  # your own conversations to mix in: a .jsonl file of {"messages": [...]}
    chat_share: float = 0.03  # share of plain chat
    drill_share: float = 0.02  # share of drills
    fiction_share: float = 0.05  # share of contexts with one document from an invented world (tasks/fiction.py)
    handbook_share: float = 0.4  # share of contexts with an excerpt of a handbook's document (tasks/handbooks.py)
    one_share: float = 0.35  # share of contexts with an excerpt of one document (of two for two hops)
    short_share: float = 0.05  # share of contexts with several, cut to three sentences; the rest: one or several, whole
    eval_every: int = 100  # steps between validations (0: only at the end)
    val_examples: int = 100  # questions a validation


def main(config: Config) -> dict[str, float]:
    if config.dry_run:
        shape = checkpoint_shape(config.source, config.model_tag, config.source_step, config.block_pattern)
        check_pattern(config, shape.block_pattern)
        return dry_run(config, shape)

    # 1. Knowledge base and questions
    if not config.knowledge_base:
        raise UserError("--knowledge_base is needed; python -m scripts.prepare_rag_dataset makes an example one")
    for name in ("top_k", "val_examples"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")
    manager = RetrievalManager(config.retriever_type, config.knowledge_base, cached=True)
    documents = {doc.id: doc.to_dict() for doc in manager.documents}
    queries = Path(config.queries or Path(config.knowledge_base).resolve().parent / "queries")
    train_rows, val_rows = load_queries(queries / "train.jsonl"), load_queries(queries / "val.jsonl")

    # 2. Model
    d = init_distributed(config.device)
    model, tokenizer, meta = load_model(
        config.source, d.device, "train", config.model_tag or None, config.source_step or None
    )
    config.model_tag = config.model_tag or meta["tag"]
    check_pattern(config, model.config.block_pattern)
    model.config.sequence_len = max(model.config.sequence_len, config.sequence_len)

    # 3. Data
    found = retrieve_all(manager, train_rows)
    shares = (config.absent, config.paired, config.counterfactual)
    usual = {"follow_up": 0.9, "max_questions": 10, "reword": config.reword, "careless": 0.1, "bare": config.bare}
    whole = RAGMix(*shares, max_docs=config.top_k, **usual)
    one = replace(whole, max_docs=1, sentences=3)
    easier = replace(one, absent=0.15, paired=0.1)  # prose of all kinds is hard enough
    short = replace(whole, min_docs=min(2, config.top_k), sentences=3)
    world, books = make_world("train"), load_handbooks("train")
    tasks = {
        "one": RAGTask(train_rows, documents, one, found, config.seed + 2),
        "whole": RAGTask(train_rows, documents, whole, found, config.seed),
        "short": RAGTask(train_rows, documents, short, found, config.seed + 1),
        "fiction": RAGTask(world.queries, world.documents, one, seed=config.seed + 3),
        "handbook": HandbookTask(books.queries, books.documents, easier, seed=config.seed + 4),
        "chat": TaskMixture([ChatPairs("train")] + ([JSONLTask(config.conversations)] if config.conversations else [])),
    }
    shares = {
        name: getattr(config, f"{name}_share") for name in ("chat", "drill", "fiction", "handbook", "one", "short")
    }
    shares["whole"] = 1 - sum(shares.values())
    limit = config.sequence_len + 1
    streams = {name: ConversationStream(task, tokenizer, limit, config.seed) for name, task in tasks.items()}
    streams["drill"] = DrillStream(tokenizer, config.seed, level=len(LADDER) - 1)
    stream = MixStream(streams, shares, config.seed, d.world_size)
    loader = PackedLoader(stream, config.device_batch_size, config.sequence_len, d.rank, d.world_size)

    # 4. Validation on questions about other entities, half of them without the gold document: one document, several
    # that the retriever finds, one from another invented world or another handbook
    single = [r for r in val_rows if r["type"] == "single"] or val_rows
    single = random.Random(0).sample(single, min(config.val_examples, len(single)))
    val_found = retrieve_all(manager, single)
    invented, unread = make_world("val", 200), load_handbooks("val")
    several = RAGMix(absent=0.5, counterfactual=0, follow_up=0, min_docs=config.top_k, max_docs=config.top_k)
    fixed = replace(several, min_docs=1, max_docs=1, sentences=2)
    asked = {
        "one": RAGTask(single, documents, fixed, val_found),
        "several": RAGTask(single, documents, several, val_found),
        "handbook": RAGTask([r for r in unread.queries if r["type"] == "single"], unread.documents, fixed),
        "fiction": RAGTask([r for r in invented.queries if r["type"] == "single"], invented.documents, fixed),
    }
    evals = [
        Eval(name, config.eval_every, reading_eval(tokenizer, task, config.val_examples, prefix=f"{name}_"))
        for name, task in asked.items()
    ]
    return train(
        model, loader, config, source="rag", tokenizer=tokenizer, evals=evals, dist_info=d,
        meta=parent_meta(meta) | {"knowledge_base": config.knowledge_base},
    )  # fmt: skip


def check_pattern(config: Config, pattern: str) -> None:
    if config.block_pattern and parse_pattern(config.block_pattern) != pattern:
        raise UserError(f"--block_pattern {config.block_pattern}, but the {config.source} checkpoint has {pattern}")


if __name__ == "__main__":
    run(main, Config)
