"""The command line: what wins over what, which spellings work, and that every mistake is one line and exit code 2."""

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError, atomic_dir, human, init_distributed, parse_pattern, pick_dtype
from nanochat.config import load_config_file, parse, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory_estimate import memory
from scripts import base_train, rag_finetune

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
SCRIPTS = sorted(p.stem for p in (Path(__file__).parent.parent / "scripts").glob("[!_]*.py"))


@dataclass
class Config:
    depth: int = 6  # number of layers: 100 % of them
    top_k: int = 5  # passages
    rate: float = 0.02  # learning rate
    name: str = "six"  # what to call it
    tag: str | None = None  # optional
    step: int | None = None  # optional number
    resume: bool = False  # go on
    seed: int = 0  # of the dice


def write(path: Path, text: str) -> list[str]:
    """The arguments that load `text` as a config file."""
    (path / "c.py").write_text(text)
    return ["--config", str(path / "c.py")]


def refused(argv: list[str]) -> str:
    """The message that `argv` is refused with."""
    with pytest.raises(UserError) as error:
        parse(Config, argv)
    return str(error.value)


def main(config: Config) -> None:
    print(config.depth)


# ----------------------------------------------------------------------------------------------------------------------
# What wins, and what may be written


def test_flags_win_over_the_config_file_and_that_over_the_defaults(tmp_path):
    file = write(tmp_path, "'''A preset.'''\ndepth = 4 * 3  # a dozen\nrate = 1e-3\nname = 'b'\n")
    assert parse(Config, []) == Config()
    assert parse(Config, file) == Config(depth=12, rate=1e-3, name="b")
    for argv in (["--depth", "3", *file], [*file, "--depth", "3"], [f"--config={file[1]}", "--depth=3"]):
        assert parse(Config, argv) == Config(depth=3, rate=1e-3, name="b")


def test_of_two_config_files_the_later_wins(tmp_path):
    (tmp_path / "other").mkdir()
    first, second = write(tmp_path, "depth = 1\ntop_k = 1"), write(tmp_path / "other", "depth = 2")
    assert parse(Config, first + second) == Config(depth=2, top_k=1)


def test_underscores_and_dashes_mean_the_same():
    assert parse(Config, ["--top_k", "9"]) == parse(Config, ["--top-k", "9"]) == Config(top_k=9)
    assert parse(Config, ["--top-k=9"]) == Config(top_k=9)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--resume", "true"], True),
        (["--resume", "True"], True),
        (["--resume=true"], True),
        (["--resume"], True),
        (["--resume", "false"], False),
        (["--resume", "true", "--resume", "false"], False),
    ],
)
def test_booleans_take_true_and_false(argv, value):
    assert parse(Config, argv).resume is value


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8")))
def test_any_value_comes_through_as_it_was_given(depth, rate, name):
    argv = [f"--depth={depth}", f"--rate={rate!r}", f"--name={name}"]
    assert parse(Config, argv) == Config(depth=depth, rate=rate, name=name)


def test_help_shows_meanings_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, ["--help"], "What this does to 95 % of all inputs.")
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "95 %" in out and "number of layers: 100 % of them" in out and "(default: six)" in out and "--top_k" in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_each_of_its_options(script, capsys):
    module = import_module(f"scripts.{script}")
    if not hasattr(module, "Config"):
        pytest.fail(f"scripts/{script}.py has no Config")
    with pytest.raises(SystemExit) as end:
        run(module.main, module.Config, ["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and f"python -m scripts.{script}" in out
    for name in module.Config.__dataclass_fields__:
        line = next(part for part in out.split("\n  -")[1:] if part.startswith(f"-{name} ") or f" --{name} " in part)
        words = line.replace("\n", " ").partition("(default:")[0].split()
        assert len(words) >= 3, f"--{name} of {script} has no meaning in its help: {line}"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_file_of_configs_is_read_by_the_script_in_its_name(file):
    """rag_*.py are scripts.rag_finetune's; the pattern is one that `--block_pattern` gives at that depth."""
    config = parse(import_module(f"scripts.{file.stem.partition('_')[0]}_finetune").Config, ["--config", str(file)])
    pattern = parse_pattern(config.block_pattern)
    preset = file.stem.split("_")[1]
    vocab = {"vocab_size": 8192}
    assert pattern == GPTConfig.from_depth(len(pattern), preset, **vocab).block_pattern
    assert len(pattern) == (20 if file.stem.endswith("d20") else 6)
    assert config.total_batch_size % (config.device_batch_size * config.sequence_len * 8) == 0


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_a_dry_run_needs_neither_checkpoint_nor_knowledge_base_nor_gpu(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "8")
    run(rag_finetune.main, rag_finetune.Config, ["--config", str(file), "--device", "cuda", "--dry_run", "true"])
    out = capsys.readouterr().out
    assert "8 processes" in out and "never measured on a GPU" in out and "gradient_checkpointing" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_pretraining_tells_what_the_model_would_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    small = ["--depth", "2", "--block_pattern", "MT", "--n_embd", "64", "--sequence_len", "128", "--device", "cpu"]
    run(base_train.main, base_train.Config, [*small, "--dry_run", "true"])
    model = GPT(GPTConfig.from_depth(2, "MT", vocab_size=8192, sequence_len=128, n_embd=64))
    counts = model.num_params()
    assert f"total {human(counts['total'])}" in (out := capsys.readouterr().out)
    assert human(model.flops_per_token()) + " a trained token" in out
    found = memory(model.config, 8, 128, "cpu", torch.float32)
    assert found["weights"] == found["gradients"] == 4 * counts["total"]
    matrices = sum(p.numel() for b in model.blocks for p in b.parameters() if p.ndim == 2)
    assert found["optimizer"] == 4 * (2 * counts["total"] - matrices)  # Muon keeps one number, AdamW two
    again = memory(model.config, 8, 128, "cpu", torch.float32, checkpointing=True)
    assert again["peak"] < found["peak"]
    with pytest.raises(SystemExit) as end:
        run(base_train.main, base_train.Config, [*small, "--dry_run", "true", "--total_batch_size", "1000"])
    assert end.value.code == 2 and "not a multiple" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes on the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dept", "3"], "unknown option --dept; did you mean --depth?"),
        (["--topk", "3"], "did you mean --top_k?"),
        (["--zzz"], "unknown option --zzz"),
        (["3"], "unexpected argument '3'"),
        (["--depth", "three"], "--depth: invalid int value: 'three'"),
        (["--depth", "1.5"], "invalid int"),
        (["--depth", ""], "invalid int"),
        (["--depth"], "--depth: expected one argument"),
        (["--rate", "fast"], "--rate: invalid float value"),
        (["--step", "x"], "--step: invalid int"),
        (["--resume", "maybe"], "Boolean value expected"),
        (["--config"], "--config needs a file"),
        (["--config", "no/such.py"], "cannot read the config no/such.py"),
        (["--config", "."], "directory"),
        (["--seed", "-1"], "--seed -1: choose"),
        (["--seed", str(2**32)], "choose a number"),
    ],
)
def test_a_mistake_is_named_in_one_line_with_exit_code_2(argv, message, capsys):
    assert message in refused(argv)
    with pytest.raises(SystemExit) as end:
        run(main, Config, argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_an_abbreviation_is_not_guessed():
    assert "--resume" in refused(["--res", "true"])  # it would silently change its meaning with the next option


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), max_size=4))
def test_no_command_line_ends_in_anything_but_a_config_or_one_sentence(argv):
    argv = [a for a in argv if a not in ("-h", "--help")]
    try:
        assert isinstance(parse(Config, argv), Config)
    except UserError as e:
        assert str(e)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes in a config file


def test_a_config_file_cannot_run_code(tmp_path):
    trap = tmp_path / "sprung"
    for text in (
        f"depth = open({str(trap)!r}, 'w').close() or 3",
        f"import pathlib\npathlib.Path({str(trap)!r}).touch()",
        f"depth = __import__('os').mkdir({str(trap)!r})",
        f"name = f'{{open(\"{trap}\", chr(119))}}'",
        f"depth = [open({str(trap)!r}, 'w') for _ in 'x']",
        f"def depth(): open({str(trap)!r}, 'w')",
        f"@open({str(trap)!r}, 'w').write\nclass depth: pass",
    ):
        assert "c.py, line " in refused(write(tmp_path, text)), text
        assert not trap.exists(), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depht = 3", "unknown setting 'depht'; did you mean depth?"),
        ("\n\ndepth = three", "line 3: the value must be a literal"),
        ("depth = 'six'", "of type str, but depth takes int"),
        ("depth = 6.0", "of type float, but depth takes int"),
        ("depth = True", "of type bool, but depth takes int"),
        ("resume = 1", "of type int, but resume takes bool"),
        ("name = 3", "of type int, but name takes str"),
        ("name = None", "but name takes str"),
        ("tag = 3", "of type int, but tag takes str"),
        ("step = 'last'", "of type str, but step takes int"),
        ("depth = [6]", "of type list"),
        ("depth = {[]: 1}", "line 1"),
        ("depth = 6 // 0", "line 1"),
        ("depth: int = 6", "line 1: only plain assignments"),
        ("depth = top_k = 6", "only plain assignments"),
        ("depth, top_k = 6, 7", "only plain assignments"),
        ("if True:\n    depth = 6", "line 1"),
        ("depth = ", "not valid Python"),
        ("depth = 3\0", "not valid Python"),
        ("depth = " + "(" * 500 + "6" + ")" * 500, "not valid Python"),
        ("depth = " + "-" * 100_000 + "6", "not valid Python"),
        ("depth = 1" + " + 1" * 5000, ""),
        ("rate = 1" + "0" * 400 + " / 3", "line 1"),
        ("rate = 1" + "0" * 400, "takes float"),
    ],
    ids=lambda x: x[:24],
)
def test_a_bad_config_file_is_refused_with_the_reason(tmp_path, text, message):
    found = refused(write(tmp_path, text))
    assert "c.py" in found and message in found and len(found) < 300


def test_a_config_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "c.py").write_bytes(b"name = '\xff'")
    assert "not valid Python" in refused(["--config", str(tmp_path / "c.py")])


def test_whole_numbers_do_for_floats_and_optional_fields_take_none(tmp_path):
    config = parse(Config, write(tmp_path, "rate = 1\ntag = None\nstep = 4"))
    assert config == Config(rate=1.0, step=4) and isinstance(config.rate, float)


numbers = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6)).map(repr)
terms = st.recursive(numbers, lambda s: st.tuples(s, st.sampled_from("+-*/"), s).map(lambda t: f"({''.join(t)})"))


@settings(max_examples=100, deadline=None)
@given(terms)
def test_arithmetic_gives_what_python_gives(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    file = folder / "arithmetic.py"
    file.write_text(f"x = {text}")
    try:
        wanted = eval(text)  # numbers and operators only, see above
    except ZeroDivisionError:
        with pytest.raises(UserError, match="line 1"):
            load_config_file(file)
        return
    found = load_config_file(file)["x"]
    assert (found == wanted or found != found) and type(found) is type(wanted)


# ----------------------------------------------------------------------------------------------------------------------
# The edge: what `run` makes of an exception


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, os.strerror(28), "/some/file"), 2, f"error: {os.strerror(28)} (/some/file)\n"),
        (PermissionError(13, "Permission denied"), 2, "error: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["user error", "disk full", "permission", "ctrl-c"],
)
def test_what_a_user_can_cause_ends_in_one_line(error, code, line, capsys):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as end:
        run(main, Config, [])
    assert end.value.code == code and capsys.readouterr().err == line


def test_our_own_bugs_keep_their_traceback():
    def main(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, Config, [])


def test_every_rank_tells_its_own_mistake(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        run(main, Config, ["--nonsense"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("[rank 1] error: unknown option --nonsense") and err.count("\n") == 1


def test_without_arguments_it_reads_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--depth", "8"])
    run(main, Config)
    assert capsys.readouterr().out == "8\n"


# ----------------------------------------------------------------------------------------------------------------------
# Devices, and files that are written whole


@pytest.mark.parametrize(
    ("device", "local_rank", "message"),
    [
        ("cuda:9", 0, "--device cuda:9: the GPUs here are numbered from 0 to 1"),
        ("cuda", 2, "more processes than GPUs; start torchrun with --nproc_per_node=2"),
        ("cuda:x", 0, "choose cpu, cuda or mps"),
        ("toaster", 0, "choose cpu, cuda or mps"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(device, local_rank, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(UserError, match=message):
        init_distributed(device)


def test_ranks_wait_for_a_download(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: asked.update(options))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert init_distributed("cpu").world_size == 2 and asked["timeout"].total_seconds() == 7200


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb" / "old").write_text("old")
    real, calls = os.replace, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        real(a, b)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(PermissionError), atomic_dir(tmp_path / "kb") as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["kb"] and (tmp_path / "kb" / "old").read_text() == "old"


@pytest.mark.parametrize("amx, avx, fast", [(True, True, True), (False, True, True), (False, False, False)])
def test_a_cpu_computes_in_bf16_where_it_can(amx, avx, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    assert pick_dtype("cpu") == (torch.bfloat16 if fast else torch.float32)
    assert pick_dtype("cpu", "float32") == torch.float32
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # private, and may go
    assert pick_dtype("cpu") == (torch.bfloat16 if amx else torch.float32)
