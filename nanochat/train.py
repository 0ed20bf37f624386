"""The training loop. Every stage, from pretraining to reinforcement, is a call of `train`; no script has its own loop.

    final = train(model, loader, config, source="base", tokenizer=tokenizer, evals=[Eval("val", 250, val_bpb)])

One step: draw the micro-batches of `total_batch_size` tokens, count their targets over all ranks, run forward and
backward on each with the weight (its targets / all targets), reduce the gradients, check that they are finite, clip,
update, log, evaluate, save. The weights make the loss the mean over all supervised tokens of the step however they
are spread over micro-batches and ranks: accumulation equals a big batch and two processes equal one.

A checkpoint holds all that decides what comes next (weights, optimizer, loader, random states), so a resumed run has
the losses of an uninterrupted one, bit for bit on a CPU with as many threads.
"""

import ctypes
import json
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from nanochat import checkpoint_manager as ckpt
from nanochat.common import Dist, UserError, human, init_distributed, pick_dtype, print0, write_jsonl
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.tokenizer import Tokenizer


@dataclass
class TrainConfig:
    """What all stages share; a script's config extends it."""

    run: str = ""  # name of the Weights & Biases run; empty: no wandb
    device: str = ""  # cpu, cuda or mps; empty: the best one present
    dtype: str = "auto"  # compute dtype: float32, bfloat16 or auto
    seed: int = 1337  # random seed
    model_tag: str = ""  # name of the run's folder; empty: d<depth>
    num_iterations: int = 1000  # optimizer steps
    max_minutes: float = 0.0  # end after this many minutes: the schedule follows the clock if it is ahead (0: no limit)
    total_batch_size: int = 0  # tokens per step over all processes, reached by accumulation; 0: one micro-batch each
    device_batch_size: int = 8  # rows per micro-batch and process; lower it when memory is short
    sequence_len: int = 0  # tokens per row; 0: the model's context
    matrix_lr: float = 0.02  # learning rate of matrices (Muon)
    embedding_lr: float = 0.2  # learning rate of the embedding (AdamW)
    unembedding_lr: float = 0.004  # learning rate of the head (AdamW)
    mamba_lr: float = 0.003  # learning rate of conv, A_log, D, dt_bias and norms (AdamW)
    lr_scale: float = 1.0  # multiplies all learning rates
    weight_decay: float = 0.0  # of matrices, decoupled
    warmup_ratio: float = 0.0  # share of the run in which learning rates rise linearly from 0
    warmdown_ratio: float = 0.4  # share of the run in which they fall linearly, at the end
    final_lr_frac: float = 0.0  # where they end, as a share of the full rate
    grad_clip: float = 1.0  # longest gradient, as a norm over all parameters (0: no clipping)
    eval_every: int = 100  # steps between validations (0: only at the end)
    save_every: int = 0  # steps between checkpoints (0: only at the end)
    keep_last: int = 1  # checkpoints to keep (0: all)
    keep_best: str = ""  # keep also the checkpoint with the best (highest) of this metric: that is the one to be loaded
    early_stop: int = 0  # end after so many validations in a row without a better --keep_best (0: never)
    resume: bool = False  # continue from the newest checkpoint of this run, if there is one
    compile: bool = False  # torch.compile every block: worth a minute or two on long runs only
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, a third more time
    dry_run: bool = False  # print parameters, FLOPs and an estimate of the memory instead of training


@dataclass
class Eval:
    """`fn(model)` gives named numbers; run on all ranks every `every` steps (0: only) at the end, in eval mode."""

    name: str
    every: int
    fn: Callable[[nn.Module], dict[str, float]]


LossFn = Callable[..., torch.Tensor]


def mean_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The default loss: (B, T) inputs and targets (-1 = none) -> mean cross-entropy over the targets."""
    return model(inputs, targets)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: functions of progress, the share of the run that is done


def run_progress(step: int, seconds: float, config: TrainConfig) -> float:
    """0 at the start, 1 at the end: steps or, with `max_minutes`, time, whichever is further."""
    by_time = seconds / 60 / config.max_minutes if config.max_minutes else 0.0
    return max(step / config.num_iterations, by_time)


def lr_factor(progress: float, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear warm-down to `final_lr_frac`."""
    begun = progress + 1 / config.num_iterations  # the first step moves, too
    if begun < config.warmup_ratio:
        return begun / config.warmup_ratio
    left = 1.0 - progress
    if left < config.warmdown_ratio:
        share = max(0.0, left / config.warmdown_ratio)
        return share + (1 - share) * config.final_lr_frac
    return 1.0


def muon_momentum(step: int) -> float:
    """0.85 -> 0.95 over the first 300 steps (modded-nanogpt's schedule): early averages are of little use."""
    return 0.85 + 0.10 * min(1.0, step / 300)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(
    model: nn.Module,
    loader: Iterator[tuple[torch.Tensor, ...]],
    config: TrainConfig,
    *,
    source: str,
    tokenizer: Any,
    loss_fn: LossFn = mean_loss,
    evals: Sequence[Eval] = (),
    dist_info: Dist | None = None,
    param_groups: list[dict] | None = None,
    meta: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train `model` on batches of `loader` and return the final metrics. Checkpoints go to `source`/`model_tag`.

    A batch is (inputs, targets, ...), targets (B, T) with -1 for none; `loss_fn(model, *batch)` gives their mean loss.
    `loader` has `batch_size` and `sequence_len`, and `state_dict`/`load_state_dict` for resuming. `param_groups`
    defaults to `model.param_groups(...)` with the config's rates. `meta` goes into every checkpoint's meta.json.
    """
    d = dist_info or init_distributed(config.device)
    accumulate = micro_batches(config, loader, d)
    tag = config.model_tag or f"d{model.config.n_layer}"
    run = ckpt.run_dir(source, tag)
    _seed(config.seed + d.rank)
    optimizer = _prepare(model, config, param_groups, d)

    # Where we stand: at the beginning, or where a checkpoint says
    steps = ckpt.list_steps(run) if config.resume else []
    stale = bool(steps) and ckpt.is_stale(steps[-1][1], meta or {})
    if steps and not stale:
        _check_same_run(steps[-1][1], config, tokenizer)
        now = _restore(steps[-1][1], model, optimizer, loader, d)
    else:
        now = Progress()
    _barrier(d)  # everybody has looked before rank 0 tidies up
    if d.rank == 0:
        if stale:
            ckpt.put_aside(run, "not resumed: the checkpoint it started from has been trained anew")
        elif config.resume:
            ckpt.clean_run(run)
        else:
            ckpt.put_aside(run)
        run.mkdir(parents=True, exist_ok=True)
    ended = lambda: run_progress(now.step, now.seconds, config) >= 1.0 or 0 < config.early_stop <= now.worse
    done = complete = ended()
    n_params = sum(p.numel() for p in model.parameters())
    per_step = accumulate * loader.batch_size * loader.sequence_len * d.world_size
    print0(
        f"{source}/{tag}: {human(n_params)} parameters, {human(per_step)} tokens a step, "
        f"steps {now.step} to {config.num_iterations}{', already complete' if complete else ''}"
    )

    def save() -> Path:
        state = {
            "progress": asdict(now),
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict() if hasattr(loader, "state_dict") else {},
            "rng": _rng_state(d.device),
        }
        info = {"source": source, "tag": tag, "config": asdict(config), "metrics": now.metrics, "tokens": now.tokens}
        info |= {"best_step": now.best_step} if now.best_step else {}
        return ckpt.save_checkpoint(run, now.step, model, tokenizer, (meta or {}) | info, state, d, config.keep_last)

    with _catch_signals() as caught, Log(run, now.step, config, source, d) as log:
        clock = time.perf_counter()
        while not done:
            # 1. Forward and backward, each micro-batch weighted by its share of the step's targets
            begin = time.perf_counter()
            batches = [next(loader) for _ in range(accumulate)]
            counts = [int((batch[1] >= 0).sum()) for batch in batches]
            total = _over_ranks(sum(counts), d)
            if total == 0:
                raise UserError(f"step {now.step + 1} has no target in any of its batches; check the data")
            losses = []
            for batch, count in zip(batches, counts):
                batch = [x.to(d.device, non_blocking=True) for x in batch]
                loss = loss_fn(model, *batch) * (count / total)
                loss.backward()
                losses.append(loss.detach())
            norm = optimizer.reduce_gradients()
            losses = torch.stack(losses).tolist()
            loss = _over_ranks(sum(losses), d)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                _stop_non_finite(now.step + 1, loss, losses, batches, run, d)

            # 2. Update
            factor = lr_factor(run_progress(now.step, now.seconds, config), config)
            clip = min(1.0, config.grad_clip / norm) if config.grad_clip and norm > 0 else 1.0
            optimizer.step(factor, muon_momentum(now.step), clip)
            optimizer.zero_grad()
            stop = int(_over_ranks(caught[-1], d, "max"))  # a signal that came to any rank
            end = time.perf_counter()
            now.step += 1
            now.tokens += per_step
            now.seconds += _over_ranks(end - clock, d, "max")  # with the evaluations since the last step
            now.loss = loss if now.step == 1 else 0.95 * now.loss + 0.05 * loss
            clock = end
            progress = run_progress(now.step, now.seconds, config)
            log.step(now, progress, {
                "loss": loss, "grad_norm": norm, "lr_factor": factor, "targets": int(total), "tokens": now.tokens,
                "seconds": round(now.seconds, 3), "tokens_per_second": round(per_step / (end - begin)),
            })  # fmt: skip

            # 3. Evaluate, save, stop
            better = False
            try:
                due = lambda e: bool(e.every) and now.step % e.every == 0
                for e in sorted(evals, key=due, reverse=True):  # one that is due may end the run, and then all are
                    if due(e) or ended():
                        model.eval()
                        found = {name: float(value) for name, value in e.fn(model).items()}
                        model.train()
                        now.metrics |= found
                        log.eval(now.step, e.name, found)
                        if config.keep_best in found:
                            better = now.judge(_over_ranks(found[config.keep_best], d, "max"))
            except Exception:  # whatever an evaluation trips over, the training so far is kept
                if d.world_size == 1:  # saving takes all ranks, and the others may be well
                    save()
                raise
            done = ended()
            if done or stop or better or (config.save_every and now.step % config.save_every == 0):
                now.metrics["loss"] = now.loss
                saved = save()
            if stop and not done:
                log.close()
                print0(f"stopped by {signal.Signals(stop).name}: saved {saved}; continue with --resume true")
                sys.exit(128 + stop)

    if config.keep_best and config.keep_best not in now.metrics:
        print0(
            f"--keep_best {config.keep_best}: no such metric, so the last counts; there are {', '.join(now.metrics)}"
        )
    elif now.best_step not in (0, now.step):
        print0(f"{source}/{tag}: the best {config.keep_best} was {now.best:.4g} at step {now.best_step}, which is kept")
    if not complete and (used := _data_use(loader)):
        print0(f"{source}/{tag}: {used}")
    return now.metrics | {"step": now.step, "tokens": now.tokens, "minutes": round(now.seconds / 60, 2)}


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # running mean of the training loss, over about 20 steps
    metrics: dict[str, float] = field(default_factory=dict)  # the latest of every evaluation
    best: float = -math.inf  # of the metric `keep_best`
    best_step: int = 0  # where that was; 0: never
    worse: int = 0  # validations since

    def judge(self, value: float) -> bool:
        """Note a value of `keep_best`; whether it is the best so far."""
        if better := value > self.best:
            self.best, self.best_step, self.worse = value, self.step, 0
        else:
            self.worse += 1
        return better


class Log:
    """Rank 0's progress bar, metrics.jsonl and, if the run is named, Weights & Biases."""

    def __init__(self, run: Path, step: int, config: TrainConfig, source: str, d: Dist):
        self.bar = self.file = self.wandb = None
        if d.rank != 0:
            return
        self.file = _open_metrics(run / "metrics.jsonl", step)
        if config.run:
            try:
                import wandb
            except ImportError as e:
                raise UserError("--run needs the wandb package: pip install wandb, or leave --run empty") from e
            self.wandb = wandb.init(project="nanochat-rag", name=config.run, group=source, config=asdict(config))
        # in a log file the bar is a line now and then
        every = 0.2 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(
            total=config.num_iterations, initial=step, mininterval=every, desc=source, unit="step", dynamic_ncols=True
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def step(self, now: Progress, progress: float, row: dict[str, float]) -> None:
        if self.bar is None:
            return
        self._write({"step": now.step} | row)
        self.bar.total = max(now.step, round(now.step / progress))  # with --max_minutes the end is an estimate
        self.bar.set_postfix_str(f"loss {now.loss:.3f}, {human(row['tokens_per_second'])} tok/s", refresh=False)
        self.bar.update()

    def eval(self, step: int, name: str, found: dict[str, float]) -> None:
        if self.bar is None:
            return
        self._write({"step": step} | found)
        self.bar.write(f"step {step} | {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()
            self.bar = None

    def _write(self, row: dict[str, float]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()  # a killed run keeps its curve
        if self.wandb:
            self.wandb.log(row, step=row["step"])


def _open_metrics(path: Path, step: int):
    """Open metrics.jsonl for appending, without what an interrupted run logged after `step` (or half a line of it)."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                rows.append(row)
    write_jsonl(path, rows)
    return open(path, "a", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Before the first step


def micro_batches(config: TrainConfig, loader: Any, d: Dist) -> int:
    """Check the numbers a user can get wrong; the micro-batches each rank does in a step."""
    if config.num_iterations < 1:
        raise UserError(f"--num_iterations {config.num_iterations}: at least 1")
    for name in ("max_minutes", "total_batch_size", "grad_clip", "eval_every", "save_every", "keep_last", "early_stop"):
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name} {getattr(config, name)}: 0 or more")
    if config.early_stop and not config.keep_best:
        raise UserError("--early_stop needs --keep_best, the name of the metric that decides")
    for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} {getattr(config, name)}: between 0 and 1")
    micro = loader.batch_size * loader.sequence_len * d.world_size
    if config.total_batch_size % micro:
        raise UserError(
            f"--total_batch_size {config.total_batch_size} is not a multiple of {loader.batch_size} rows x "
            f"{loader.sequence_len} tokens x {d.world_size} processes = {micro}; "
            f"try {max(1, round(config.total_batch_size / micro)) * micro}"
        )
    return max(1, config.total_batch_size // micro)


def _prepare(model: nn.Module, config: TrainConfig, groups: list[dict] | None, d: Dist) -> MuonAdamW:
    """Put the model on its device, in training mode, and build its optimizer."""
    if d.device.type == "cpu":
        keep_memory()
    if hasattr(model, "set_compute_dtype"):
        model.set_compute_dtype(pick_dtype(d.device.type, config.dtype))
    if config.gradient_checkpointing:
        model.gradient_checkpointing = True
    model.to(d.device).train()
    if groups is None:
        rates = (config.matrix_lr, config.embedding_lr, config.unembedding_lr, config.mamba_lr)
        groups = model.param_groups(*rates, config.weight_decay)
    optimizer = build_optimizer([{**g, "lr": g["lr"] * config.lr_scale} for g in groups], d)
    if config.compile:
        model.compile_blocks()
    return optimizer


def keep_memory() -> None:
    """Have glibc keep what is freed: otherwise every large temporary is handed back and paged in anew.

    At 8k tokens a step and 7M parameters that took 0.45 of 3.4 CPU-seconds; peak memory is the same.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with suppress(OSError, AttributeError, TypeError):  # elsewhere than on glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _check_same_run(path: Path, config: TrainConfig, tokenizer: Any) -> None:
    """Refuse to continue a run with other data: the loader would go on at a place that is none."""
    before = ckpt.read_meta(path).get("config", {})
    shares = [name for name in vars(config) if name.endswith("_share")]
    same = ("data", "seed", "device_batch_size", "sequence_len", "top_k", *shares)
    changed = [
        f"--{name} {getattr(config, name)}, not {before[name]}"
        for name in same
        if name in before and hasattr(config, name) and before[name] != getattr(config, name)
    ]
    saved = tokenizer and Tokenizer.load(path)
    if saved and (saved.ranks, saved.pattern) != (tokenizer.ranks, tokenizer.pattern):
        changed.append("another tokenizer")
    if changed:
        raise UserError(
            f"cannot resume from {path}: this run has {' and '.join(changed)}; "
            "start it without --resume, or resume with the settings it had"
        )


def _restore(path: Path, model: nn.Module, optimizer: MuonAdamW, loader: Any, d: Dist) -> Progress:
    """Load everything a checkpoint holds into its place."""
    weights, _ = ckpt.load_checkpoint(path)
    state = ckpt.load_train_state(path, d)
    ckpt.load_weights(model, weights, path)
    optimizer.load_state_dict(state["optimizer"])
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict(state["loader"])
    _set_rng_state(state["rng"], d.device)
    print0(f"resuming from {path}")
    return Progress(**state["progress"])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _data_use(loader: Any) -> str:
    """How full this process's rows were and what of its data was left out, where that is more than a hundredth.

    Empty for a loader that doesn't count. What a stream passed over is counted since the start or the last resume.
    """
    if not hasattr(loader, "packing_efficiency"):
        return ""
    parts = [f"rows were {loader.packing_efficiency:.1%} full"]
    read = (loader.next_index - loader.rank) // loader.world_size
    for what, why in (("skipped", "without a target"), ("truncated", "longer than a row")):
        if (n := loader.counts[what]) > read / 100:
            parts.append(f"{what} {n} of {read} samples ({why})")
    mix = loader.stream
    for name, stream in getattr(mix, "streams", {"data": mix}).items():
        drawn = getattr(mix, "counts", {}).get(name, read)
        if (n := getattr(stream, "skipped", 0)) > drawn / 100:
            parts.append(f"{name}: {n} conversations didn't fit into a row and were passed over, {drawn} were drawn")
    return "; ".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, signals, accidents


def _over_ranks(value: float, d: Dist, op: str = "sum") -> float:
    """The sum or maximum of a number over all ranks."""
    if d.world_size == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=d.device)
    dist.all_reduce(box, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return box.item()


def _barrier(d: Dist) -> None:
    if d.world_size > 1:
        dist.barrier()


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """A list whose last item is the signal to stop for, 0 until SIGINT or SIGTERM comes; a second one acts at once."""
    caught, before = [0], {}

    def note(number: int, _frame) -> None:
        caught.append(number)
        print0(f"\n{signal.Signals(number).name}: finishing this step and saving (again: stop at once)")
        for s, handler in before.items():
            signal.signal(s, handler)

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _stop_non_finite(step: int, loss: float, losses: list[float], batches: list, run: Path, d: Dist) -> None:
    """Write the batches to a file and raise; weights and checkpoints are as they were before the step."""
    bad = next((i for i, x in enumerate(losses) if not math.isfinite(x)), None)
    file = run / f"nonfinite_step_{step:06d}_rank{d.rank}.pt"
    torch.save({"step": step, "losses": losses, "batches": batches}, file)
    found = None if bad is None else f"process {d.rank}, micro-batch {bad}, {batches[bad][0][0, :12].tolist()}"
    if d.world_size > 1:
        everywhere: list[str | None] = [None] * d.world_size
        dist.all_gather_object(everywhere, found)
        found = next((x for x in everywhere if x), None)
    what = f"the loss is {loss}" if found else "the gradient is not finite"
    where = found or f"process {d.rank}, {batches[0][0][0, :12].tolist()}"
    raise UserError(
        f"step {step}: {what} (batch that begins: {where}); weights and checkpoints are as before it. "
        f"The batches are in {file}. Try a lower --lr_scale, or --dtype float32, or look at the data"
    )
