"""The report shows what is there and survives what isn't."""

import json
import shutil

import pytest

from nanochat.checkpoint_manager import run_dir
from nanochat.common import UserError
from nanochat.report import Config, evaluation_table, main, write_report


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def write_run(source, tag, half_a_line=False):
    rows = []
    for step in range(1, 31):
        rows.append({"step": step, "loss": 5 / step, "tokens": 100 * step, "seconds": step * 2.0})
        if step % 10 == 0:
            rows.append({"step": step, "val_bpb": 2 - step / 50})
    folder = run_dir(source, tag)
    folder.mkdir(parents=True)
    text = "".join(json.dumps(r) + "\n" for r in rows) + ('{"step": 31, "lo' if half_a_line else "")
    (folder / "metrics.jsonl").write_text(text)


def test_an_empty_house_has_a_report_that_says_so(base):
    assert "Nothing was trained" in write_report(base / "report", base / "evals")


def test_runs_and_evaluations_become_tables_and_curves(base, capsys):
    write_run("base", "d6")
    write_run("rag", "d6", half_a_line=True)
    write_run("base", "d6.old")
    (base / "evals").mkdir()
    rows = {"closed_book": {"n": 500, "f1": 0.1, "f1_lo": 0.05, "f1_hi": 0.15}, "oracle": {"n": 500, "f1": 0.75}}
    (base / "evals" / "rag_eval.json").write_text(json.dumps({"rows": rows}))
    (base / "evals" / "broken.json").write_text("{")
    (base / "evals" / "foreign.json").write_text("[1, 2]")
    main(Config())
    text = (base / "report" / "report.md").read_text()
    assert "base/d6 (no checkpoint yet)" in text and "d6.old" not in text
    assert "val_bpb 1.400" in text and "3.0k" in text
    assert "0.100 (0.050–0.150)" in text and "broken.json" in text and "foreign.json" in text
    for name in ("base_d6.png", "rag_d6.png"):
        assert name in text and (base / "report" / name).stat().st_size > 5000
    assert "oracle" in capsys.readouterr().out


def test_a_row_without_a_metric_leaves_its_cell_empty():
    table = evaluation_table({"a": {"n": 1, "mrr": 0.5}, "b": {"n": 2, "note": "text"}})
    assert table.splitlines()[-1].split("|")[1:4] == [" b ", " 2 ", "       "]


def test_a_missing_evaluation_folder_is_an_error_only_when_it_was_named(base):
    with pytest.raises(UserError, match="no such folder"):
        main(Config(evals=str(base / "nowhere")))


def test_what_a_threshold_does_is_drawn_where_there_are_confidences(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "evals").mkdir()
    answer = {"positive_ids": ["a"], "f1": 1.0}
    rows = [{**answer, "row": "retrieved", "documents": ["a", "b"], "confidence": c} for c in (2.0, -1.0, 0.5)]
    rows += [{**answer, "row": "distractors_only", "documents": ["b"], "confidence": c} for c in (-2.0, 0.1)]
    (tmp_path / "evals" / "rag_eval.answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "evals" / "rag_eval.json").write_text(json.dumps({"rows": {}, "config": {"confidence": {"bias": 0}}}))
    (tmp_path / "evals" / "broken.answers.jsonl").write_text("{")
    shutil.copytree(tmp_path / "evals", tmp_path / "evals" / "other")
    write_report(tmp_path / "report", tmp_path / "evals")
    text = (tmp_path / "report" / "report.md").read_text()
    for name in ("rag_eval", "other/rag_eval"):
        assert (tmp_path / "report" / f"{name}_confidence.png").exists() and f"({name}_confidence.png)" in text
    assert len(list((tmp_path / "report").rglob("*.png"))) == 2


def test_a_log_with_values_that_are_no_numbers_is_read_without_them(base):
    write_run("base", "d6")
    log = run_dir("base", "d6") / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 31, "loss": null, "seconds": null}\n[1]\n"x"\n{"step": null}\n')
    assert "base/d6" in write_report(base / "report", base / "evals")


def test_some_answers_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "evals").mkdir()
    row = {"row": "retrieved", "answers": ["Rome"], "confidence": 1.25}
    rows = [row | {"query": f"Q{n}?", "answer": f"A{n} | [1]", "f1": n / 40} for n in range(40)]
    rows.append(row | {"row": "oracle", "query": "not this", "answer": "x", "f1": 1})
    (tmp_path / "evals" / "rag_eval.answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "evals" / "foreign.answers.jsonl").write_text('{"row": "retrieved"}')
    write_report(tmp_path / "report", tmp_path / "evals")
    text = (tmp_path / "report" / "report.md").read_text()
    lines = [line for line in text.partition("some answers")[2].splitlines() if line.startswith("| Q")]
    assert len(lines) == 30 and "not this" not in text and text.count("some answers") == 1
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    n = int(cells[0].strip("Q?"))
    assert cells == [f"Q{n}?", f"A{n} / [1]", "Rome", f"{n / 40:.2f}", "1.2"]
