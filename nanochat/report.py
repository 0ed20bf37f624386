"""What came of it: every run's metrics.jsonl and every evaluation's JSON -> one report.md with tables and plots.

    python -m nanochat.report                       # writes $NANOCHAT_BASE_DIR/report/report.md and prints the tables
    python -m nanochat.report --evals results/      # evaluation files from elsewhere

A stage that wasn't run is left out; a file that can't be read is named in the report, not fatal.
"""

import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import OLD, SOURCES, checkpoints_dir, list_steps, versions
from nanochat.common import UserError, atomic_file, get_base_dir, human, print0, read_json, read_jsonl
from nanochat.config import run

# in metrics.jsonl beside the evaluations: what the loop logs at every step
STEP_FIELDS = {"step", "loss", "grad_norm", "lr_factor", "targets", "tokens", "seconds", "tokens_per_second"}
MAX_COLUMNS = 12  # of an evaluation's table; the JSON has the rest


@dataclass
class Config:
    """Where to look and where to write."""

    output: str = ""  # folder for report.md and its plots; empty: <base dir>/report
    evals: str = ""  # folder of evaluation JSON files; empty: <base dir>/evals


@dataclass
class Run:
    """One training run, as read from its folder."""

    source: str
    tag: str
    steps: list[dict[str, float]]  # rows with a training loss
    evals: list[dict[str, float]]  # rows of evaluations
    done: bool  # has a checkpoint

    @property
    def latest(self) -> dict[str, float]:
        """The last value of every evaluation metric."""
        return {k: v for row in self.evals for k, v in row.items() if k not in STEP_FIELDS}


def main(config: Config) -> None:
    """Write the report and print its tables."""
    output = Path(config.output) if config.output else get_base_dir() / "report"
    evals = Path(config.evals) if config.evals else get_base_dir() / "evals"
    if config.evals and not evals.is_dir():
        raise UserError(f"--evals {evals}: no such folder")
    print0(write_report(output, evals))
    print0(f"written: {output / 'report.md'}")


def write_report(output: Path, evals: Path) -> str:
    """Write report.md and plots into `output`; the tables as text, for printing."""
    output.mkdir(parents=True, exist_ok=True)
    runs = read_runs()
    tables, problems = [], []
    if runs:
        tables.append("## Training\n\n" + training_table(runs))
    for file in sorted(evals.glob("**/*.json")):
        try:
            result = read_json(file)
            tables.append(f"## {_name(file, evals)}\n\n" + evaluation_table(result["rows"]))
        except (UserError, KeyError, TypeError, AttributeError) as e:
            problems.append(f"- {file}: not an evaluation ({e})")
    if not tables:
        tables.append("Nothing was trained or evaluated yet.")
    answers = sorted(evals.glob("**/*.answers.jsonl"))
    names = [_name(file, evals) for file in answers]
    curves = [f"{name}_confidence.png" for name, file in zip(names, answers) if plot_confidence(file, output, name)]
    samples = [(name, sample_answers(file)) for name, file in zip(names, answers)]
    plots = [f"![confidence]({curve})" for curve in curves]
    plots += [f"![{r.source}/{r.tag}]({plot_run(r, output).name})" for r in runs if r.steps]
    found = ", ".join(f"{name} {v}" for name, v in versions().items())
    parts = [f"# Report\n\n{time.strftime('%Y-%m-%d %H:%M')}, {found}", *tables]
    parts += ["## Curves\n\n" + "\n\n".join(plots)] if plots else []
    parts += [f"## {name}: some answers over retrieved documents\n\n{sample}" for name, sample in samples if sample]
    parts += ["## Files that could not be read\n\n" + "\n".join(problems)] if problems else []
    with atomic_file(output / "report.md") as f:
        f.write("\n\n".join(parts) + "\n")
    return "\n\n".join(tables + problems)


def read_runs() -> list[Run]:
    """All runs, in the order of the stages; runs put aside and lines cut short by a kill are left out."""
    runs = []
    for source in SOURCES:
        for file in sorted((checkpoints_dir() / source).glob("*/metrics.jsonl")):
            if file.parent.name.endswith(OLD):
                continue
            rows = []
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, AttributeError):  # half a line, or one that isn't ours
                    rows.append({k: v for k, v in json.loads(line).items() if _is_number(v)})
            rows = [r for r in rows if "step" in r]
            steps, evals = [r for r in rows if "loss" in r], [r for r in rows if "loss" not in r]
            runs.append(Run(source, file.parent.name, steps, evals, bool(list_steps(file.parent))))
    return runs


def training_table(runs: list[Run]) -> str:
    """One line a run: how long, how fast, how good."""
    rows = []
    for r in runs:
        last = r.steps[-1] if r.steps else {}
        tail = [row["loss"] for row in r.steps[-20:]]
        metrics = ", ".join(f"{k} {_number(v)}" for k, v in r.latest.items())
        rows.append({
            "run": f"{r.source}/{r.tag}" + ("" if r.done else " (no checkpoint yet)"),
            "steps": int(last.get("step", 0)),
            "tokens": human(last.get("tokens", 0)),
            "minutes": f"{last.get('seconds', 0) / 60:.1f}",
            "tokens/s": human(last.get("tokens", 0) / max(last.get("seconds", 0), 1e-9)),
            "loss": f"{sum(tail) / len(tail):.3f}" if tail else "",
            "evaluations": metrics,
        })  # fmt: skip
    return markdown_table(rows)


def evaluation_table(results: dict[str, dict[str, Any]]) -> str:
    """{row name: {metric: value}} -> a table; an interval (x_lo, x_hi) stands behind its number."""
    names = [n for row in results.values() for n, v in row.items() if not n.endswith(("_lo", "_hi")) and _is_number(v)]
    columns = list(dict.fromkeys(names))[:MAX_COLUMNS]
    rows = []
    for name, row in results.items():
        cells = {"": name}
        for c in columns:
            cells[c] = _number(row[c]) if _is_number(row.get(c)) else ""
            if cells[c] and _is_number(row.get(f"{c}_lo")) and _is_number(row.get(f"{c}_hi")):
                cells[c] += f" ({_number(row[f'{c}_lo'])}–{_number(row[f'{c}_hi'])})"
        rows.append(cells)
    return markdown_table(rows)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table that reads well as plain text, too; columns are the first row's keys."""
    if not rows:
        return "(empty)"
    grid = [
        list(rows[0]),
        *([" ".join(str(row.get(c, "")).replace("|", "/").split()) for c in rows[0]] for row in rows),
    ]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in grid]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def plot_run(r: Run, output: Path) -> Path:
    """Training loss, and every evaluation metric that has two points, over steps -> a PNG."""
    import matplotlib  # a second of import time: only who draws pays it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[float, float]]] = {}
    for row in r.evals:
        for name, value in row.items():
            if name not in STEP_FIELDS and _is_number(value):
                points.setdefault(name, []).append((row["step"], value))
    curves = {name: xy for name, xy in points.items() if len(xy) > 1}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, losses = [row["step"] for row in r.steps], [row["loss"] for row in r.steps]
    smooth, mean = [], losses[0]
    for x in losses:
        mean = 0.95 * mean + 0.05 * x
        smooth.append(mean)
    left.plot(steps, losses, color="#b8c4d6", linewidth=0.7)
    left.plot(steps, smooth, color="#1f4e9c", linewidth=1.4)
    left.set(title=f"{r.source}/{r.tag}: training loss", xlabel="step")
    for name, xy in curves.items():
        right.plot(*zip(*xy), marker=".", label=name)
    right.set(title="evaluations", xlabel="step")
    if curves:
        right.legend(fontsize=7)
    file = output / f"{r.source}_{r.tag}.png"
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def sample_answers(file: Path, n: int = 30) -> str:
    """A table of `n` random answers of the row `retrieved`, right and wrong; empty where there are none."""
    try:
        rows = [a for a in read_jsonl(file) if a["row"] == "retrieved"]
        cells = [
            {"question": a["query"], "answer": a["answer"], "wanted": a["answers"][0], "F1": f"{float(a['f1']):.2f}"}
            | ({"confidence": f"{float(a['confidence']):.1f}"} if "confidence" in a else {})
            for a in random.Random(0).sample(rows, min(n, len(rows)))
        ]
    except (UserError, KeyError, IndexError, TypeError, ValueError):
        return ""
    return markdown_table(cells) if cells else ""


def plot_confidence(answers: Path, output: Path, name: str) -> bool:
    """What another threshold would do, from rag_eval's answers -> NAME_confidence.png; False where none has a
    confidence.

    Left: the share of distractor-only questions it would abstain from, against that of answerable ones. Right: risk
    (1 - F1 of what is answered) against coverage, as far as answers were given.
    """
    rows: dict[str, list[tuple[float, float, bool]]] = {}
    try:
        if not read_json(answers.with_name(answers.name.replace(".answers.jsonl", ".json")))["config"]["confidence"]:
            return False  # no threshold was in use
        for a in read_jsonl(answers):
            if "confidence" in a and a["row"] in ("retrieved", "distractors_only"):
                found = bool(set(a["positive_ids"]) & set(a["documents"]))
                rows.setdefault(a["row"], []).append((float(a["confidence"]), float(a["f1"]), found))
    except (UserError, KeyError, TypeError, ValueError):
        return False
    there = sorted((c, f1) for c, f1, found in rows.get("retrieved", []) if found)
    gone = [c for c, _, _ in rows.get("distractors_only", [])]
    if not there or not gone:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    share = lambda values, t: sum(v <= t for v in values) / len(values)
    odds = [c for c, _ in there]
    left.plot([share(odds, t) for t in odds], [share(gone, t) for t in odds], color="#1f4e9c")
    left.plot(share(odds, 0), share(gone, 0), "o", color="#b03030", label="the threshold in use")
    left.set(title="abstention", xlabel="wrongly (gold is there)", ylabel="rightly (only distractors)")
    left.legend(fontsize=7)
    best, total, curve = [f1 for c, f1 in reversed(there) if c > 0], 0.0, []
    for n, f1 in enumerate(best, 1):
        total += f1
        curve.append((n / len(there), 1 - total / n))
    right.plot(*zip(*curve), color="#1f4e9c") if curve else None
    right.set(title="risk and coverage", xlabel="share answered, the surest first", ylabel="1 - F1", xlim=(0, 1))
    file = output / f"{name}_confidence.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def _name(file: Path, evals: Path) -> str:
    """An evaluation's name: its place in the folder, without what its file's name ends with."""
    return file.relative_to(evals).as_posix().removesuffix(".json").removesuffix(".answers.jsonl")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    run(main, Config)
