"""What every other file needs: paths, devices, ranks, whole-or-nothing file writes, and one kind of user error.

Nothing here knows about models or data. `UserError` is the exception for everything a user can cause; the
command-line edge (`config.run`) turns it into one line and exit code 2.
"""

import codecs
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """Something the user can mend. The message is one sentence that says what is wrong and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Paths

REPO = Path(__file__).resolve().parent.parent
DATA = REPO / "data"  # what ships with the repo
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # characters, but tab and newline


def get_base_dir() -> Path:
    """Where everything we make lives: `$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    base.mkdir(parents=True, exist_ok=True)
    return base


# ----------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator:
    """Open a file that appears under `path` only if the block ends without an exception.

    The bytes are on disk (fsync) before the rename, so a crash leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)  # mkstemp makes files private; give ours the ordinary permissions
        os.umask(umask)
        os.chmod(tmp, 0o666 & ~umask)
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a fresh folder that becomes `path` only if the block ends without an exception (an old one is replaced)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-nanochat-"))
    try:
        yield tmp
        for f in tmp.rglob("*"):
            if f.is_file():
                with open(f, "rb") as h:
                    os.fsync(h.fileno())
        os.chmod(tmp, 0o755)
        if path.exists():  # a rename can't replace a full folder: move the old one aside first
            old = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-nanochat-")
            os.replace(path, old)
            try:
                os.replace(tmp, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(tmp, path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def write_json(path: str | Path, obj: object) -> None:
    """Write `obj` as indented JSON, atomically."""
    with atomic_file(path) as f:
        json.dump(obj, f, indent=1, ensure_ascii=False)
        f.write("\n")


def read_json(path: str | Path) -> object:
    """Read a JSON file. Raises UserError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is not valid JSON: {e}") from e


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_file(path) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path, required: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield the objects of a .jsonl or .jsonl.gz file; where only the latter exists, it is read for the former.

    Raises UserError, naming the line, if the file is missing, a line isn't a JSON object in UTF-8, or lacks a field
    of `required`. Blank lines are skipped, and so is a byte order mark before the first.
    """
    if not Path(path).exists() and Path(f"{path}.gz").exists():
        path = f"{path}.gz"
    try:
        f = open(path, "rb")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    with f:
        for n, line in enumerate(_unzipped(f, path) if str(path).endswith(".gz") else f, 1):
            if n == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}, line {n}: not valid JSON ({e}); every line must be one JSON object") from e
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {n}: not a JSON object, {{...}}")
            for key in required:
                if key not in row:
                    raise UserError(f"{path}, line {n}: no field '{key}'")
            yield row


def _unzipped(f: BinaryIO, path: str | Path) -> Iterator[bytes]:
    try:
        yield from gzip.GzipFile(fileobj=f)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} is not a whole gzip file: {e}") from e


def sha256_of(path: Path) -> str:
    """The checksum of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Device and dtype


def autodetect_device() -> str:
    """'cuda', 'mps' or 'cpu': the best one present."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cpu_has_fast_bf16() -> bool:
    """True on CPUs with bf16 arithmetic: AMX, where a matmul is about 8x one in fp32, or AVX-512's, about 2.4x."""
    checks = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("amx_tile", "avx512_bf16"))
    return any(check and check() for check in checks)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_dtype(device: str, name: str = "auto") -> torch.dtype:
    """The compute dtype: bf16 where the hardware is good at it, else fp32; `name` other than 'auto' decides."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"--dtype {name}: choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if device == "cpu" and cpu_has_fast_bf16() else torch.float32


class Linear(nn.Linear):
    """A bias-free linear layer whose fp32 master weight is cast to the activation's dtype at the call.

    This replaces autocast: compute runs in the dtype of the embedding's output, the optimizer sees fp32. A model
    that was cast once (`model.to(torch.bfloat16)`, for inference) pays no cast.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks (torchrun)


@dataclass
class Dist:
    """This process's place among the processes torchrun started; a single process is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def init_distributed(device: str = "") -> Dist:
    """Join torchrun's process group if there is one (nccl on CUDA, gloo elsewhere) and pick this rank's device.

    Ranks wait up to two hours for each other: one of them may be downloading shards, and ten minutes (nccl's own
    limit) are too few for that.
    """
    device = device or autodetect_device()
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d{1,3})?", device):
        raise UserError(f"--device {device}: choose cpu, cuda or mps")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    dev = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if dev.type == "cuda":
        if dev.index is not None and dev.index >= (gpus := torch.cuda.device_count()):
            if device != "cuda":
                raise UserError(f"--device {device}: the GPUs here are numbered from 0 to {gpus - 1}")
            raise UserError(f"more processes than GPUs; start torchrun with --nproc_per_node={gpus}")
        torch.cuda.set_device(dev)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return Dist(rank, local, world, dev)


def cleanup_distributed() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """True on rank 0 (or in a single process)."""
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only, `printable` text."""
    if is_main():
        print(*(printable(x) if isinstance(x, str) else x for x in args), **kwargs, flush=True)


def printable(text: str) -> str:
    """Text that a document or a model may have written, without the characters that would steer the terminal."""
    return text.translate(CONTROL)


def on_main_first(fn: Callable[[], None]) -> None:
    """Run `fn` on rank 0 while the other ranks wait (building a shared file, say)."""
    if is_main():
        fn()
    if dist.is_initialized():
        dist.barrier()


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank: what ranks decide together they must decide alike."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def over_ranks(fn: Callable[[list], list], items: Sequence) -> list:
    """`fn(items)`, which gives a result for each item, computed in parts by all ranks; every rank gets all of it."""
    if not dist.is_initialized():
        return fn(list(items))
    rank, world = dist.get_rank(), dist.get_world_size()
    parts: list[list] = [[]] * world
    dist.all_gather_object(parts, fn(list(items[rank::world])))
    out: list = [None] * len(items)
    for r, part in enumerate(parts):
        out[r::world] = part
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Small things


def versions(*more: str) -> dict[str, str]:
    """Versions of what decides the numbers, `more` packages among it."""
    found = {}
    for package in ("torch", "numpy", "safetensors", "tiktoken", "nanochat", *more):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def parse_pattern(text: str, kinds: str = "TM") -> str:
    """Expand a block pattern: 'TTMM', 'T,T,M,M' and run lengths 'T8,M12' all give one letter a layer.

    Raises UserError on anything else.
    """
    parts = re.findall(r"([A-Za-z])(\d*)", text)
    rebuilt = "".join(a + b for a, b in parts)
    if not parts or rebuilt != re.sub(r"[\s,]", "", text) or any(n and not 1 <= int(n) <= 1000 for _, n in parts):
        raise UserError(f"block pattern '{text}' is malformed; write for example TTMM, T,T,M,M or T8,M12")
    pattern = "".join(letter.upper() * int(n or 1) for letter, n in parts)
    if unknown := set(pattern) - set(kinds):
        raise UserError(f"block pattern '{text}' has unknown block '{sorted(unknown)[0]}'; known: {', '.join(kinds)}")
    return pattern


def human(n: float) -> str:
    """1234567 -> '1.2M'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(n) < 1000:
            return f"{n:.0f}{unit}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}P"
