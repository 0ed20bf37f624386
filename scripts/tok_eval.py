"""How well the tokenizer compresses, beside gpt2's and cl100k_base's where tiktoken has them cached.

    python -m scripts.tok_eval --output tok_eval.json

Bytes per token on held-out text: the embedded corpus's validation split, factbook questions of the validation
countries, and a sample of numbers, code and other scripts. tiktoken fetches the other two from the network; without
one they are left out, and it says so.
"""

from dataclasses import dataclass

import tiktoken

from nanochat.common import get_base_dir, print0, write_json
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
    max_examples: int = 500  # documents and questions to encode
    seed: int = 0  # unused here: the first documents are taken; every evaluation script has it


def main(config: Config) -> dict:
    ours = Tokenizer.load(get_base_dir() / "tokenizer")
    encoders = {"ours": ours.encode}
    for name in ("gpt2", "cl100k_base"):
        try:
            encoders[name] = tiktoken.get_encoding(name).encode_ordinary
        except Exception as e:  # tiktoken raises whatever its HTTP library does
            print0(f"{name}: not cached and not downloadable here ({type(e).__name__}); left out")
    texts = load_texts(config.data, "val")
    samples = {
        "text": "\n".join(texts[i] for i in range(min(len(texts), config.max_examples))),
        "factbook passages": "\n".join(d["content"] for d in load_documents().values() if d["split"] == "val"),
        "questions": "\n".join(r["query"] for r in load_queries("val")[: config.max_examples]),
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
