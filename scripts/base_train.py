"""Pretrain a model: first to copy, recall and look up, then to continue text.

    python -m scripts.base_train --depth 6 --block_pattern hybrid
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth 20 --data fineweb:240

`--depth` sets width and heads; `--block_pattern` is gpt, hybrid, mamba or letters such as MMTMMT. The run opens with
the drill ladder (tasks/drills.py): on two cores it is minutes, and without it nothing later learns to read. When the
ladder is climbed, or `drill_until` of the run is over, text takes over and a small share of drills stays.
"""

import math
from dataclasses import dataclass

import torch

from nanochat.common import get_base_dir, init_distributed, print0
from nanochat.config import run
from nanochat.dataloader import PackedLoader
from nanochat.dataset import TextStream, load_texts
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import text_validation
from nanochat.memory_estimate import dry_run, vocabulary
from nanochat.tokenizer import Tokenizer
from nanochat.train import Eval, TrainConfig, train
from tasks.common import MixStream, check_shares
from tasks.drills import DrillStream, climb

DRILL_EVERY = 10  # steps between looks at the ladder: 8 short forward passes for each kind of drill


@dataclass
class Config(TrainConfig):
    depth: int = 6  # number of blocks: the dial that sets width, heads and the rest
    block_pattern: str = "hybrid"  # gpt, hybrid, mamba, or one letter a block: MMTMMT, T2,M4
    n_embd: int = 0  # width; 0: 64 x depth, at least 256
    sequence_len: int = 512  # context to train at, in tokens
    data: str = "embedded"  # text: embedded, fineweb:N, or a folder or file of your own
    drill_share: float = 0.1  # share of drills once the ladder is climbed
    drill_until: float = 0.4  # share of the run after which text takes over in any case (0: no drills at all)
    val_batches: int = 16  # validation batches
    eval_every: int = 100  # steps between validations (0: only at the end)


def main(config: Config) -> dict[str, float]:
    # 1. Model
    shape = {"depth": config.depth, "pattern": config.block_pattern, "n_embd": config.n_embd}
    shape["sequence_len"] = config.sequence_len
    if config.dry_run:
        return dry_run(config, GPTConfig.from_depth(**shape, vocab_size=vocabulary(config.depth)))
    d = init_distributed(config.device)
    tokenizer = Tokenizer.load(get_base_dir() / "tokenizer")
    torch.manual_seed(config.seed)
    model_config = GPTConfig.from_depth(**shape, vocab_size=tokenizer.vocab_size)
    model = GPT(model_config)
    model.init_weights()
    print0(f"{model_config.block_pattern}, width {model_config.n_embd}, parameters: {model.num_params()}")

    # 2. Data: drills first, then text
    drills = DrillStream(tokenizer, seed=config.seed)
    text = TextStream(load_texts(config.data, "train"), tokenizer, seed=config.seed)
    opening = {"text": 0.02, "drill": 0.98} if config.drill_until else {"text": 1.0, "drill": 0.0}
    mix = MixStream({"text": text, "drill": drills}, opening, config.seed, d.world_size)
    loader = PackedLoader(mix, config.device_batch_size, config.sequence_len, d.rank, d.world_size)

    # 3. Evaluations; the drills' one also decides what is trained on next
    evals = [Eval("val", config.eval_every, text_validation(config.data, tokenizer, config, config.val_batches))]
    if config.drill_until:
        patience = math.ceil(config.drill_until * config.num_iterations / DRILL_EVERY)
        after = check_shares({"text": 1 - config.drill_share, "drill": config.drill_share})
        evals.append(Eval("drill", DRILL_EVERY, lambda m: climb(m, drills, mix, after, patience)))
    return train(
        model, loader, config, source="base", tokenizer=tokenizer, evals=evals, dist_info=d,
        meta={"data": config.data},
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config)
