"""One passage answers, in a document of up to 8,192 tokens: F1 against the document's length, three ways of reading.

    python -m benchmarks.long_documents --model_tags cpu --knowledge_base KB --queries Q/val.jsonl --output F.json

The gold passage stands somewhere among passages that don't answer, all one document that isn't cut. `calibrated`: as in
the chat, where an evidence reader takes it in windows; `closest`: the language model alone reads the sentences closest
to the question; `whole`: it reads everything, however much more that is than it was trained with. Only the first may
abstain. Seconds are those of a question, alone.
"""

import random
import time
from dataclasses import dataclass

from benchmarks.common import report
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.config import run
from nanochat.documents import Document
from nanochat.engine import Engine
from nanochat.rag_utils import answer_f1, is_abstention, main_answer
from nanochat.reader import answer_each
from nanochat.retrieval import RetrievalManager
from scripts.rag_eval import ask
from tasks.factbook import load_queries
from tasks.rag_task import states_answer

LEFT = 256  # tokens of context beside the document: the question, the answer


@dataclass
class Config:
    """Settings of the comparison."""

    model_tags: str = ""  # RAG checkpoints, comma-separated
    lengths: str = "512,1024,2048,4096,8192"  # tokens of the document, comma-separated
    read: str = "calibrated,closest,whole"  # ways of reading, comma-separated
    knowledge_base: str = ""  # folder of the knowledge base
    queries: str = ""  # questions: a .jsonl file
    max_examples: int = 50  # questions, the same for every length
    seed: int = 0  # which questions, among which passages
    output: str = ""  # write the figures to this JSON file


def main(config: Config) -> dict:
    tags, reads = ([x for x in text.split(",") if x] for text in (config.model_tags, config.read))
    lengths = [int(n) if n.isdigit() else 0 for n in config.lengths.split(",")]
    if not tags or min(lengths) < 1 or not reads or not set(reads) <= {"calibrated", "closest", "whole"}:
        raise UserError("give --model_tags cpu, whole numbers as --lengths, and --read calibrated,closest,whole")
    manager = RetrievalManager("hybrid", config.knowledge_base, cached=True)
    documents = {doc.id: doc for doc in manager.documents}
    rows = [r for r in load_queries(config.queries) if r["type"] == "single"]
    rows = random.Random(config.seed).sample(rows, min(config.max_examples, len(rows)))
    table = {}
    for tag in tags:
        model, tokenizer, _ = load_model("rag", model_tag=tag)
        fitted, evidence, engine = model.confidence, model.evidence, Engine(model, tokenizer)
        for length in lengths:
            asked = [(r, long_document(r, documents, tokenizer, length, config.seed)) for r in rows]
            model.config.sequence_len = length + LEFT
            for read in reads:
                model.confidence, model.evidence = (fitted, evidence) if read == "calibrated" else (None, None)
                f1, refused, start = [], [], time.perf_counter()
                for row, doc in asked:
                    shown = [doc] if read == "whole" else manager.compare(row["query"], [doc])
                    [answer], _ = answer_each(engine, [ask(row["query"], shown)], max_tokens=48)
                    refused.append(is_abstention(answer))
                    f1.append(0.0 if refused[-1] else answer_f1(main_answer(answer), row["answers"]))
                n, seconds = len(asked), time.perf_counter() - start
                told = {"n": n, "f1": sum(f1) / n, "abstains": sum(refused) / n, "seconds": seconds / n}
                table[f"{tag}, {read}, {length}"] = told
    report(table, vars(config), ("safetensors",), config.output)
    return table


def long_document(row: dict, documents: dict[str, Document], tokenizer, length: int, seed: int) -> Document:
    """One document of about `length` tokens: the gold passage somewhere among passages that don't answer."""
    rng, gold = random.Random(f"{seed}/{row['id']}"), documents[row["positive_ids"][0]]
    others = [doc for doc in documents.values() if doc.id not in row["positive_ids"]]
    parts, room = [gold.content], length - len(tokenizer.encode(gold.content))
    for doc in rng.sample(others, len(others)):
        if room <= 0:
            break
        if states_answer(doc, row):
            continue
        parts.append(doc.content)
        room -= len(tokenizer.encode(doc.content))
    rng.shuffle(parts)
    return Document("long", "Notes", " ".join(parts))


if __name__ == "__main__":
    run(main, Config)
