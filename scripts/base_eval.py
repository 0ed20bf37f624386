"""Evaluate a pretrained model: bits per byte of held-out text, cloze accuracy over facts it may have read, drills.

    python -m scripts.base_eval --source base --output base_eval.json

The cloze items are sentences of the factbook up to a fact, with three other countries' values as wrong choices; chance
is 0.25. A model pretrained on the embedded corpus has read the passages of training countries but not those of
validation countries, which are then the baseline: what guessing from the form of an answer gives. Other text, such as
FineWeb, keeps nobody's facts apart; the two rows then say only how much the model knows of either.
"""

from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, versions
from nanochat.common import UserError, init_distributed, print0, write_json
from nanochat.config import run
from nanochat.core_eval import multiple_choice
from nanochat.loss_eval import text_validation
from tasks.drills import LADDER, DrillStream, drill_accuracy
from tasks.factbook import cloze_items


@dataclass
class Config:
    source: str = "base"  # stage of the checkpoint: base, mid, sft, rag, or a path to a step folder
    model_tag: str = ""  # its tag; empty: the newest
    step: int = 0  # its step; 0: the last
    data: str = "embedded"  # text for bits per byte: embedded, fineweb:N, or a folder or file
    val_batches: int = 64  # batches of text
    device_batch_size: int = 8  # rows a batch
    sequence_len: int = 0  # tokens a row; 0: the model's context
    max_examples: int = 500  # cloze items of each split
    seed: int = 0  # which cloze items
    device: str = ""  # cpu, cuda or mps; empty: the best one present
    output: str = ""  # write the results here as JSON


def main(config: Config) -> dict:
    for name in ("max_examples", "val_batches", "device_batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")
    d = init_distributed(config.device)
    model, tokenizer, meta = load_model(
        config.source, d.device, model_tag=config.model_tag or None, step=config.step or None
    )
    rows = {"text": {"n": config.val_batches}}
    rows["text"] |= text_validation(config.data, tokenizer, config, config.val_batches)(model)
    for split in ("train", "val"):
        items = cloze_items(split, config.max_examples, config.seed)
        rows[f"cloze_{split}_countries"] = {"n": len(items), "accuracy": multiple_choice(model, tokenizer, items)}
    drills = DrillStream(tokenizer)
    for kind in ("copy", "recall", "lookup"):
        rows[f"drill_{kind}"] = {"n": 32, "accuracy": drill_accuracy(model, drills, kind, len(LADDER) - 1, n=32)}
    for name, row in rows.items():
        print0(f"{name:24s}" + "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    config_used = vars(config) | {"checkpoint_step": meta["step"], "block_pattern": model.config.block_pattern}
    result = {"rows": rows, "config": config_used, "versions": versions()}
    if config.output and d.rank == 0:
        write_json(config.output, result)
    return result


if __name__ == "__main__":
    run(main, Config)
