"""Checkpoints: written whole or not at all, self-contained, checked when read.

    $NANOCHAT_BASE_DIR/checkpoints/<source>/<tag>/          a run; its metrics.jsonl stands here, too
        step_000123/                                        the state after 123 updates
            model.safetensors                               fp32 weights; a tied weight is stored once
            meta.json                                       model_config, step, metrics, config, sha256, versions
            tokenizer.json                                  so that the folder can be moved anywhere
            optim_rank0.pt optim_rank1.pt ...               optimizer, loader and random states, for resuming only

    model, tokenizer, meta = load_model("rag", device="cpu")

A folder being written has a name that starts with a dot and is renamed when everything in it is on disk; what killed
runs leave behind is ignored, and removed by the next run (`clean_run`).
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError

from nanochat.common import (
    Dist,
    UserError,
    atomic_dir,
    from_main,
    get_base_dir,
    pick_dtype,
    print0,
    read_json,
    sha256_of,
    versions,
)
from nanochat.gpt import GPT, GPTConfig, config_dict
from nanochat.tokenizer import Tokenizer

SOURCES = ("base", "mid", "sft", "rag", "evidence", "refrag", "self_rag", "gate", "z_read")
SCHEMA = 1
OLD = ".old"  # suffix of a run that was put aside when a new one took its tag


# ----------------------------------------------------------------------------------------------------------------------
# Where


def checkpoints_dir() -> Path:
    return get_base_dir() / "checkpoints"


def run_dir(source: str, tag: str) -> Path:
    """The folder of one run. Raises UserError if `source` or `tag` can't name one."""
    if source not in SOURCES:
        raise UserError(f"unknown source '{source}'; choose one of {', '.join(SOURCES)}, or give a checkpoint folder")
    if not re.fullmatch(r"[\w][\w.+-]*", tag):
        raise UserError(f"--model_tag '{tag}': use letters, digits and _ . + - only")
    return checkpoints_dir() / source / tag


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, ascending."""
    found = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in run.glob("step_*")]
    return sorted((int(m[1]), p) for m, p in found if m and (p / "meta.json").exists())


def find_checkpoint(source: str, model_tag: str | None = None, step: int | None = None) -> Path:
    """The step folder meant by `source` (one of SOURCES, or a path to a step folder or run folder), tag and step.

    Without a tag the run that was written to last, without a step its best where it kept that, else its last. Raises
    UserError if there is none.
    """
    if source in SOURCES:
        if model_tag:
            run = run_dir(source, model_tag)
        else:
            runs = [r for r in (checkpoints_dir() / source).glob("*") if not r.name.endswith(OLD) and list_steps(r)]
            if not runs:
                raise UserError(f"no '{source}' checkpoint in {checkpoints_dir()}; train one, or set NANOCHAT_BASE_DIR")
            run = max(runs, key=lambda r: (list_steps(r)[-1][1] / "meta.json").stat().st_mtime)
    else:
        run = Path(source)
        if not run.is_dir():
            raise UserError(f"'{source}' is neither a checkpoint folder nor one of {', '.join(SOURCES)}")
        if not list_steps(run):  # a step folder, then; load_checkpoint says what is missing in it
            return run
    steps = list_steps(run)
    if not steps:
        raise UserError(f"no checkpoint in {run}; known tags: {', '.join(_tags(source)) or 'none'}")
    if step is None:
        best = read_meta(steps[-1][1]).get("best_step")
        return dict(steps).get(best, steps[-1][1])
    for number, path in steps:
        if number == step:
            return path
    raise UserError(f"no step {step} in {run}; there are {', '.join(str(n) for n, _ in steps)}")


def _tags(source: str) -> list[str]:
    return sorted(r.name for r in (checkpoints_dir() / source).glob("*") if list_steps(r)) if source in SOURCES else []


def put_aside(run: Path, why: str = "no --resume") -> None:
    """Move a finished run out of the way of a new one with its tag; only the last one put aside is kept."""
    if not run.exists():
        return
    old = run.with_name(run.name + OLD)
    if list_steps(run):
        shutil.rmtree(old, ignore_errors=True)
        run.rename(old)
        print0(f"{run} holds an earlier run ({why}): moved to {old.name}")
    else:
        shutil.rmtree(run)


def clean_run(run: Path) -> None:
    """Remove what a killed run left behind."""
    for leftover in run.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Save


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    meta: dict[str, Any],
    train_state: dict[str, Any],
    dist_info: Dist,
    keep_last: int = 0,
) -> Path:
    """Write run/step_xxxxxx; all ranks call it, each with its own `train_state`. Returns the folder.

    `meta` must be JSON; model_config, step, sizes, time and versions are added. Then all but the `keep_last` newest
    steps (0 keeps all) and `meta`'s "best_step", if it names one, are removed. Raises UserError, on every rank, if any
    of them can't write; what was there stays.
    """
    path = run / f"step_{step:06d}"
    if path.exists():  # resumed and stopped again before the next update: the same state
        return path
    try:
        if dist_info.rank == 0:
            with atomic_dir(path) as tmp:
                from_main(str(tmp))
                error = _attempt(lambda: _write_model(tmp, step, model, tokenizer, meta))
                error = error or _attempt(lambda: _write_state(tmp, train_state, 0))
                _raise_any(error, dist_info)
        else:
            tmp = Path(from_main(None))
            _raise_any(_attempt(lambda: _write_state(tmp, train_state, dist_info.rank)), dist_info)
    except OSError as e:
        last = list_steps(run)
        kept = f"the last complete one is {last[-1][1]}" if last else "there is no earlier one"
        raise UserError(f"cannot save the checkpoint {path}: {e.strerror or e}; {kept}") from e
    if dist_info.rank == 0 and keep_last > 0:
        for number, old in list_steps(run)[:-keep_last]:
            if number == meta.get("best_step"):
                continue
            hidden = old.with_name(f".{old.name}.removed")  # a kill in mid-removal leaves no half checkpoint
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
    if dist_info.world_size > 1:
        dist.barrier()
    return path


def _write_model(folder: Path, step: int, model: nn.Module, tokenizer: Tokenizer | None, meta: dict[str, Any]) -> None:
    weights, tied = {}, {}
    first: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        weights[name] = tensor.detach().cpu().contiguous()
    file = folder / "model.safetensors"
    safetensors.torch.save_file(weights, file)
    if tokenizer:
        tokenizer.save(folder)
    meta = {
        "schema": SCHEMA,
        "step": step,
        "model_config": config_dict(model.config),
        **meta,
        "tied": tied,
        "model_file": {"bytes": file.stat().st_size, "sha256": sha256_of(file)},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_state(folder: Path, state: dict[str, Any], rank: int) -> None:
    with open(folder / f"optim_rank{rank}.pt", "wb") as f:
        torch.save(state, f)


def _attempt(write: Callable[[], None]) -> OSError | None:
    """Run `write`; the error if the disk is full or not ours, in whichever disguise a library raises it."""
    try:
        write()
        return None
    except OSError as e:
        return e
    except (SafetensorError, RuntimeError) as e:  # safetensors and torch.save put their own errors on top
        cause = e.__context__
        return cause if isinstance(cause, OSError) else OSError(0, str(e).splitlines()[0])


def _raise_any(error: OSError | None, dist_info: Dist) -> None:
    """Wait until every rank has written; raise if one could not."""
    if dist_info.world_size > 1:
        boxes: list[str | None] = [None] * dist_info.world_size
        dist.all_gather_object(boxes, error and (error.strerror or str(error)))
        error = next((OSError(0, text) for text in boxes if text), None)
    if error:
        raise error


# ----------------------------------------------------------------------------------------------------------------------
# Load


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a step folder. Raises UserError if it is no checkpoint of ours."""
    if not (path / "meta.json").exists():
        raise UserError(f"{path} is not a checkpoint: it has no meta.json")
    meta = read_json(path / "meta.json")
    if not isinstance(meta, dict) or "schema" not in meta or "model_file" not in meta:
        raise UserError(f"{path}/meta.json is not a checkpoint's: no field 'schema' or 'model_file'")
    if meta["schema"] != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {meta['schema']}, this version reads {SCHEMA}")
    return meta


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, meta) of a step folder. Raises UserError if it is no checkpoint of ours, truncated or altered."""
    path = Path(path)
    meta = read_meta(path)
    file = path / "model.safetensors"
    if not file.exists():
        raise UserError(f"{path} is incomplete: model.safetensors is missing")
    size, want = file.stat().st_size, meta["model_file"]
    if size != want["bytes"]:
        raise UserError(f"{file} is truncated or replaced: {size} bytes, written with {want['bytes']}")
    if sha256_of(file) != want["sha256"]:
        raise UserError(f"{file} is damaged: its sha256 is not the one in meta.json")
    try:
        weights = safetensors.torch.load_file(file, device=str(device))
    except SafetensorError as e:
        raise UserError(f"{file} is not a safetensors file: {e}") from e
    for name, other in meta.get("tied", {}).items():
        weights[name] = weights[other]
    return weights, meta


def load_train_state(path: Path, dist_info: Dist) -> dict[str, Any]:
    """This rank's optimizer, loader and random states. Raises UserError if they are missing or unreadable."""
    file = Path(path) / f"optim_rank{dist_info.rank}.pt"
    if not file.exists():
        raise UserError(f"cannot resume from {path}: {file.name} is missing (written by fewer processes?)")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises whatever the unpickler or the zip reader raise
        raise UserError(f"cannot resume: {file} is unreadable ({type(e).__name__})") from e


def parent_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What a stage notes in its own meta about the checkpoint it starts from, whose `meta` is given."""
    return {"parent": meta["source"], "parent_step": meta["step"], "parent_sha256": meta["model_file"]["sha256"]}


def is_stale(path: Path, meta: dict[str, Any]) -> bool:
    """Whether the checkpoint at `path` came from another parent than a run with this `meta` would start from."""
    now, saved = meta.get("parent_sha256"), read_meta(path)
    if not now or "parent_sha256" not in saved:
        return False
    return now not in (saved["parent_sha256"], saved["model_file"]["sha256"])  # the latter: a run continuing itself


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], where: str | Path) -> None:
    """Copy `weights` into `model`. Raises UserError if names or shapes differ, or a number isn't finite.

    The latter is looked for here because the CPU kernels are compiled for finite numbers: from NaN they could compute
    something that looks sound.
    """
    own = model.state_dict()
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or unknown:
        what = f"lacks {sorted(missing)[0]}" if missing else f"has an unknown {sorted(unknown)[0]}"
        raise UserError(f"{where} doesn't fit this model: it {what} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{where} doesn't fit this model: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds NaN or infinity, so the run had diverged; take an earlier step")
    model.load_state_dict(weights)


def load_model(
    source: str,
    device: str | torch.device = "cpu",
    phase: str = "eval",
    model_tag: str | None = None,
    step: int | None = None,
    dtype: str = "auto",
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, meta) of a checkpoint; `source`, `model_tag` and `step` as in `find_checkpoint`.

    phase "eval": weights are cast once to the compute dtype, no gradients. phase "train": fp32 weights, cast where
    they are used. The model carries its tokenizer as `model.tokenizer`.
    """
    if phase not in ("train", "eval"):
        raise UserError(f"phase '{phase}': choose train or eval")
    path = find_checkpoint(source, model_tag, step)
    print0(f"loading {path}")
    weights, meta = load_checkpoint(path)
    if meta.get("source") == "evidence":
        raise UserError(f"{path} is an evidence reader, not a language model; give the source rag")
    from nanochat.reader import check_confidence  # training needs neither it nor the engine

    tokenizer = Tokenizer.load(path)
    try:
        config = GPTConfig(**meta["model_config"])
        confidence = check_confidence(meta.get("confidence"))
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}/meta.json has settings this version doesn't know: {e}") from e
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only {config.vocab_size}: "
            "they don't belong together"
        )
    model = GPT(config)
    load_weights(model, weights, path)
    model.set_compute_dtype(pick_dtype(torch.device(device).type, dtype))
    model.tokenizer = tokenizer
    model.confidence = confidence
    if phase == "eval" and confidence and meta.get("evidence"):
        from nanochat.evidence import evidence_of  # it needs this module

        model.evidence = evidence_of(meta["evidence"], device, dtype)
        model.confidence = confidence if model.evidence else None  # it was learned with what isn't there
    model.to(device)
    if phase == "eval":
        model.eval().requires_grad_(False)
        for p in model.parameters():  # vectors (A_log, dt_bias, norms) are few and stay exact
            if p.ndim >= 2:
                p.data = p.data.to(model.compute_dtype)
    else:
        model.train()
    return model, tokenizer, meta
