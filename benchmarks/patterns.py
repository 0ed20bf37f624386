"""Which backbone learns text fastest: gpt, mamba and hybrid at equal parameters and tokens, in bits per byte.

    python -m benchmarks.patterns --num_iterations 150 --output patterns.json

An 'M' block has about half the weights of a 'T' block (no MLP), so the depths differ: 4, 8 and 6 blocks of one width
have equal size to within 5 %. Every model runs base_train on the embedded corpus with the same seed, steps, rows and
learning rates, without drills; checkpoints go to base/pattern_<name>.
"""

from dataclasses import dataclass

from benchmarks.common import report
from nanochat.checkpoint_manager import load_model
from nanochat.config import run
from scripts import base_train

CASES = {"gpt": (4, "TTTT"), "mamba": (8, "MMMMMMMM"), "hybrid": (6, "MMTMMT"), "hybrid_early_T": (6, "TTMMMM")}


@dataclass
class Config:
    """Settings of the comparison."""

    num_iterations: int = 150  # optimizer steps each
    device_batch_size: int = 8  # rows per step
    sequence_len: int = 512  # tokens per row
    n_embd: int = 256  # width
    seed: int = 1337  # of weights and order of documents
    max_examples: int = 0  # only the first so many patterns (0: all)
    output: str = ""  # write the figures to this JSON file


def main(config: Config) -> dict:
    rows = {}
    for name, (depth, pattern) in list(CASES.items())[: config.max_examples or None]:
        final = base_train.main(
            base_train.Config(
                depth=depth, block_pattern=pattern, n_embd=config.n_embd, drill_until=0.0, eval_every=0, val_batches=32,
                num_iterations=config.num_iterations, device_batch_size=config.device_batch_size,
                sequence_len=config.sequence_len, seed=config.seed, model_tag=f"pattern_{name}",
            )
        )  # fmt: skip
        model, _, _ = load_model("base", model_tag=f"pattern_{name}")
        rows[name] = {
            "n": final["tokens"],
            "parameters": model.num_params()["total"],
            "val_bpb": final["val_bpb"],
            "train_minutes": final["minutes"],
        }
    report(rows, vars(config), ("safetensors",), config.output)
    return rows


if __name__ == "__main__":
    run(main, Config)
