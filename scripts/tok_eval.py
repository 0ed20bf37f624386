"""How well the tokenizer compresses, beside gpt2's and cl100k_base's where tiktoken has them cached.

    python -m scripts.tok_eval --output tok_eval.json

Bytes per token on samples of held-out text (the validation split of `--data`), of factbook passages and questions of
validation countries, and on a little code, numbers and other scripts. tiktoken fetches the other two tokenizers from
the network; without one they are left out, and it says so.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tiktoken

from nanochat.common import UserError, get_base_dir, print0, write_json
from nanochat.config import run
from nanochat.dataset import load_texts
from nanochat.tokenizer import Tokenizer
from tasks.factbook import load_documents, load_queries

SAMPLES = {
    "code": "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "numbers": "83,871 sq km; 1,234,567 people; 3.14159; 25 June 1975; 28 00 N, 3 00 E; $764.274 million",
    "other scripts": "Привет, мир. こんにちは世界。 مرحبا بالعالم 안녕하세요 🙂",
}


@dataclass
class Config:
    output: str = ""  # write the table here as JSON
    data: str = "embedded"  # held-out text: embedded, fineweb:N, or a folder or file
    max_examples: int = 500  # documents, passages and questions to encode, of each
    seed: int = 0  # which ones


def main(config: Config) -> dict:
    if config.max_examples < 1:
        raise UserError(f"--max_examples {config.max_examples}: at least 1")
    ours = Tokenizer.load(get_base_dir() / "tokenizer")
    encoders = {"ours": ours.encode}
    for name in ("gpt2", "cl100k_base"):
        try:
            encoders[name] = tiktoken.get_encoding(name).encode_ordinary
        except Exception as e:  # tiktoken raises whatever its HTTP library does
            print0(f"{name}: not cached and not downloadable here ({type(e).__name__}); left out")

    def sample(items: Sequence) -> list[Any]:
        picked = random.Random(config.seed).sample(range(len(items)), min(config.max_examples, len(items)))
        return [items[i] for i in sorted(picked)]  # in order: a parquet file is read by groups of rows

    passages = [d["content"] for d in load_documents().values() if d["split"] == "val"]
    samples = {
        "text": "\n".join(sample(load_texts(config.data, "val"))),
        "factbook passages": "\n".join(sample(passages)),
        "questions": "\n".join(r["query"] for r in sample(load_queries("val"))),
        **SAMPLES,
    }
    rows = {}
    print0(f"{'bytes per token':20s}" + "".join(f"{name:>14s}" for name in encoders))
    for label, text in samples.items():
        size = len(text.encode())
        rows[label] = {"n": size, **{name: size / max(1, len(encode(text))) for name, encode in encoders.items()}}
        print0(f"{label:20s}" + "".join(f"{rows[label][name]:14.2f}" for name in encoders))
    result = {"rows": rows, "config": vars(config), "versions": {"tiktoken": tiktoken.__version__}}
    if config.output:
        write_json(config.output, result)
    return result


if __name__ == "__main__":
    run(main, Config)
