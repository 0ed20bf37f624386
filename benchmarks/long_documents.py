"""One passage answers, in a document of up to 8,192 tokens: F1 against the document's length, two ways of reading.

    python -m benchmarks.long_documents --model_tags cpu --knowledge_base KB --queries Q/val.jsonl --output F.json

The gold passage stands somewhere among passages that don't answer, all one document that isn't cut (`prepare_kb` would
cut it). `calibrated`: as in the chat, where an evidence reader takes it in windows of 512 word pieces (similarities are
those of its first 64 sentences); `whole`: the language model reads it in one go, however much longer it is than what it
was trained with. Seconds are those of a question, comparing sentences included.
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
from nanochat.tokenizer import Tokenizer
from scripts.rag_eval import ask
from tasks.factbook import load_queries
from tasks.rag_task import states_answer

BESIDE = 256  # tokens of context for the question and the answer


@dataclass
class Config:
    """Settings of the comparison."""

    model_tags: str = ""  # RAG checkpoints, comma-separated
    lengths: str = "512,1024,2048,4096,8192"  # tokens of the document, comma-separated
    read: str = "calibrated,whole"  # ways of reading, comma-separated
    knowledge_base: str = ""  # folder of the knowledge base
    queries: str = ""  # questions: a .jsonl file
    max_examples: int = 50  # questions, the same for every length
    seed: int = 0  # which questions, among which passages
    output: str = ""  # write the figures to this JSON file


def main(config: Config) -> dict:
    tags, reads = ([x for x in text.split(",") if x] for text in (config.model_tags, config.read))
    lengths = [int(n) if n.isdigit() else 0 for n in config.lengths.split(",")]
    if not tags or min(lengths) < 1 or not reads or not set(reads) <= {"calibrated", "whole"}:
        raise UserError("give --model_tags cpu, whole numbers as --lengths, and --read calibrated,whole")
    manager = RetrievalManager("hybrid", config.knowledge_base, cached=True)
    documents = {doc.id: doc for doc in manager.documents}
    rows = [r for r in load_queries(config.queries) if r["type"] == "single" and {*r["positive_ids"]} <= {*documents}]
    rows = random.Random(config.seed).sample(rows, max(0, min(config.max_examples, len(rows))))
    if not rows:
        raise UserError(f"{config.queries} has no single-hop question to this knowledge base, or --max_examples is 0")
    table = {}
    for tag in tags:
        model, tokenizer, _ = load_model("rag", model_tag=tag)
        engine, fitted, evidence = Engine(model, tokenizer), model.confidence, model.evidence
        if "calibrated" in reads and not (fitted and evidence):
            raise UserError(
                f"{tag} isn't calibrated with an evidence reader: scripts.rag_eval --calibrate, or --read whole"
            )

        for length in lengths:
            asked = [(r, long_document(r, documents, tokenizer, length, config.seed)) for r in rows]
            model.config.sequence_len = length + BESIDE
            for read in reads:
                model.confidence, model.evidence = (fitted, evidence) if read == "calibrated" else (None, None)
                answer(engine, manager, "Who?", asked[0][1], read)  # what is done once is done now
                start = time.perf_counter()
                said = [answer(engine, manager, row["query"], doc, read) for row, doc in asked]
                seconds = time.perf_counter() - start
                refused = [is_abstention(text) for text in said]
                f1 = [answer_f1(main_answer(t), r["answers"]) * (not no) for t, (r, _), no in zip(said, asked, refused)]
                n = len(rows)
                told = {"n": n, "f1": sum(f1) / n, "abstains": sum(refused) / n, "seconds": seconds / n}
                table[f"{tag}, {read}, {length}"] = told
    report(table, vars(config), ("safetensors",), config.output)
    return table


def answer(engine: Engine, manager: RetrievalManager, query: str, doc: Document, read: str) -> str:
    """The answer to `query` over one document."""
    if read == "whole":
        return engine.answer_batch([ask(query, [doc])], 1, 48, quote=True)[0]
    return answer_each(engine, [ask(query, manager.compare(query, [doc]))], max_tokens=48)[0][0]


def long_document(row: dict, documents: dict[str, Document], tokenizer: Tokenizer, length: int, seed: int) -> Document:
    """One document of at most `length` tokens (or the gold passage's): that one somewhere among others."""
    rng, gold = random.Random(f"{seed}/{row['id']}"), documents[row["positive_ids"][0]]
    others = [doc for doc in documents.values() if doc.id not in row["positive_ids"]]
    parts, room = [gold.content], length - len(tokenizer.encode(gold.content))
    for doc in rng.sample(others, len(others)):
        size = len(tokenizer.encode(doc.content)) + 1
        if size > room:
            break
        if not states_answer(doc, row):
            parts.append(doc.content)
            room -= size
    rng.shuffle(parts)
    return Document("long", "Notes", " ".join(parts))


if __name__ == "__main__":
    run(main, Config)
