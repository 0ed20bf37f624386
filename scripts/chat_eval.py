"""Evaluate a chat model: held-out conversations, what it remembers without documents, what it reads from one.

    python -m scripts.chat_eval --source sft --output chat_eval.json

Each row stands for the model and, beside it, for the stage it came from (`--baseline`), which is what fine-tuning has
to beat, on the same questions. memory_*: closed-book questions about training countries and, as a floor, validation
countries; reading: one document and a question about a validation country.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, versions
from nanochat.common import UserError, init_distributed, over_ranks, print0, write_json
from nanochat.config import run
from nanochat.engine import Engine
from nanochat.rag_utils import answer_f1, exact_match
from tasks.common import Task, answer_loss
from tasks.factbook import ChatPairs, FactbookQA, load_documents, load_queries
from tasks.rag_task import RAGMix, RAGTask, reading_eval


@dataclass
class Config:
    source: str = "sft"  # stage of the checkpoint: mid, sft, rag, or a path to a step folder
    model_tag: str = ""  # its tag; empty: the newest
    step: int = 0  # its step; 0: the last
    baseline: str = "mid"  # stage to compare with; empty: none
    max_examples: int = 200  # questions a row
    seed: int = 0  # which questions
    batch_size: int = 32  # answers generated at a time
    show: int = 5  # print this many answers to held-out chat prompts
    device: str = ""  # cpu, cuda or mps; empty: the best one present
    output: str = ""  # write the results here as JSON


def main(config: Config) -> dict:
    # 1. Both models, and what they are asked
    for name in ("max_examples", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")
    d = init_distributed(config.device)
    stages = {config.baseline: 0, config.source: config.step}  # the step asked for is the model's, not the baseline's
    models = {
        stage: load_model(stage, d.device, model_tag=config.model_tag or None, step=stages[stage] or None)
        for stage in (config.source, config.baseline)
        if stage
    }
    chat = pick(ChatPairs("val"), config)
    memory = {split: pick(FactbookQA(split), config) for split in ("train", "val")}
    single = pick([r for r in load_queries("val") if r["type"] == "single"], config)
    one = RAGMix(absent=0, counterfactual=0, follow_up=0, max_docs=1)
    reading = RAGTask(single, load_documents(), one, seed=config.seed)

    # 2. Ask them
    rows = {}
    for stage, (model, tokenizer, _) in models.items():
        engine = Engine(model, tokenizer)
        rows[f"{stage}/chat"] = {"n": len(chat), **answer_loss(tokenizer, chat, "answer", len(chat))(model)}
        for split, conversations in memory.items():
            rows[f"{stage}/memory_{split}_countries"] = closed_book(engine, conversations, config.batch_size)
        found = reading_eval(tokenizer, reading, len(reading))(model)
        rows[f"{stage}/reading"] = {"n": len(reading), **found}
        if stage == config.source:
            for conversation in chat[: config.show]:
                prompt = {"messages": conversation["messages"][:1]}
                print0(f"  {prompt['messages'][0]['content']}\n    -> {engine.answer(prompt, 40)}")
    for name, row in rows.items():
        print0(f"{name:28s}" + "  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    result = {"rows": rows, "config": vars(config), "versions": versions()}
    if config.output and d.rank == 0:
        write_json(config.output, result)
    return result


def pick(items: Sequence | Task, config: Config) -> list[dict]:
    """`max_examples` of the items, or all if there are fewer; the seed says which."""
    n = min(config.max_examples, len(items))
    return [items[i] for i in random.Random(config.seed).sample(range(len(items)), n)]


def closed_book(engine: Engine, conversations: list[dict], batch_size: int) -> dict[str, float]:
    """F1 and exact match of the answers to closed-book questions."""
    wanted = [c["messages"][1]["content"].rstrip(".") for c in conversations]
    asked = [{"messages": c["messages"][:1]} for c in conversations]
    got = over_ranks(lambda part: engine.answer_batch(part, batch_size, 32), asked)
    f1 = [answer_f1(g, [w]) for g, w in zip(got, wanted)]
    em = [exact_match(g, [w]) for g, w in zip(got, wanted)]
    return {"n": len(f1), "f1": sum(f1) / len(f1), "em": sum(em) / len(em)}


if __name__ == "__main__":
    run(main, Config)
