"""Kill the writer of a knowledge base again and again; what it acknowledged must be there, and nothing else.

    python -m benchmarks.kb_kill_loop --kills 100

A child builds, adds, updates, removes and compacts, and reports each step when it is done; it is killed (SIGKILL) at a
random moment. Then the knowledge base must open and hold exactly the acknowledged documents, or those with the one step
under way done as a whole, each with its own vector. Until the kill, the parent opens the knowledge base over and over,
as a reader would. Vectors are made of checksums, so that no model is needed.
"""

import json
import os
import random
import signal
import tempfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat import knowledge_base as kb
from nanochat import retrieval
from nanochat.common import UserError, write_json
from nanochat.config import run
from nanochat.documents import Document


@dataclass
class Config:
    kills: int = 100  # how often the writer is killed
    max_milliseconds: int = 80  # each time after a random time up to this
    seed: int = 0  # of the steps and the times
    output: str = ""  # where to write the counts as JSON


class Checksums:
    """An encoder whose vectors tell which text they belong to."""

    info = {"name": "checksums", "sha256": "", "dims": 8}

    def encode_passages(self, texts):
        rows = [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8) for text in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)

    encode_queries = encode_together = encode_passages


def step(held: dict[str, str], rng: random.Random) -> tuple[str, dict[str, str], dict]:
    """Choose what to do -> its name, the ids and contents held after it, and the arguments of `perform`."""
    name = rng.choices(["add", "update", "remove", "build"], [6, 3, 4, 1])[0]
    ids = rng.sample(sorted(held), min(len(held), rng.randint(1, 5)))
    content = f"{rng.random()} words"
    if name in ("add", "build") or not ids or (name == "remove" and len(ids) == len(held)):
        first = rng.randrange(10**9)
        docs = {f"d{first + n}": content for n in range(rng.randint(1, 6) if name == "add" else 12)}
        return ("build", docs, docs) if name == "build" or not held else ("add", held | docs, docs)
    if name == "update":
        docs = {**dict.fromkeys(ids, content), f"d{rng.randrange(10**9)}": content}
        return name, held | docs, docs
    return name, {i: text for i, text in held.items() if i not in ids}, dict.fromkeys(ids, "")


def perform(path: Path, name: str, docs: dict[str, str]) -> None:
    documents = [Document(i, f"title {i}", text) for i, text in docs.items()]
    if name == "build":
        kb.build_kb(documents, path)
    elif name == "remove":
        kb.remove_documents(path, list(docs))
    else:
        kb.add_documents(path, documents, replace=name == "update")


def held_by(path: Path) -> dict[str, str]:
    """Ids and contents in the knowledge base, its vectors and its search checked. {} if none was ever finished."""
    try:
        retriever = retrieval.load_retriever(path, "hybrid")
    except UserError as e:
        if "no kb.json" in str(e):
            return {}
        raise
    dense, keep = retriever.parts[-1], retriever.keep
    docs, vectors = list(retriever.documents), np.concatenate([dense.base, dense.tail])
    if keep is not None:
        docs, vectors = [doc for doc, kept in zip(docs, keep, strict=True) if kept], vectors[keep]
    assert docs == list(retriever.kb.documents)
    assert np.allclose(vectors, Checksums().encode_passages([doc.text for doc in docs])), "vectors of other documents"
    for doc in docs[-1:]:
        found = retriever.retrieve(doc.text, 3)
        assert found[0].id == doc.id, f"{doc.id} isn't found by its own words"
    return {doc.id: doc.content for doc in docs}


def writer(path: Path, held: dict[str, str], seed: int, report: Path) -> None:
    """Do steps until killed. Reports what is about to happen and, when it is durable, that it has happened."""
    rng = random.Random(seed)
    with open(report, "wb", buffering=0) as f:
        while True:
            name, after, docs = step(held, rng)
            f.write((json.dumps(["begin", name, after]) + "\n").encode())
            perform(path, name, docs)
            f.write(b'["done"]\n')
            held = after


def kill_loop(path: Path, kills: int, max_milliseconds: int, seed: int) -> Counter:
    """Returns counts of steps, kills, kills amid each kind of step, and opened versions. AssertionError on a loss."""
    tqdm.set_lock(threading.RLock())  # its own is shared with children, and one killed while holding it blocks us all
    rng, held, counts, report = random.Random(seed), {}, Counter(), path.parent / "report.jsonl"
    for turn in range(kills):
        retrieval.REINDEX = rng.choice([0, 20_000])  # both ways to search what was added
        report.write_bytes(b"")
        child = os.fork()
        if child == 0:
            try:
                writer(path, held, seed * 100_003 + turn, report)
            finally:
                os._exit(1)  # only an error gets here
        try:
            deadline = time.monotonic() + rng.random() * max_milliseconds / 1000
            while time.monotonic() < deadline:
                counts["opened while written"] += bool(held_by(path))
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself: see its error above"
        lines = [json.loads(line) for line in report.read_bytes().split(b"\n")[:-1]]  # those written whole
        before = after = held
        for line in lines:
            if line[0] == "begin":
                before, after = after, line[2]
            else:
                before = after
                counts["steps"] += 1
        held = held_by(path)
        assert held in (before, after), f"kill {turn}: {len(held)} documents, not {len(before)} or {len(after)}"
        counts["kills"] += 1
        if lines and lines[-1][0] == "begin":
            counts[f"amid {lines[-1][1]}, " + ("done" if held == after else "not done")] += 1
    return counts


def main(config: Config) -> None:
    kb.get_encoder = lambda name="": Checksums()
    kb.COMPACT, kb.MAX_SEGMENTS = 25, 4  # so that merging and compaction happen all the time
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_loop(Path(folder) / "kb", config.kills, config.max_milliseconds, config.seed)
    for name, count in sorted(counts.items()):
        print(f"{name:28} {count:6d}")
    if config.output:
        write_json(config.output, {"rows": {"kill_loop": dict(counts)}, "config": vars(config)})


if __name__ == "__main__":
    run(main, Config)
