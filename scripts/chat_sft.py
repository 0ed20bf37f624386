"""Supervised fine-tuning on conversations without documents: small talk, who it is, facts it may remember.

    python -m scripts.chat_sft --num_iterations 100
    python -m scripts.chat_sft --conversations mine.jsonl      # {"messages": [{"role": "user", ...}, ...]} a line

Only what the assistant says is a target. A third of the examples read a document, so that what midtraining taught
about documents is not forgotten.
"""

from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, parent_meta
from nanochat.common import init_distributed
from nanochat.config import run
from nanochat.dataloader import PackedLoader
from nanochat.memory_estimate import checkpoint_shape, dry_run
from nanochat.train import Eval, TrainConfig, train
from tasks.common import ConversationStream, JSONLTask, MixStream, TaskMixture, answer_loss
from tasks.factbook import ChatPairs, FactbookQA, load_documents, load_queries
from tasks.rag_task import RAGMix, RAGTask


@dataclass
class Config(TrainConfig):
    source: str = "mid"  # stage to start from
    source_tag: str = ""  # model tag to start from; empty: the newest
    source_step: int = 0  # its step; 0: the last
    num_iterations: int = 100  # optimizer steps
    sequence_len: int = 512  # tokens per row
    lr_scale: float = 0.3  # multiplies all learning rates: fine-tuning moves less
    conversations: str = ""  # your own conversations: a .jsonl file of {"messages": [...]}
    reading_share: float = 0.35  # share of examples with a document
    facts_share: float = 0.15  # share of closed-book questions about training countries
    eval_every: int = 50  # steps between validations (0: only at the end)


def main(config: Config) -> dict[str, float]:
    if config.dry_run:
        return dry_run(config, checkpoint_shape(config.source, config.source_tag, config.source_step))
    d = init_distributed(config.device)
    model, tokenizer, meta = load_model(
        config.source, d.device, "train", config.source_tag or None, config.source_step or None
    )
    model.config.sequence_len = max(model.config.sequence_len, config.sequence_len)
    limit, seed = config.sequence_len + 1, config.seed
    chat = [ChatPairs("train")] + ([JSONLTask(config.conversations)] if config.conversations else [])
    reading = RAGTask(load_queries("train"), load_documents(), RAGMix(max_docs=2), seed=seed)
    tasks = {"chat": TaskMixture(chat), "facts": FactbookQA("train"), "reading": reading}
    shares = {"facts": config.facts_share, "reading": config.reading_share}
    mix = MixStream(
        {name: ConversationStream(task, tokenizer, limit, seed) for name, task in tasks.items()},
        shares | {"chat": 1 - sum(shares.values())},
        seed,
        d.world_size,
    )
    loader = PackedLoader(mix, config.device_batch_size, config.sequence_len, d.rank, d.world_size)
    evals = [Eval("chat", config.eval_every, answer_loss(tokenizer, ChatPairs("val"), "chat_val"))]
    return train(
        model, loader, config, source="sft", tokenizer=tokenizer, evals=evals, dist_info=d,
        meta=parent_meta(meta),
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config)
