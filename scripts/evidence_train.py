"""Train the evidence reader: MiniLM learns to point at the words of documents that answer a question.

    python -m scripts.evidence_train --knowledge_base data/rag_examples/knowledge_base --model_tag cpu
    torchrun --standalone --nproc_per_node=2 -m scripts.evidence_train --knowledge_base KB --model_tag cpu

Questions are those of `--queries` (default: the `queries/` folder beside the knowledge base), of handbooks about
everything (tasks/handbooks.py) and of an invented world (tasks/fiction.py), with and without the document that answers,
drawn as for RAG fine-tuning (tasks/rag_task.py): excerpts, whole documents, two at once, what takes two of them.
Starts from the packaged MiniLM and needs no language model. scripts.rag_eval --calibrate learns how much weight it
gets beside the language model of the same tag (nanochat/evidence.py, nanochat/reader.py).
"""

from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.common import UserError, init_distributed
from nanochat.config import run
from nanochat.documents import Document
from nanochat.evidence import EvidenceConfig, Pointer, pointer_loss
from nanochat.retrieval import RetrievalManager
from nanochat.retrievers import BM25Retriever
from nanochat.train import Eval, TrainConfig, train
from tasks.common import MixStream, check_shares
from tasks.evidence import PairLoader, PointerStream, pointing_eval
from tasks.factbook import load_queries
from tasks.fiction import make_world
from tasks.handbooks import HandbookTask, load_handbooks
from tasks.rag_task import RAGMix, RAGTask
from tasks.retrieval_qa import retrieve_all


@dataclass
class Config(TrainConfig):
    knowledge_base: str = ""  # folder of the knowledge base (python -m nanochat.retrieval prepare_kb makes one)
    queries: str = ""  # folder with train.jsonl and val.jsonl; empty: ../queries seen from the knowledge base
    retriever_type: str = "bm25"  # who finds the distractors of --queries: simple, bm25, dense or hybrid
    model_tag: str = "evidence"  # name of the run's folder; rag_eval looks for the language model's
    num_iterations: int = 1000  # optimizer steps
    device_batch_size: int = 32  # rows of sequence_len word pieces per micro-batch and process
    sequence_len: int = 128  # word pieces a row; what is longer or shorter makes fewer or more rows of it
    matrix_lr: float = 1.3e-3  # learning rate of the layers' matrices (Muon)
    pointer_lr: float = 2e-4  # learning rate of the rest (AdamW)
    warmup_ratio: float = 0.05  # share of the run in which the learning rate rises linearly from 0
    warmdown_ratio: float = 0.9  # share of the run in which it falls linearly, at the end
    fiction_share: float = 0.36  # share of contexts from an invented world (tasks/fiction.py)
    handbook_share: float = 0.32  # share of contexts from handbooks (tasks/handbooks.py)
    two_hop_share: float = 0.16  # share of all contexts that hold two documents, of which the question takes both
    pair_share: float = 0.04  # share of all contexts that hold two documents, whatever is asked
    whole_share: float = 0.08  # share of all contexts that hold a whole one (or two hops' two); the rest: an excerpt
    val_examples: int = 200  # questions a validation


def main(config: Config) -> dict[str, float]:
    for name in ("dry_run", "compile", "gradient_checkpointing"):
        if getattr(config, name):
            raise UserError(f"--{name} isn't for the evidence reader")
    if not config.model_tag:
        raise UserError("--model_tag is needed: the language model's, which looks for it there")
    for name in ("sequence_len", "device_batch_size", "val_examples"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")

    # 1. Knowledge base and questions
    if not config.knowledge_base:
        raise UserError("--knowledge_base is needed; python -m scripts.prepare_rag_dataset makes an example one")
    d = init_distributed(config.device)
    manager = RetrievalManager(config.retriever_type, config.knowledge_base, cached=True)
    documents = {doc.id: doc.to_dict() for doc in manager.documents}
    queries = Path(config.queries or Path(config.knowledge_base).resolve().parent / "queries")
    train_rows, val_rows = load_queries(queries / "train.jsonl"), load_queries(queries / "val.jsonl")
    world, books = make_world("train"), load_handbooks("train")
    found = {"queries": retrieve_all(manager, train_rows)}  # what looks alike, among it who only names the thing asked
    for name, other in (("fiction", world), ("handbook", books)):
        retriever = BM25Retriever([Document.from_dict(doc) for doc in other.documents.values()])
        # for a short run not for all: the others' distractors are alike or random, and nobody waits for hours of search
        found[name] = retrieve_all(retriever, other.queries[: 100 * config.num_iterations])

    # 2. What is practised: of three sources excerpts of one document, whole ones, two at once, and what takes two
    usual = RAGMix(0.35, 0.0, 0.25, follow_up=0.9, max_questions=6, max_docs=1, alike=0.1, reword=0.4, careless=0.1)
    easier = replace(usual, absent=0.25)
    pair = {"min_docs": 2, "max_docs": 2, "sentences": 4}  # reader.answer_together has two read at a time
    two = pair | {"follow_up": 0.0, "absent": 0.5}
    sizes = {"whole": {}, "pair": pair, "two_hop": two, "excerpt": {"sentences": 5}}
    sources = {
        "queries": (RAGTask, train_rows, documents, usual),
        "fiction": (RAGTask, world.queries, world.documents, usual),
        "handbook": (HandbookTask, books.queries, books.documents, easier),
    }
    shares = {name: getattr(config, f"{name}_share") for name in ("fiction", "handbook", "whole", "pair", "two_hop")}
    shares["queries"] = 1 - shares["fiction"] - shares["handbook"]
    shares["excerpt"] = 1 - shares["whole"] - shares["pair"] - shares["two_hop"]
    for parts in (sources, sizes):  # an error names what the flags do
        check_shares({name: shares[name] for name in parts})
    streams, weights = {}, {}
    for size, how in sizes.items():
        for name, (kind, rows, docs, mix) in sources.items():
            seed = config.seed + len(streams)
            hops = size == "two_hop"
            if chosen := [r for r in rows if not hops or r["type"] == "two_hop"]:
                task = kind(chosen, docs, replace(mix, **how), found[name], seed, rows if hops else ())
                streams[f"{name} {size}"] = PointerStream(task, seed)
                weights[f"{name} {size}"] = shares[name] * shares[size]
    stream = MixStream(streams, weights, config.seed, d.world_size)
    loader = PairLoader(stream, config.device_batch_size, config.sequence_len, d.rank, d.world_size)

    # 3. Validation on other entities, another invented world, other handbooks; half without their document
    single = [r for r in val_rows if r["type"] == "single"] or val_rows
    invented, unread = make_world("val", 200), load_handbooks("val")
    one = RAGMix(absent=0.5, counterfactual=0, follow_up=0, max_docs=1)
    asked = {
        "one": RAGTask(single, documents, one),
        "handbook": RAGTask([r for r in unread.queries if r["type"] == "single"], unread.documents, one),
        "fiction": RAGTask([r for r in invented.queries if r["type"] == "single"], invented.documents, one),
    }
    if hops := [r for r in val_rows if r["type"] == "two_hop"]:
        asked["two_hop"] = RAGTask(hops, documents, replace(one, **two), others=val_rows)
    evals = [
        Eval(name, config.eval_every, pointing_eval(task, config.val_examples, f"{name}_"))
        for name, task in asked.items()
    ]

    # 4. Train
    net = Pointer(EvidenceConfig())
    return train(
        net, loader, config, source="evidence", tokenizer=None, loss_fn=pointer_loss, evals=evals, dist_info=d,
        param_groups=net.param_groups(config.matrix_lr, config.pointer_lr, config.weight_decay),
        meta={"knowledge_base": config.knowledge_base},
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config)
