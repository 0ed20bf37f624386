"""Midtraining: the pretrained model learns conversations and to read documents.

    python -m scripts.mid_train --num_iterations 500
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train

Goes on from a base checkpoint with a mixture: the same text, drills, chat pairs, and reading: one or two documents
with many questions to each, of the factbook and of handbooks about everything, names and answers exchanged in half of
them, and near misses that nothing answers. This dense signal is what turns copying into reading (docs/LOG.md).
"""

from dataclasses import dataclass, replace

from nanochat.checkpoint_manager import load_model, parent_meta
from nanochat.common import init_distributed
from nanochat.config import run
from nanochat.dataloader import PackedLoader
from nanochat.dataset import TextStream, load_texts
from nanochat.loss_eval import text_validation
from nanochat.memory_estimate import checkpoint_shape, dry_run
from nanochat.train import Eval, TrainConfig, train
from tasks.common import ConversationStream, JSONLTask, MixStream, TaskMixture
from tasks.drills import LADDER, DrillStream, drill_accuracy
from tasks.factbook import ChatPairs, load_documents, load_queries
from tasks.handbooks import HandbookTask, load_handbooks
from tasks.rag_task import RAGMix, RAGTask, reading_eval


@dataclass
class Config(TrainConfig):
    source: str = "base"  # stage to start from
    source_tag: str = ""  # model tag to start from; empty: the newest
    source_step: int = 0  # its step; 0: the last
    sequence_len: int = 512  # tokens per row
    data: str = "embedded"  # text: embedded, fineweb:N, or a folder or file of your own
    conversations: str = ""  # your own conversations: a .jsonl file of {"messages": [...]}
    text_share: float = 0.1  # share of samples that are text
    drill_share: float = 0.1  # share of samples that are drills
    chat_share: float = 0.05  # share of samples that are chat pairs
    handbook_share: float = 0.4  # share of samples that read handbooks; the rest reads the factbook
    val_batches: int = 16  # validation batches
    eval_every: int = 100  # steps between validations (0: only at the end)


def main(config: Config) -> dict[str, float]:
    # 1. Model
    if config.dry_run:
        return dry_run(config, checkpoint_shape(config.source, config.source_tag, config.source_step))
    d = init_distributed(config.device)
    model, tokenizer, meta = load_model(
        config.source, d.device, "train", config.source_tag or None, config.source_step or None
    )
    model.config.sequence_len = max(model.config.sequence_len, config.sequence_len)

    # 2. Data
    T, seed = config.sequence_len, config.seed
    drills = DrillStream(tokenizer, seed, level=len(LADDER) - 1)
    chat = [ChatPairs("train")] + ([JSONLTask(config.conversations)] if config.conversations else [])
    documents = load_documents()
    rows = load_queries("train")
    reading = RAGMix(absent=0.3, paired=0.5, counterfactual=0.5, follow_up=0.9, max_questions=10, max_docs=2)
    single = [r for r in load_queries("val") if r["type"] == "single"]
    excerpts = replace(reading, absent=0.1, paired=0.0, counterfactual=0.3, max_docs=1, sentences=3)
    fixed = RAGMix(absent=0.5, counterfactual=0, follow_up=0, max_docs=1)
    unseen = RAGTask(single, documents, fixed)
    others = load_handbooks("val")
    asked = [r for r in others.queries if r["type"] == "single"]
    unread = RAGTask(asked, others.documents, replace(fixed, sentences=2))
    books = load_handbooks("train")
    streams = {
        "text": TextStream(load_texts(config.data, "train"), tokenizer, seed + 1),
        "drill": drills,
        "chat": ConversationStream(TaskMixture(chat), tokenizer, T + 1, seed),
        "reading": ConversationStream(RAGTask(rows, documents, reading, seed=seed), tokenizer, T + 1, seed),
        "handbook": ConversationStream(
            HandbookTask(books.queries, books.documents, excerpts, seed=seed), tokenizer, T + 1, seed
        ),
    }
    shares = {name: getattr(config, f"{name}_share") for name in ("text", "drill", "chat", "handbook")}
    mix = MixStream(streams, shares | {"reading": 1 - sum(shares.values())}, seed, d.world_size)
    loader = PackedLoader(mix, config.device_batch_size, T, d.rank, d.world_size)

    # 3. Evaluations: text is not forgotten, copying is kept, reading is learned on countries and handbooks never seen
    top = len(LADDER) - 1
    evals = [
        Eval("val", config.eval_every, text_validation(config.data, tokenizer, config, config.val_batches)),
        Eval("drill", config.eval_every, lambda m: {"copy": drill_accuracy(m, drills, "copy", top)}),
        Eval("reading", config.eval_every, reading_eval(tokenizer, unseen, 128)),
        Eval("handbook", config.eval_every, reading_eval(tokenizer, unread, 128, prefix="handbook_")),
    ]
    return train(
        model, loader, config, source="mid", tokenizer=tokenizer, evals=evals, dist_info=d,
        meta=parent_meta(meta),
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config)
