"""How long will this machine take? Times two steps of each training stage and adds what evaluations usually cost.

    python -m scripts.estimate --preset cpu --base "--depth 6 --num_iterations 900" --mid "" --sft "" --rag ""

speedrun.sh calls it with the flags it is about to use; the stages' own defaults fill in the rest.
"""

import shlex
import time
from dataclasses import dataclass

import torch

from nanochat.common import human, init_distributed, pick_dtype, print0
from nanochat.config import parse, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizer
from scripts import base_train, chat_sft, mid_train, rag_finetune

OTHER_MINUTES = {"smoke": 2, "cpu": 6, "node": 10}  # tokenizer, knowledge base, evaluations; measured on two cores


@dataclass
class Config:
    preset: str = "cpu"  # name of the preset, for what isn't training
    base: str = ""  # flags of base_train
    mid: str = ""  # flags of mid_train
    sft: str = ""  # flags of chat_sft
    rag: str = ""  # flags of rag_finetune


def main(config: Config) -> float:
    d = init_distributed()
    dtype = pick_dtype(d.device.type)
    stages = {
        "pretraining": parse(base_train.Config, shlex.split(config.base)),
        "midtraining": parse(mid_train.Config, shlex.split(config.mid)),
        "chat SFT": parse(chat_sft.Config, shlex.split(config.sft)),
        "RAG SFT": parse(rag_finetune.Config, shlex.split(config.rag)),
    }
    base = stages["pretraining"]
    model_config = GPTConfig.from_depth(
        base.depth, base.block_pattern, vocab_size=8192, sequence_len=base.sequence_len, n_embd=base.n_embd
    )
    model = GPT(model_config)
    model.init_weights()
    model.set_compute_dtype(dtype).to(d.device)
    optimizer = build_optimizer(model.param_groups(0, 0, 0, 0, 0), d)
    total = OTHER_MINUTES.get(config.preset, 5)
    print0(f"this machine computes in {str(dtype).removeprefix('torch.')} on {d.device.type}")
    for name, stage in stages.items():
        shape = (stage.device_batch_size, stage.sequence_len)
        ids = torch.randint(0, 8192, shape, device=d.device)
        targets = ids.clone()
        if name in ("chat SFT", "RAG SFT"):  # a tenth of the tokens is supervised
            targets[:, torch.arange(shape[1]) % 10 != 0] = -1
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            model(ids, targets).backward()
            optimizer.step(1.0, 0.9, 1.0)
            optimizer.zero_grad()
            if d.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        tokens = max(stage.total_batch_size, shape[0] * shape[1])
        minutes = min(seconds[1:]) * tokens / (shape[0] * shape[1]) * stage.num_iterations / 60
        total += minutes
        rate = shape[0] * shape[1] / min(seconds[1:])
        print0(f"  {name:12s} about {minutes:5.1f} min ({stage.num_iterations} steps at {human(rate)} tokens/s)")
    print0(
        f"  {'the rest':12s} about {OTHER_MINUTES.get(config.preset, 5):5.1f} min\n  in all about {total:.0f} minutes"
    )
    return total


if __name__ == "__main__":
    run(main, Config)
