"""speedrun.sh, setup.sh and what they call: which preset, which commands, what a second run leaves alone, how it ends.

Nothing is installed or trained here: `python` is a stub that notes its arguments and writes the file the real command
would. That the stages themselves work is tested in test_scripts.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat.common import REPO, UserError
from nanochat.config import run
from scripts import base_eval, chat_eval, estimate, tok_eval, tok_train

STUB = r"""#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
make() { mkdir -p "$(dirname "$1")" && echo "{}" >"$1"; }
value() { while [ $# -gt 1 ]; do shift; if [ "$1" = "$name" ]; then echo "$2"; fi; done; }
train() {
    name=--model_tag; file="$NANOCHAT_BASE_DIR/checkpoints/$1/$(value "$@")/step_000005/meta.json"
    [ -f "$file" ] || make "$file"
}
case "$*" in
*"import os, torch"*) echo "$STUB_MACHINE" ;;
*load_texts*) make "${@: -1}" ;;
"-c import torch") exit 1 ;;
*" venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
*"-e .[gpu]"*) exit 1 ;;
*scripts.estimate*) exit "${STUB_ESTIMATE:-0}" ;;
*scripts.tok_train*) make "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ;;
*scripts.prepare*) name=--output; make "$(value "$@")/conversations/val_rag.jsonl" ;;
*scripts.base_train*) train base "$@" ;;
*scripts.mid_train*) train mid "$@" ;;
*scripts.chat_sft*) train sft "$@" ;;
*scripts.evidence_train*) train evidence "$@" ;;
*scripts.rag_finetune*)
    [ -z "${STUB_BREAKS:-}" ] || exit 7
    if [ -n "${STUB_CTRL_C:-}" ]; then trap 'exit 1' INT; kill -INT 0; sleep 5; fi
    train rag "$@" ;;
*_eval*) name=--output; make "$(value "$@")" ;;
esac
"""


@pytest.fixture
def shell(tmp_path):
    """Runs a script of the repository in an activated environment whose Python is the stub."""
    env = tmp_path / "an env"
    (env / "bin").mkdir(parents=True)
    (env / "bin" / "python").write_text(STUB)
    (env / "bin" / "python").chmod(0o755)
    (env / ".nanochat-installed").write_text(f"{REPO}\n")
    log, home = tmp_path / "log", tmp_path / "my home"
    home.mkdir()

    def call(*command, **variables) -> SimpleNamespace:
        log.write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT", "CONDA", "VIRTUAL_ENV", "NPROC"))}
        given = {"VIRTUAL_ENV": env, "STUB_LOG": log, "STUB_MACHINE": "2 0", "HOME": home} | variables
        given = kept | {k: str(v) for k, v in given.items() if v is not None}
        done = subprocess.run(
            ["bash", *map(str, command)],
            env=given,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            start_new_session=True,  # for a Ctrl-C of its own, which who tests in the background would ignore
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, log=log.read_text().splitlines())

    call.env, call.home = env, home
    return call


def speedrun(shell, **variables):
    return shell(REPO / "speedrun.sh", **variables)


def called(result) -> list[str]:
    """The modules that were run, in order."""
    return [m[1] for line in result.log for m in re.finditer(r"-m (?:scripts|nanochat)\.(\w+)", line)]


def times(folder: Path) -> list[str]:
    return [line.split("\t")[0] for line in (folder / "times.tsv").read_text().splitlines()]


ALL = ["tok_train", "tok_eval", *["prepare_rag_dataset"] * 3, "base_train", "base_eval", "mid_train",
       "chat_sft", "chat_eval", "evidence_train", "rag_finetune", *["rag_eval"] * 3]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# speedrun.sh


def test_it_runs_every_stage_and_ends_with_a_chat_command_that_can_be_pasted(shell):
    got = speedrun(shell, SPEEDRUN="smoke")
    assert got.code == 0, got.err
    assert called(got) == ["estimate", *ALL, "report"]
    folder = shell.home / ".cache" / "nanochat" / "smoke"
    assert len(times(folder)) == len(ALL)
    command = got.out.splitlines()[-1]
    echoed = subprocess.run(
        ["bash", "-c", command.replace("&& NANO", "&& env NANO").replace("-m scripts.chat_cli", "-m scripts.stub")],
        capture_output=True, text=True, env=os.environ | {"STUB_LOG": str(shell.home / "chat")},
    )  # fmt: skip
    assert echoed.returncode == 0, echoed.stderr
    assert (shell.home / "chat").read_text() == (
        f"-m scripts.stub --source rag --model_tag smoke --knowledge_base {folder}/factbook/knowledge_base\n"
    )


def test_a_second_run_trains_and_evaluates_nothing_again_and_keeps_the_times(shell, tmp_path):
    base = tmp_path / "base"
    options = {"SPEEDRUN": "smoke", "NANOCHAT_BASE_DIR": "base"}  # relative to where the command was given
    speedrun(shell, **options)
    (base / "times.tsv").write_text((base / "times.tsv").read_text().replace("\t", "\t9"))
    before = (base / "times.tsv").read_text()
    again = speedrun(shell, **options)
    # training scripts look for themselves whether there is anything left to do
    assert called(again) == ["base_train", "mid_train", "chat_sft", "evidence_train", "rag_finetune", "report"]
    assert (base / "times.tsv").read_text() == before
    # a new checkpoint is evaluated, and takes the place of the old one in the times
    for stage in ("rag", "evidence"):
        shutil.rmtree(base / "checkpoints" / stage)
        assert called(speedrun(shell, **options))[-5:] == ["rag_finetune", *["rag_eval"] * 3, "report"]
    # and so are new test questions
    (base / "fiction" / "queries").mkdir()
    (base / "fiction" / "queries" / "test.jsonl").write_text("{}")
    assert called(speedrun(shell, **options))[-4:] == [*["rag_eval"] * 3, "report"]
    assert times(base) == [line.split("\t")[0] for line in before.splitlines()]
    assert (base / "times.tsv").read_text() != before


def test_a_stage_that_fails_stops_the_run_with_its_exit_code_and_the_next_run_goes_on(shell):
    got = speedrun(shell, SPEEDRUN="smoke", STUB_BREAKS=1)
    assert got.code == 7 and "stopped in stage 'RAG SFT'" in got.err and called(got)[-1] == "rag_finetune"
    again = speedrun(shell, SPEEDRUN="smoke")
    assert again.code == 0 and called(again)[-4:] == [*["rag_eval"] * 3, "report"] and "base_eval" not in called(again)


def test_ctrl_c_ends_it_with_the_code_of_an_interrupt_and_the_next_run_goes_on(shell):
    got = speedrun(shell, SPEEDRUN="smoke", STUB_CTRL_C=1)  # torchrun ends with 1 itself
    assert got.code == 130 and "interrupted" in got.err and called(got)[-1] == "rag_finetune"
    assert speedrun(shell, SPEEDRUN="smoke").code == 0


def test_an_estimate_that_fails_stops_nothing(shell):
    got = speedrun(shell, SPEEDRUN="smoke", STUB_ESTIMATE=1)
    assert got.code == 0 and "no estimate" in got.out and called(got)[1:-1] == ALL
    assert speedrun(shell, SPEEDRUN="cpu", STUB_ESTIMATE=130).code == 130  # Ctrl-C does


@pytest.mark.parametrize(("machine", "preset"), [("2 0", "cpu"), ("8 1", "cpu"), ("64 7", "cpu"), ("96 8", "node")])
def test_only_eight_gpus_make_a_node(shell, machine, preset):
    got = speedrun(shell, STUB_MACHINE=machine)
    assert got.code == 0 and f"preset {preset}," in got.out
    assert ("never been run" in got.out) == (preset == "node")
    assert (shell.home / ".cache" / "nanochat" / preset / "evals" / "rag_eval.json").exists()
    for name in ("handbooks", "fiction"):
        assert (shell.home / ".cache" / "nanochat" / preset / "evals" / f"rag_eval_{name}.json").exists()
    several = any("torch.distributed.run" in line for line in got.log)
    assert several == (machine in ("2 0", "96 8"))  # one process drives one GPU; two share the cores


@pytest.mark.parametrize(("machine", "processes", "rows"), [("2 0", 2, 4), ("1 0", 1, 8), ("8 0", 2, 4), ("8 1", 1, 8)])
def test_a_step_of_the_cpu_preset_takes_eight_rows(shell, machine, processes, rows):
    got = speedrun(shell, STUB_MACHINE=machine)
    lines = [line for line in got.log if "scripts.rag_finetune" in line]
    assert len(lines) == 1 and f"--device_batch_size {rows} " in lines[0]
    assert (f"--nproc_per_node={processes} " in lines[0]) == (processes > 1)


@pytest.mark.parametrize("processes", [1, 3, 6, 8, 100])
def test_the_node_downloads_first_and_its_batch_divides_among_any_number_of_processes(shell, processes):
    got = speedrun(shell, SPEEDRUN="node", NPROC=processes, STUB_MACHINE="96 8")
    assert got.code == 0
    commands = [line for line in got.log if "--total_batch_size" in line and "estimate" not in line]
    assert len(commands) == 2  # pretraining and midtraining
    for line in commands:
        flags = dict(re.findall(r"--(\w+) (\S+)", line))
        micro = int(flags["device_batch_size"]) * int(flags["sequence_len"]) * processes
        total = int(flags["total_batch_size"])
        assert total % micro == 0 and (abs(total - 524288) <= micro / 2 or total == micro)
    first = next(i for i, line in enumerate(got.log) if "load_texts" in line)
    assert first < next(i for i, line in enumerate(got.log) if "tok_train" in line)


@pytest.mark.parametrize(
    ("variables", "message"), [({"SPEEDRUN": "big"}, "smoke, cpu or node"), ({"NPROC": "none"}, "at least 1")]
)
def test_a_setting_it_does_not_know_is_one_line_and_exit_code_2(shell, variables, message):
    got = speedrun(shell, **variables)
    assert got.code == 2 and got.out == "" and got.log == []
    assert message in got.err and got.err.startswith("error: ") and got.err.count("\n") == 1
    assert not list(shell.home.iterdir())


def test_the_readme_shows_the_commands_of_the_cpu_preset():
    script, readme = (REPO / "speedrun.sh").read_text(), (REPO / "README.md").read_text()
    flags = dict(re.findall(r'(\w+)="(.*)"', re.search(r"\ncpu\)\n(.*?);;", script, re.DOTALL)[1]))
    stages = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rag": "rag_finetune"}
    for name, module in (stages | {"evidence": "evidence_train"}).items():
        assert f"python -m scripts.{module} {flags[name].partition(' $(')[0]}" in readme  # rows for one process


# ----------------------------------------------------------------------------------------------------------------------
# setup.sh


def setup(shell, **variables):
    return shell("-c", f"set -euo pipefail; cd '{REPO}'; source ./setup.sh; command -v python", **variables)


def test_set_up_makes_an_environment_and_installs_torch_first(shell, tmp_path):
    new = tmp_path / "new"
    choice = {
        "VIRTUAL_ENV": None,
        "VENV": new,
        "PYTHON": shell.env / "bin" / "python",
        "TORCH": "torch==1 --index-url x",
    }
    got = setup(shell, **choice)
    assert got.code == 0 and got.out.splitlines()[-1] == f"{new}/bin/python"
    installs = [line.partition("-check ")[2] for line in got.log if "pip install" in line]
    assert installs[0] == "torch==1 --index-url x" and installs[-1] == "-e .[dev]"
    assert setup(shell, **choice).log == []  # the second time there is nothing to do
    (new / ".nanochat-installed").write_text(f"{REPO}/elsewhere\n")  # another copy's
    assert "-e .[dev]" in setup(shell, **choice).log[-1]


def test_set_up_goes_on_without_the_cuda_kernels_but_says_so(shell):
    for tool in ("nvcc", "nvidia-smi"):
        (shell.env / "bin" / tool).symlink_to(shutil.which("true"))
    (shell.env / ".nanochat-installed").unlink()
    got = setup(shell)
    assert got.code == 0 and "WARNING" in got.err and (shell.env / ".nanochat-installed").exists()
    installs = [line.partition("-check ")[2] for line in got.log if "pip install" in line]
    assert installs[1:] == ["packaging wheel ninja setuptools>=70", "--no-build-isolation -e .[gpu]", "-e .[dev]"]


def test_set_up_uses_an_activated_conda_environment_but_not_base(shell, tmp_path):
    conda = {"VIRTUAL_ENV": None, "CONDA_PREFIX": shell.env, "VENV": tmp_path / "new"}
    assert setup(shell, CONDA_DEFAULT_ENV="mine", **conda).out.strip() == f"{shell.env}/bin/python"
    got = setup(shell, CONDA_DEFAULT_ENV="base", PYTHON=shell.env / "bin" / "python", **conda)
    assert got.out.splitlines()[-1] == f"{tmp_path}/new/bin/python"


# ----------------------------------------------------------------------------------------------------------------------
# The estimate, and numbers the evaluations refuse

TINY = "--depth=1 --n_embd 64 --block_pattern M --sequence_len 32 --device_batch_size 2 --num_iterations 50"


def test_the_estimate_takes_the_flags_of_the_stages_as_they_are(capsys):
    fine = "--sequence_len 32 --device_batch_size 2 --num_iterations 10 --resume true"
    given = [
        "--tok",
        "--vocab_size=400",
        "--base",
        TINY,
        "--mid",
        fine,
        "--sft",
        fine,
        "--rag",
        fine,
        "--evidence",
        TINY_REST,
    ]
    run(estimate.main, estimate.Config, estimate.glue([*given, "--preset", "smoke", "--device", "cpu", "--nproc", "2"]))
    out = capsys.readouterr().out
    assert "50 steps" in out and out.count("10 steps") == 4 and "in all" in out and "not measured here" in out
    assert estimate.glue(["--base", "--depth=3", "--preset", "cpu"]) == ["--base=--depth=3", "--preset", "cpu"]


def test_the_estimate_says_what_it_does_not_know_about_a_node(capsys):
    found = estimate.main(estimate.Config("node", tok="--vocab_size 400", base=TINY, mid=TINY_REST, sft=TINY_REST,
                                          rag=TINY_REST, evidence=TINY_REST, device="cpu"))  # fmt: skip
    out = capsys.readouterr().out
    assert set(found) == set(estimate.STAGES) and all(minutes > 0 for minutes in found.values())
    assert "not measured here: downloads" in out and "and the rest" in out


TINY_REST = "--sequence_len 32 --device_batch_size 2 --num_iterations 10"


def test_a_step_costs_what_its_micro_batches_and_its_update_cost():
    stage = SimpleNamespace(device_batch_size=2, total_batch_size=1024)
    assert estimate.step_cost(stage, 64, 1, 1.0, 0.5, "cuda") == (1024, 8.5)
    assert estimate.step_cost(stage, 64, 4, 1.0, 0.5, "cuda") == (1024, 2.5)
    assert estimate.step_cost(stage, 64, 4, 1.0, 0.5, "cpu") == (1024, 8.5)  # as many cores, whoever works on them


@pytest.mark.parametrize(
    ("script", "flag"),
    [(base_eval, "max_examples"), (base_eval, "val_batches"), (chat_eval, "max_examples"), (chat_eval, "batch_size"),
     (tok_eval, "max_examples"), (tok_train, "max_chars"), (estimate, "nproc")],
)  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-3"])
def test_fewer_than_one_of_something_is_refused_before_anything_is_loaded(script, flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        run(script.main, script.Config, [f"--{flag}", value])
    assert end.value.code == 2 and capsys.readouterr().err == f"error: --{flag} {value}: at least 1\n"


def test_chat_eval_wants_both_checkpoints_before_it_asks_anything(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(chat_eval, "Engine", asked.append)
    monkeypatch.setattr(chat_eval, "load_model", lambda source, *_, **__: _no_baseline(source))
    with pytest.raises(UserError, match="no 'mid'"):
        chat_eval.main(chat_eval.Config(device="cpu", output=str(tmp_path / "x.json")))
    assert not asked and not (tmp_path / "x.json").exists()


def _no_baseline(source):
    if source == "mid":
        raise UserError("no 'mid' checkpoint")
    return None, None, {}


def test_the_seed_picks_what_an_evaluation_asks(base_dir, tmp_path, monkeypatch):
    config = chat_eval.Config(max_examples=5)
    rows = [{"id": n} for n in range(100)]
    first = chat_eval.pick(rows, config)
    assert first == chat_eval.pick(rows, config) and len(first) == 5
    assert first != chat_eval.pick(rows, chat_eval.Config(max_examples=5, seed=1))
    assert len(chat_eval.pick(rows[:3], config)) == 3
    # the tokenizer's sample, too
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(tok_eval.tiktoken, "get_encoding", _offline)
    tok_train.main(tok_train.Config(vocab_size=300, max_chars=20_000))
    sizes = []
    for seed in (0, 0, 1):
        table = tok_eval.main(tok_eval.Config(max_examples=3, seed=seed, output=str(tmp_path / "t.json")))["rows"]
        assert json.loads((tmp_path / "t.json").read_text())["rows"] == table
        sizes.append([table[name]["n"] for name in ("text", "factbook passages", "questions")])
    assert sizes[0] == sizes[1] != sizes[2]


def _offline(name):
    raise OSError("no network")
