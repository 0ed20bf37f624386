"""Knowledge bases on disk: build, open, add to, remove from; whole after a crash, safe for readers while it is written.

    build_kb(documents, "kb", "hybrid")     # a new one, or in place of an older one
    add_documents("kb", more, replace=True)  # embeds only what is new
    kb = open_kb("kb")
    kb.documents[0]                          # lines are parsed when they are asked for

    kb/ kb.json                                        what is valid, with checksums; the only file that ever changes
        documents.jsonl documents.idx.npy              a document a line; (n, 2) uint64: where it begins, hash of its id
        bm25/ embeddings.npy index.faiss               the indexes of the base
        segments/000001/ documents.jsonl ...           what was added since, without indexes: the tail

Base and tail number their documents through; `removed` in kb.json lists the numbers that no longer count. A change
writes a new segment, then replaces kb.json: that is the moment it happens. When the changes outgrow a tenth of the
base, a new base is made of the stored vectors and swapped in. Writers queue at a lock file beside the folder.
"""

import copy
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError, atomic_dir, from_main, is_main, read_json, sha256_of, write_json
from nanochat.documents import Document
from nanochat.encoder import get_encoder
from nanochat.retrievers import INDEXES, bm25_index, check_choice, dense_index

TYPES = ("simple", "bm25", "dense", "hybrid")
KB_VERSION = 2
REBUILD = "build it again with python -m nanochat.retrieval prepare_kb"
WAIT = 10.0  # seconds a writer waits for another one
HASHED = 64 << 20  # files up to this many bytes are hashed when a knowledge base is opened, larger ones measured
MAX_SEGMENTS = 32  # more are merged into one
COMPACT = 1000  # more changes than this, and than a tenth of the base, and a new base is made

# ----------------------------------------------------------------------------------------------------------------------
# Documents


class Documents(Sequence):
    """The documents of some folders one after the other, parsed when asked for. `positions` selects among them."""

    def __init__(self, folders: Sequence[Path]):
        self.texts, self.index = [], []
        for folder in folders:
            with open(folder / "documents.jsonl", "rb") as f:
                self.texts.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            self.index.append(np.load(folder / "documents.idx.npy", mmap_mode="r", allow_pickle=False))
        self.starts = np.cumsum([0, *map(len, self.index)])
        self.positions: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.positions is None else len(self.positions)

    def __getitem__(self, i: int) -> Document:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # negative ones count from the end; raises IndexError
        i = i if self.positions is None else int(self.positions[i])
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        index, text, at = self.index[part], self.texts[part], i - int(self.starts[part])
        end = int(index[at + 1, 0]) if at + 1 < len(index) else len(text)
        return Document.from_dict(json.loads(text[int(index[at, 0]) : end]))

    def select(self, keep: np.ndarray) -> "Documents":
        """Those where keep (n,) is True; the others stay where they are, unseen."""
        view = copy.copy(self)
        view.positions = np.flatnonzero(keep)
        return view

    def find(self, ids: Sequence[str], keep: np.ndarray) -> dict[str, int]:
        """Position of each id that is there, of those where keep (n,) is True. For a view that selects nothing."""
        wanted = np.array([_hash(i) for i in ids], dtype=np.uint64)
        hits = [start + np.flatnonzero(np.isin(ix[:, 1], wanted)) for start, ix in zip(self.starts, self.index)]
        ids = set(ids)
        found = {self[int(i)].id: int(i) for i in np.concatenate(hits) if keep[i]}
        return {i: at for i, at in found.items() if i in ids}

    def containing(self, text: str) -> list[int]:
        """Positions of documents whose line has `text` in it, as JSON spells it: some of them may not fit a filter."""
        needle, found = json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "replace"), []
        for start, content, index in zip(self.starts, self.texts, self.index):
            at = content.find(needle)
            while at >= 0:
                row = int(np.searchsorted(index[:, 0], at, side="right")) - 1
                found.append(int(start) + row)
                at = content.find(needle, int(index[row + 1, 0])) if row + 1 < len(index) else -1
        return found


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little")


def _write_documents(folder: Path, documents: Sequence[Document], vectors: np.ndarray | None) -> None:
    index, at = np.zeros((len(documents), 2), dtype=np.uint64), 0
    with open(folder / "documents.jsonl", "wb") as f:
        for n, doc in enumerate(documents):
            try:  # half a surrogate pair in the metadata becomes a question mark
                line = json.dumps(replace(doc, score=None).to_dict(), ensure_ascii=False).encode("utf-8", "replace")
            except (TypeError, ValueError) as e:
                raise UserError(f"document {doc.id!r} cannot be written as JSON: {e}") from e
            index[n] = at, _hash(doc.id)
            at += f.write(line + b"\n")
    np.save(folder / "documents.idx.npy", index, allow_pickle=False)
    if vectors is not None:
        np.save(folder / "embeddings.npy", vectors, allow_pickle=False)


def _clean(documents: Sequence[Document]) -> list[Document]:
    """Documents as they come back from disk. Raises UserError on a bad or repeated one."""
    clean, seen = [], set()
    for doc in documents:
        if not isinstance(doc, Document):
            raise UserError(f"a knowledge base is made of Documents, not of {type(doc).__name__}")
        doc = Document.from_dict(doc.to_dict())
        if doc.id in seen:
            raise UserError(f"the id {doc.id!r} is that of two documents; ids must be unique")
        seen.add(doc.id)
        clean.append(doc)
    return clean


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class KnowledgeBase:
    """An open knowledge base. It stays as it was when opened, whatever is written meanwhile."""

    path: Path
    info: dict  # what kb.json says
    digest: str  # sha256 of `info`: two knowledge bases that share it hold the same
    everything: Documents  # base and tail, removed ones included
    keep: np.ndarray  # (n,) bool: False where a document was removed
    documents: Documents  # those that count

    def vectors(self) -> list[np.ndarray]:
        """The embeddings of the base and of each segment, memory-mapped."""
        return [_load_array(folder / "embeddings.npy") for folder in _folders(self.path, self.info)]


def _load_array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _folders(path: Path, info: dict) -> list[Path]:
    return [path, *(path / "segments" / name for name in info["segments"])]


def kb_info(path: str | Path) -> dict:
    """What kb.json says. Raises UserError if `path` isn't a knowledge base this version reads."""
    path = Path(path)
    try:
        return _read_info(path)
    except UserError:
        if not _lock_file(path).exists():
            raise
        with suppress(OSError), writing(path):  # a swap was under way, or died half-way: then the old one is put back
            return _read_info(path)
        raise


def _read_info(path: Path) -> dict:
    if (path / "knowledge_base" / "kb.json").is_file():
        raise UserError(f"{path} is not a knowledge base, but {path / 'knowledge_base'} is: name that")
    if not (path / "kb.json").is_file():
        how = "python -m nanochat.retrieval prepare_kb --documents docs.jsonl --output kb"
        raise UserError(f"{path} is not a knowledge base (no kb.json in it); make one with {how}")
    try:
        info = read_json(path / "kb.json")
    except UserError as e:
        raise UserError(f"{e}; delete the folder and {REBUILD}") from e
    if not isinstance(info, dict) or info.get("format") != "nanochat-kb" or not isinstance(info.get("files"), dict):
        raise UserError(f"{path}/kb.json is not that of a knowledge base; {REBUILD}")
    if info.get("version") != KB_VERSION:
        raise UserError(f"{path} has format version {info.get('version')}, not {KB_VERSION}; {REBUILD}")
    if info.get("type") not in TYPES:
        raise UserError(f"{path}/kb.json doesn't say which retriever it was built for (field 'type'); {REBUILD}")
    sound = all(isinstance(f, dict) and {"bytes", "sha256"} <= set(f) for f in info["files"].values())
    segments = info.get("segments")
    sound = sound and isinstance(info.get("removed"), list) and isinstance(segments, list)
    sound = (
        sound and isinstance(cut := info.get("passages"), dict) and all(type(v) in (int, bool) for v in cut.values())
    )
    sound = sound and all(isinstance(s, str) and re.fullmatch(r"\d{6}", s) for s in segments)
    holds = {"documents.jsonl", *(f"segments/{s}/documents.jsonl" for s in segments)} if sound else set()
    if not sound or not holds <= set(info["files"]):
        raise UserError(f"{path}/kb.json is not that of a knowledge base; {REBUILD}")
    return info


def kb_serves(info: dict) -> list[str]:
    """The retriever types a knowledge base serves."""
    built = {"bm25": "bm25/params.index.json" in info["files"], "dense": "index.faiss" in info["files"]}
    return [t for t in TYPES if t == "simple" or built.get(t, all(built.values()))]


NEEDS = {"bm25": ("bm25/",), "dense": ("index.faiss", "embeddings.npy")}
NEEDS["hybrid"] = NEEDS["bm25"] + NEEDS["dense"]


def check_files(path: Path, info: dict, type: str = "hybrid", whole: bool = False) -> None:
    """Raise UserError if a file that `type` needs is missing or changed. `whole`: large ones are hashed, too."""
    needed = ("documents.", *NEEDS.get(type, ()))
    for name, known in info["files"].items():
        if not re.sub(r"^segments/[^/]*/", "", name).startswith(needed):
            continue
        size = (path / name).stat().st_size if (path / name).is_file() else -1
        small = whole or size <= HASHED
        if size != known["bytes"] or (small and sha256_of(path / name) != known["sha256"]):
            raise UserError(f"{path / name} is missing or was changed since it was written; {REBUILD}")


def open_kb(path: str | Path, type: str = "simple", load: Callable[[KnowledgeBase], Any] = lambda kb: kb) -> Any:
    """Open a knowledge base for a retriever type, checked; returns load(kb).

    If it is replaced while being read, it is read again; `load` reads whatever else it wants of the folder.
    """
    path = Path(path)
    for _ in range(100):
        before = _bytes(path / "kb.json")
        try:
            info = kb_info(path)
            check_files(path, info, type)
            everything = Documents(_folders(path, info))
            keep = np.ones(len(everything), dtype=bool)
            keep[info["removed"]] = False
            digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
            loaded = load(KnowledgeBase(path, info, digest, everything, keep, everything.select(keep)))
            if kb_info(path)["files"].items() >= info["files"].items():  # nothing of what was read has been replaced
                return loaded
        except (UserError, OSError, ValueError, LookupError, RuntimeError, TypeError) as e:
            if _bytes(path / "kb.json") == before:  # nobody writes: it is our files that are wrong
                if isinstance(e, UserError):
                    raise
                raise UserError(f"{path} cannot be read ({e}); {REBUILD}") from e
        time.sleep(0.01)
    raise UserError(f"{path} is being written faster than it can be read; try again later")


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def _lock_file(path: Path) -> Path:
    path = path.resolve()
    return path.parent / f".{path.name}.lock"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the only writer. What a killed one left behind is put right first. Raises UserError after WAIT seconds."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(_lock_file(path), "a") as f:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{path} is being written by another process; try again when it is done") from None
                time.sleep(0.02)
        ours = re.compile(rf"\.{re.escape(path.name)}\.(old|new)-nanochat-\w{{8}}")  # as atomic_dir names its folders
        for left in [p for p in path.parent.iterdir() if ours.fullmatch(p.name) and p.is_dir()]:
            if ".old-nanochat-" in left.name and not path.exists() and (left / "kb.json").is_file():
                os.replace(left, path)  # killed between the two renames of a swap
            else:
                shutil.rmtree(left, ignore_errors=True)
        yield


_OURS = re.compile(r"\.kb\.json\.|segments/(\d{6}|\.\d{6}\..*)/")  # what a killed writer may leave behind


def _foreign(path: Path) -> str:
    """The first file in a knowledge base's folder that isn't its own, or ""."""
    old = read_json(path / "kb.json")  # of any version
    ours = {"kb.json", *(old.get("files", ()) if isinstance(old, dict) else ())}
    there = (f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
    hidden = lambda name: name.rpartition("/")[2].startswith(".")  # a file manager's
    return next((n for n in sorted(there) if n not in ours and not _OURS.match(n) and not hidden(n)), "")


def _sync(folder: Path) -> None:
    """Put on disk which files a folder holds: what kb.json names must outlive a power cut if kb.json does."""
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _checksums(folder: Path, prefix: str = "") -> dict:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {
        prefix + f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files
    }


def _write_base(path: Path, documents: Sequence[Document], vectors: np.ndarray | None, info: dict) -> dict:
    """Write a whole knowledge base and swap it in; `info` has type, index, built_from and the like."""
    with atomic_dir(path) as folder:
        _write_documents(folder, documents, vectors)
        if info["type"] in ("bm25", "hybrid"):
            index, average = bm25_index(documents)
            index.save(folder / "bm25", show_progress=False)
            info = {**info, "average_length": average}
        if vectors is not None:
            import faiss

            index, measured = dense_index(vectors, info["index"]["asked"])
            faiss.write_index(index, str(folder / "index.faiss"))
            info = {**info, "index": {**info["index"], **measured}}
        info = {**info, "documents": len(documents), "files": _checksums(folder), "segments": [], "removed": []}
        write_json(folder / "kb.json", info)
    return info


def _embed(documents: Sequence[Document], encoder: Any) -> np.ndarray:
    return encoder.encode_passages([doc.text for doc in documents])


def build_kb(
    documents: Sequence[Document],
    output: str | Path,
    type: str = "hybrid",
    built_from: str = "",
    encoder: str = "",
    index: str = "auto",
    passages: dict | None = None,
) -> dict:
    """Write a knowledge base that serves `type` and whatever that includes; returns what kb.json holds.

    An older one at `output` is replaced; a folder with anything else in it is refused. `built_from` (a checksum of the
    source) lets a caller see that there is nothing to do; `passages` says how the documents were cut. Under torchrun
    all ranks call this, all embed, and rank 0 writes.
    """
    check_choice("retriever type", type, TYPES)
    check_choice("index", index, INDEXES)
    output, documents = Path(output).resolve(), _clean(documents)
    if not documents:
        raise UserError("there are no documents to build a knowledge base of")

    def build() -> dict:
        if output.exists() and not (output / "kb.json").exists() and (output.is_file() or any(output.iterdir())):
            raise UserError(f"{output} exists and is not a knowledge base; choose another --output")
        if (output / "kb.json").exists() and (name := _foreign(output)):
            raise UserError(f"{output} holds {name}, which isn't the knowledge base's; move it away: it would be lost")
        info = {"format": "nanochat-kb", "version": KB_VERSION, "type": type, "built_from": built_from}
        info["passages"] = passages or {}
        vectors = None
        if type in ("dense", "hybrid"):
            model = get_encoder(encoder)
            vectors = _embed(documents, model)
            info |= {"encoder": model.info, "index": {"asked": index}}
        return _write_base(output, documents, vectors, info)

    if is_main():
        with writing(output):
            return from_main(build())
    if type in ("dense", "hybrid"):
        _embed(documents, get_encoder(encoder))
    return from_main(None)


def add_documents(
    path: str | Path, documents: Sequence[Document], replace: bool = False, remove: Sequence[str] = ()
) -> dict:
    """Add documents, durably, embedding only them. A known id is an error, or with `replace` the older one goes.

    Those with the ids in `remove` go in the same step. For one process, not for all of a group.
    """
    return _change(path, _clean(documents), remove, replace)


def remove_documents(path: str | Path, ids: Sequence[str]) -> dict:
    """Remove documents by id, durably. An unknown id is an error."""
    return _change(path, [], ids, False)


def _change(path: str | Path, new: list[Document], ids: Sequence[str], replace: bool) -> dict:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # the others would wait for the lock, and this one for them
        raise UserError("a knowledge base is changed by one process; run this without torchrun")
    kb_info(path)
    path = Path(path).resolve()
    with writing(path):
        info = _read_info(path)
        for left in path.glob(".kb.json.*"):  # what a killed writer left behind
            left.unlink()
        for left in path.glob("segments/*"):
            if left.name not in info["segments"] and re.fullmatch(r"\d{6}|\.\d{6}\..*", left.name):
                shutil.rmtree(left)
        kb = open_kb(path)
        everything, keep = kb.everything, kb.keep
        known = everything.find([doc.id for doc in new], keep)
        if known and not replace:
            raise UserError(
                f"the id {next(iter(known))!r} is already in {path}; --update true (replace=True) replaces documents"
            )
        known |= everything.find(ids, keep)
        if missing := [i for i in ids if i not in known]:
            raise UserError(f"{path} has no document with the id {missing[0]!r}")
        if not new and not known:
            return info
        keep[list(known.values())] = False
        if not keep.any() and not new:
            raise UserError(f"nothing would be left of {path}; delete the folder instead")
        base, n, vectors = int(everything.starts[1]), len(everything), None
        old = kb.vectors() if "encoder" in info else []
        if new and old:
            vectors = _embed(new, get_kb_encoder(info, path))
        if n - base + len(new) + int((~keep).sum()) > max(COMPACT, base // 10) and not _foreign(path):
            check_files(path, info, whole=True)  # what is damaged must not get a new checksum
            if old:
                vectors = np.concatenate([np.concatenate(old)[keep], *([vectors] if new else [])])
                info["index"] = {"asked": info["index"]["asked"]}
            return _write_base(path, [*everything.select(keep), *new], vectors, info)
        gone, added = [], len(new)
        if new:
            name = f"{int(max(info['segments'], default='0')) + 1:06d}"
            if len(info["segments"]) >= MAX_SEGMENTS:
                check_files(path, info)
                new, gone = everything[base:] + new, info["segments"]
                vectors = np.concatenate([*old[1:], vectors]) if old else None
            with atomic_dir(path / "segments" / name) as folder:
                _write_documents(folder, new, vectors)
            _sync(path / "segments")
            files = {f: entry for f, entry in info["files"].items() if not gone or not f.startswith("segments/")}
            info["files"] = {**files, **_checksums(path / "segments" / name, f"segments/{name}/")}
            info["segments"] = [name] if gone else [*info["segments"], name]
        info["removed"], info["documents"] = np.flatnonzero(~keep).tolist(), int(keep.sum()) + added
        write_json(path / "kb.json", info)  # the moment it happens
        _sync(path)
        for name in gone:
            shutil.rmtree(path / "segments" / name, ignore_errors=True)
    return info


def get_kb_encoder(info: dict, path: Path) -> Any:
    """The encoder that a knowledge base was embedded by. Raises UserError if that isn't what its name gives today."""
    known = info.get("encoder")
    name = known.get("name") if isinstance(known, dict) else None
    if not isinstance(name, str) or (encoder := get_encoder(name)).info != known:
        raise UserError(f"{path} was embedded by another encoder; {REBUILD}")
    return encoder
