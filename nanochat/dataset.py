"""Text to pretrain on: the embedded corpus, a folder of your own, or FineWeb-Edu shards from the hub.

    texts = load_texts("embedded", "train")       # data/corpus, ships with the repo
    texts = load_texts("my_folder", "val")        # .txt .md .jsonl (field "text") .parquet (column "text")
    texts = load_texts("fineweb:8", "train")      # the first 8 shards, downloaded once into $NANOCHAT_BASE_DIR

All three are sequences of documents (str). `TextStream` turns one into the endless, seeded, resumable stream of token
ids that the loader packs. One in a hundred of a folder's documents, chosen by content, is its validation split.
"""

import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import DATA, UserError, atomic_file, get_base_dir, on_main_first, print0, read_jsonl
from nanochat.tokenizer import Tokenizer

FINEWEB_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_{:05d}.parquet"
FINEWEB_LAST = 1822  # the last shard is the validation split, as in nanochat
KEPT = 64  # row groups in memory: the embedded corpus whole; a hub shard's group is about 4 MB
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


class ParquetTexts(Sequence):
    """The `text` column of parquet files as one sequence; row groups are read when touched, the last few are kept."""

    def __init__(self, paths: list[Path]):
        self.files, self.paths, starts = [], [], [0]  # of each row group: (file, number), path, first document
        for path in paths:
            try:
                file = pq.ParquetFile(path)
            except (OSError, pa.ArrowException) as e:
                raise UserError(f"{path} is not a readable parquet file: {str(e).splitlines()[0]}") from e
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column 'text' (columns: {', '.join(file.schema_arrow.names)})")
            if (kind := file.schema_arrow.field("text").type) not in (pa.string(), pa.large_string(), pa.string_view()):
                raise UserError(f"{path}: the column 'text' must hold text, not {kind}")
            for g in range(file.num_row_groups):
                self.files.append((file, g))
                self.paths.append(path)
                starts.append(starts[-1] + file.metadata.row_group(g).num_rows)
        self.starts = np.array(starts)
        self._kept: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        g = int(np.searchsorted(self.starts, i, side="right")) - 1
        if g not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            file, group = self.files[g]
            try:
                self._kept[g] = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
            except (OSError, pa.ArrowException) as e:
                raise UserError(f"{self.paths[g]} is damaged: {str(e).splitlines()[0]}") from e
        return self._kept[g][i - int(self.starts[g])] or ""


def load_texts(source: str, split: str) -> Sequence[str]:
    """The documents of `source` ('embedded', 'fineweb:N' or a folder or file), split 'train' or 'val'.

    Raises UserError if there are none.
    """
    if split not in ("train", "val"):
        raise UserError(f"split must be train or val, not {split}")
    if source == "embedded":
        texts = ParquetTexts(sorted((DATA / "corpus").glob(f"{split}*.parquet")))
    elif source.partition(":")[0] == "fineweb":
        texts = ParquetTexts(_fineweb(source, split))
    else:
        texts = read_folder(source, split)
    if not len(texts):
        raise UserError(f"{source}: the {split} split holds no text; give files ending in {', '.join(SUFFIXES)}")
    return texts


def read_folder(folder: str | Path, split: str) -> list[str]:
    """Documents of a user's folder (recursively) or single file. Invalid UTF-8 is an error that names the file."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; --data takes 'embedded', 'fineweb:N', or a folder or file of text")
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    documents: list[str] = []
    for path in paths:
        suffix = path.suffix.lower()
        if path != folder and (suffix not in SUFFIXES or not path.is_file()):
            continue
        if suffix == ".parquet":
            documents += ParquetTexts([path])
        elif suffix == ".jsonl":
            for n, row in enumerate(read_jsonl(path, required=("text",)), 1):
                if not isinstance(row["text"], str):
                    raise UserError(f"{path}, record {n}: 'text' must be a string")
                documents.append(row["text"])
        else:
            try:
                documents.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is not valid UTF-8 (byte {e.start}); convert it first") from e
    documents = [d for d in documents if d.strip()]
    if len(documents) == 1:  # one big file: cut it at blank lines so that there is something to hold out
        documents = [d for d in documents[0].split("\n\n") if d.strip()]
    if len(documents) < 2:
        raise UserError(f"{folder} holds too little text: at least two documents or paragraphs are needed")
    held_out = [zlib.crc32(d.encode("utf-8", "replace")) % 100 == 0 for d in documents]
    if not any(held_out):
        held_out[-1] = True
    return [d for d, val in zip(documents, held_out) if val == (split == "val")]


def _fineweb(source: str, split: str) -> list[Path]:
    """Download (once, on rank 0) and return the shards that 'fineweb:N' asks for."""
    count = source.partition(":")[2] or "8"
    if not count.isdigit() or not 1 <= int(count) < FINEWEB_LAST:
        raise UserError(f"--data {source}: write fineweb:N with N from 1 to {FINEWEB_LAST - 1}")
    numbers = [FINEWEB_LAST] if split == "val" else list(range(int(count)))
    paths = [get_base_dir() / "fineweb" / f"shard_{n:05d}.parquet" for n in numbers]

    def download() -> None:
        for n, path in zip(numbers, paths):
            if path.exists():
                continue
            print0(f"downloading {path.name}")
            try:
                with urllib.request.urlopen(FINEWEB_URL.format(n), timeout=60) as r, atomic_file(path, "wb") as f:
                    while block := r.read(1 << 20):
                        f.write(block)
            except (urllib.error.URLError, TimeoutError) as e:
                raise UserError(f"could not download {path.name}: {e}; use --data embedded or a folder") from e

    on_main_first(download)
    return paths


def shuffled(texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """All positions of `texts` in a random order that row groups can follow: each is decoded once an epoch.

    Of a sequence that names its groups (`starts`), the groups are shuffled, then the documents of every `KEPT` groups
    among themselves: tens of thousands on the hub, all of them in a corpus of no more groups.
    """
    if not hasattr(texts, "starts"):
        return rng.permutation(len(texts))
    starts, order = texts.starts, []
    groups = rng.permutation(len(starts) - 1)
    for i in range(0, len(groups), KEPT):
        window = [np.arange(starts[g], starts[g + 1]) for g in groups[i : i + KEPT]]
        order.append(rng.permutation(np.concatenate(window)))
    return np.concatenate(order)


class TextStream:
    """sample(i) -> (ids, None): document i of an endless sequence of epochs, each in its own seeded order."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, seed: int = 0, shuffle: bool = True):
        self.texts, self.tokenizer, self.seed, self.shuffle = texts, tokenizer, seed, shuffle
        self._epoch, self._order = -1, np.arange(len(texts))

    def sample(self, i: int) -> tuple[list[int], None]:
        epoch, k = divmod(i, len(self.texts))
        if self.shuffle and epoch != self._epoch:
            self._order = shuffled(self.texts, np.random.default_rng((self.seed, epoch)))
            self._epoch = epoch
        return [self.tokenizer.bos, *self.tokenizer.encode(self.texts[int(self._order[k])])], None
