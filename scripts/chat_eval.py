"""Evaluate a chat model: held-out conversations, what it remembers without documents, what it reads from one.

    python -m scripts.chat_eval --source sft --output chat_eval.json

Each row stands for the model and, beside it, for the stage it came from (`--baseline`), which is what fine-tuning has
to beat. memory_*: closed-book questions about training countries and, as a floor, validation countries; reading: one
document and a question about a validation country.
"""

from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, versions
from nanochat.common import UserError, init_distributed, print0, write_json
from nanochat.config import run
from nanochat.engine import Engine
from nanochat.rag_utils import answer_f1, exact_match
from tasks.common import answer_loss
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
    d = init_distributed(config.device)
    if config.max_examples < 1:
        raise UserError(f"--max_examples {config.max_examples}: at least 1")
    rows, stages = {}, [config.source] + ([config.baseline] if config.baseline else [])
    for stage in stages:
        step = config.step if stage == config.source else 0
        model, tokenizer, _ = load_model(stage, d.device, model_tag=config.model_tag or None, step=step or None)
        engine, n = Engine(model, tokenizer), config.max_examples
        chat = ChatPairs("val")
        rows[f"{stage}/chat"] = {"n": min(n, len(chat)), **answer_loss(tokenizer, chat, "answer", n)(model)}
        for split in ("train", "val"):
            task = FactbookQA(split)
            rows[f"{stage}/memory_{split}_countries"] = memory(engine, task, n, config)
        single = [r for r in load_queries("val") if r["type"] == "single"]
        one = RAGTask(single, load_documents(), RAGMix(absent=0, counterfactual=0, follow_up=0, max_docs=1))
        rows[f"{stage}/reading"] = {"n": n, **reading_eval(tokenizer, one, n)(model)}
        if stage == config.source:
            for i in range(min(config.show, len(chat))):
                prompt = {"messages": chat[i]["messages"][:1]}
                print0(f"  {prompt['messages'][0]['content']}\n    -> {engine.answer(prompt, 40)}")
    for name, row in rows.items():
        print0(f"{name:28s}" + "  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    result = {"rows": rows, "config": vars(config), "versions": versions()}
    if config.output and d.rank == 0:
        write_json(config.output, result)
    return result


def memory(engine: Engine, task: FactbookQA, n: int, config: Config) -> dict[str, float]:
    """F1 and exact match of `n` closed-book questions."""
    n = min(n, len(task))
    step = max(1, len(task) // n)
    picked = [task[i] for i in range(0, n * step, step)]
    asked = [{"messages": c["messages"][:1]} for c in picked]
    wanted = [c["messages"][1]["content"].rstrip(".") for c in picked]
    got = engine.answer_batch(asked, config.batch_size, 32)
    f1 = sum(answer_f1(g, [w]) for g, w in zip(got, wanted)) / n
    return {"n": n, "f1": f1, "em": sum(exact_match(g, [w]) for g, w in zip(got, wanted)) / n}


if __name__ == "__main__":
    run(main, Config)
