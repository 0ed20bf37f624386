"""How long will the training stages take here? Times a few steps of each, with the flags it is going to be run with.

    python -m scripts.estimate --base "--depth 6 --n_embd 256 --num_iterations 500" --sft "--num_iterations 60"

speedrun.sh calls it before it starts. The stages' own defaults fill in what the flags don't say. One process is timed;
`--nproc` says how many there will be. What can't be measured beforehand is named, with a figure from elsewhere if
there is one.
"""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nanochat.common import UserError, human, init_distributed, pick_dtype, print0
from nanochat.config import parse, run
from nanochat.evidence import EvidenceConfig, Pointer, pointer_loss
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.train import TrainConfig
from scripts import base_train, chat_sft, evidence_train, mid_train, rag_finetune, tok_train

# Minutes of tokenizer, knowledge base and evaluations, on two cores with bf16 units; nobody has run the node preset.
OTHER_MINUTES = {"smoke": 6, "cpu": 30}
# Validations and checkpoints between the steps: they made runs of the cpu preset's stages 1.1 to 1.25 times as long.
BETWEEN_STEPS = 1.2
STAGES = {
    "pretraining": ("base", base_train.Config),
    "midtraining": ("mid", mid_train.Config),
    "chat SFT": ("sft", chat_sft.Config),
    "evidence reader": ("evidence", evidence_train.Config),
    "RAG SFT": ("rag", rag_finetune.Config),
}


@dataclass
class Config:
    """What is about to be run."""

    preset: str = "cpu"  # name of the preset, for what isn't measured
    nproc: int = 1  # processes a training stage will use
    tok: str = ""  # flags of tok_train, as one string
    base: str = ""  # flags of base_train
    mid: str = ""  # flags of mid_train
    sft: str = ""  # flags of chat_sft
    evidence: str = ""  # flags of evidence_train
    rag: str = ""  # flags of rag_finetune
    device: str = ""  # cpu, cuda or mps; empty: the best one present


def main(config: Config) -> dict[str, float]:
    """Print the estimate and return the minutes of each stage."""
    # 1. The stages as they will be run, and the model they train
    if config.nproc < 1:
        raise UserError(f"--nproc {config.nproc}: at least 1")
    d = init_distributed(config.device)
    vocab_size = parse(tok_train.Config, shlex.split(config.tok)).vocab_size
    stages = {name: parse(kind, shlex.split(getattr(config, flag))) for name, (flag, kind) in STAGES.items()}
    base = stages["pretraining"]
    model = GPT(GPTConfig.from_depth(base.depth, base.block_pattern, vocab_size=vocab_size, n_embd=base.n_embd))
    model.init_weights()
    dtype = pick_dtype(d.device.type, base.dtype)
    model.set_compute_dtype(dtype).to(d.device).train()
    optimizer = build_optimizer(model.param_groups(0, 0, 0, 0, 0), d)
    print0(f"this machine computes in {str(dtype).removeprefix('torch.')} on {d.device.type}; about")

    # 2. Time them
    known = config.preset in OTHER_MINUTES
    minutes = {}
    for name, stage in stages.items():
        length = stage.sequence_len or base.sequence_len
        shape = (stage.device_batch_size, length)
        if name == "evidence reader":
            net = Pointer(EvidenceConfig()).to(d.device)
            kinds = torch.arange(length, device=d.device).ge(length // 4).long().expand(shape)
            ids, targets = torch.full_like(kinds, 2000), torch.zeros((shape[0], 2), dtype=torch.long, device=d.device)
            learn = partial(pointer_loss, net, ids, targets, kinds)
            micro, update = time_step(learn, build_optimizer(net.param_groups(0, 0, 0), d), d.device)
        else:
            supervised = 0.1 if name in ("chat SFT", "RAG SFT") else 1.0  # share of tokens that are targets
            ids = torch.randint(0, model.config.vocab_size, shape, device=d.device)
            targets = torch.where(torch.rand(shape, device=d.device) < supervised, ids, -1)
            micro, update = time_step(partial(model, ids, targets), optimizer, d.device)
        tokens, seconds = step_cost(stage, length, config.nproc, micro, update, d.device.type)
        minutes[name] = seconds * stage.num_iterations / 60 * (BETWEEN_STEPS if known else 1)
        rate = human(tokens / seconds)
        print0(f"  {name:12s} {minutes[name]:7.1f} min   {stage.num_iterations} steps at {rate} tokens/s")

    # 3. And what can't be timed beforehand
    total = sum(minutes.values())
    if known:
        rest = OTHER_MINUTES[config.preset]
        print0(f"  {'the rest':12s} {rest:7.1f} min   not measured here: as on two cores with bf16 units")
        print0(f"  in all {total + rest:.0f} minutes; a sixth of the stages is for validations, as measured elsewhere")
    else:
        rest = "downloads, tokenizer, knowledge base, validations, evaluations"
        print0(f"  {'the rest':12s} {'':7s}       not measured here: {rest}")
        print0(f"  in all {total:.0f} minutes and the rest")
    if config.nproc > 1:
        print0("  what processes cost each other by talking and waiting is not measured here")
    return minutes


def time_step(loss: Callable[[], torch.Tensor], optimizer: MuonAdamW, device: torch.device) -> tuple[float, float]:
    """Seconds of one micro-batch, forward and backward, and of one update: the better of two, after one to warm up."""
    micro, update = [], []
    for _ in range(3):
        marks = [_now(device)]
        loss().backward()
        marks.append(_now(device))
        optimizer.reduce_gradients()
        optimizer.step(1.0, 0.9, 1.0)
        optimizer.zero_grad()
        marks.append(_now(device))
        micro.append(marks[1] - marks[0])
        update.append(marks[2] - marks[1])
    return min(micro[1:]), min(update[1:])


def step_cost(
    stage: TrainConfig, length: int, nproc: int, micro: float, update: float, device: str
) -> tuple[int, float]:
    """(tokens, seconds) of one step of `stage`. On a CPU the processes share the cores that one was timed on."""
    per_micro = stage.device_batch_size * length * nproc
    accumulate = max(1, stage.total_batch_size // per_micro)
    return accumulate * per_micro, accumulate * micro * (nproc if device == "cpu" else 1) + update


def glue(argv: Sequence[str]) -> list[str]:
    """`--base VALUE` as `--base=VALUE`: argparse takes a value that begins with a dash for an option of its own."""
    flags, rest = {"--tok", *(f"--{flag}" for flag, _ in STAGES.values())}, iter(argv)
    return [f"{arg}={next(rest, '')}" if arg in flags else arg for arg in rest]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run(main, Config, glue(sys.argv[1:]))
