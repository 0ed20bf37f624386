"""How a model loses its way among documents: F1 against their number, for several models, a table and a plot.

    python -m benchmarks.documents --model_tags gpt,mamba,cpu --knowledge_base KB --queries Q/val.jsonl --output F.json

The gold document stands somewhere among the best distractors that the retriever finds; the same questions and the same
documents for every model. `together`: all in one context, which grows beyond what the models were trained with; `each`:
read one by one (nanochat/reader.py), where a calibrated model abstains more than one that isn't. The models are RAG
checkpoints; scripts.rag_eval asks and judges. One calibrated with an evidence reader is refused for `together`: the
reader would answer, not the model (calibrate with --evidence none, or not at all).
"""

from dataclasses import dataclass
from itertools import product

from benchmarks.common import report
from nanochat.checkpoint_manager import find_checkpoint
from nanochat.common import UserError, read_json
from nanochat.config import run
from scripts import rag_eval


@dataclass
class Config:
    """Settings of the comparison."""

    model_tags: str = ""  # RAG checkpoints, comma-separated
    counts: str = "1,2,3,5,8,10,15"  # numbers of documents, comma-separated
    read: str = "together,each"  # how they are read: together, each, or both
    knowledge_base: str = ""  # folder of the knowledge base
    queries: str = ""  # questions: a .jsonl file
    max_examples: int = 200  # questions, the same for every number
    context: int = 4096  # tokens of context
    output: str = ""  # write the figures to this JSON file, and a plot beside it


def main(config: Config) -> dict:
    tags, reads = ([x for x in text.split(",") if x] for text in (config.model_tags, config.read))
    try:
        counts = [int(n) for n in config.counts.split(",")]
    except ValueError:
        counts = [0]
    if not tags or min(counts) < 1 or not reads or not set(reads) <= {"together", "each"}:
        raise UserError("give --model_tags gpt,mamba, whole numbers from 1 as --counts, and --read together,each")
    for tag in tags if "together" in reads else []:
        if read_json(find_checkpoint("rag", tag) / "meta.json").get("evidence"):
            raise UserError(f"{tag} has an evidence reader, which would answer in its place; give --read each for it")
    table = {}
    for read, tag, n in product(reads, tags, counts):
        asked = rag_eval.Config(
            model_tag=tag, read=read, top_k=n, rows="oracle_among", context=config.context,
            knowledge_base=config.knowledge_base, queries=config.queries, max_examples=config.max_examples,
        )  # fmt: skip
        found = rag_eval.main(asked)["rows"]["oracle_among"]
        kept = ("n", "f1", "em", "over_abstention", "citation_precision", "tokens", "ttft_ms")
        table[read, tag, n] = {key: found[key] for key in kept if key in found}
    rows = {f"{tag}, {read}, {n}": row for (read, tag, n), row in table.items()}
    report(rows, vars(config), ("safetensors",), config.output)
    if config.output:
        plot(table, config.output.removesuffix(".json") + ".png")
    return rows


def plot(table: dict[tuple[str, str, int], dict[str, float]], path: str) -> None:
    """F1 against the number of documents, a line for each model and way of reading."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for (read, tag, n), row in table.items():
        lines.setdefault(f"{tag}, {read}", []).append((n, row["f1"]))
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, points in lines.items():
        ax.plot(*zip(*points), marker="o", label=label)
    ax.set(xlabel="documents", ylabel="F1", ylim=(0, 1))
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    run(main, Config)
