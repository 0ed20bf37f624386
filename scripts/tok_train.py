"""Train the tokenizer: byte pairs of a text.

    python -m scripts.tok_train                          # 8192 tokens from the embedded corpus, in seconds
    python -m scripts.tok_train --vocab_size 32768 --data fineweb:8

The embedded corpus holds the factbook's text on training countries, so the tokens fit the knowledge base as well; with
another text they know only that. Writes $NANOCHAT_BASE_DIR/tokenizer/tokenizer.json.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from nanochat.common import UserError, get_base_dir, print0
from nanochat.config import run
from nanochat.dataset import load_texts
from nanochat.tokenizer import Tokenizer


@dataclass
class Config:
    data: str = "embedded"  # text to learn from: embedded, fineweb:N, or a folder or file
    vocab_size: int = 8192  # number of tokens, special ones included
    max_chars: int = 40_000_000  # stop reading after this many characters
    doc_cap: int = 10_000  # characters of one document that count, so that one long one can't dominate


def main(config: Config) -> Tokenizer:
    for name in ("max_chars", "doc_cap"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")
    texts = load_texts(config.data, "train")

    def read() -> Iterator[str]:
        left = config.max_chars
        for i in tqdm(range(len(texts)), desc="reading", unit="doc"):
            text = texts[i][: config.doc_cap]
            left -= len(text)
            yield text
            if left <= 0:
                return

    begin = time.perf_counter()
    tokenizer = Tokenizer.train(read(), config.vocab_size)
    folder = get_base_dir() / "tokenizer"
    tokenizer.save(folder)
    print0(f"{tokenizer.vocab_size} tokens in {time.perf_counter() - begin:.1f} s -> {folder / 'tokenizer.json'}")
    return tokenizer


if __name__ == "__main__":
    run(main, Config)
