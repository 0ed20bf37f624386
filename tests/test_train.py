"""The loop: it learns, resumes bit for bit, gives the same losses however work is spread, and fails in one line."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nanochat.checkpoint_manager as ckpt
from nanochat import optim
from nanochat.checkpoint_manager import find_checkpoint, load_model
from nanochat.common import Dist, UserError
from nanochat.dataloader import PackedLoader
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import Tokenizer
from nanochat.train import Eval, TrainConfig, lr_factor, mean_loss, train

BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # a tokenizer without any merge
CPU = Dist(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An own base folder, and one thread: tiny tensors gain nothing from two, and sums keep their order."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counting:
    """Documents that count upwards in steps of one to four; half of them with a mask."""

    def sample(self, i):
        rng = np.random.default_rng((3, i))
        n, stride = int(rng.integers(4, 60)), int(rng.integers(1, 5))
        ids = np.concatenate([[256], (int(rng.integers(64)) + stride * np.arange(n)) % 64])
        return ids, (np.arange(n + 1) % 3 > 0 if i % 2 else None)


class Joined:
    """The loaders of several ranks side by side, for one process."""

    def __init__(self, loaders):
        self.loaders = loaders
        self.batch_size, self.sequence_len = sum(x.batch_size for x in loaders), loaders[0].sequence_len

    def __next__(self):
        return tuple(torch.cat(parts) for parts in zip(*(next(x) for x in self.loaders)))


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = GPTConfig(
        sequence_len=32, vocab_size=BYTES.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, block_pattern="TT"
    )
    model = GPT(config)
    model.init_weights()
    return model


def noisy_loss(model, inputs, targets):
    """Consumes random numbers, as dropout or sampling would: a resumed run must continue their sequence, too."""
    noise = torch.randn(()) + np.random.rand()
    return mean_loss(model, inputs, targets) * (1 + 0.01 * float(noise))


def tiny_run(
    tag="d2", loss_fn=noisy_loss, evals=(), dist_info=CPU, loader=None, model=None, tokenizer=BYTES, meta=None, **more
):
    """Train the tiny model for eight steps; what `train` returns."""
    options = {"num_iterations": 8, "dtype": "float32", "device": "cpu", "model_tag": tag} | more
    loader = loader or PackedLoader(Counting(), 2, 32, dist_info.rank, dist_info.world_size, buffer_size=20)
    return train(
        model or tiny_model(), loader, TrainConfig(**options), source="base", tokenizer=tokenizer,
        loss_fn=loss_fn, evals=evals, dist_info=dist_info, meta=meta,
    )  # fmt: skip


def logged(tag="d2"):
    file = ckpt.run_dir("base", tag) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(tag="d2"):
    """The training losses as logged, every step once and in order."""
    rows = [row for row in logged(tag) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Learning and logging


def test_a_short_run_learns_and_can_be_loaded():
    final = tiny_run(loss_fn=mean_loss, num_iterations=80, evals=[Eval("fixed", 30, lambda m: {"answer": 42.0})])
    curve = losses()
    assert np.mean(curve[-5:]) < 0.75 * np.mean(curve[:5])
    assert final["step"] == 80 and final["answer"] == 42.0 and final["tokens"] == 80 * 64
    model, tokenizer, meta = load_model("base", dtype="float32")
    assert meta["step"] == 80 and meta["metrics"]["answer"] == 42.0 and tokenizer.vocab_size == BYTES.vocab_size
    ids, targets = next(PackedLoader(Counting(), 8, 32))
    assert abs(float(model(ids, targets)) - np.mean(curve[-5:])) < 0.5
    evaluated = [
        r["step"] for r in map(json.loads, (find_checkpoint("base").parent / "metrics.jsonl").open()) if "answer" in r
    ]
    assert evaluated == [30, 60, 80]


def test_accumulated_masked_batches_equal_one_big_batch(monkeypatch):
    monkeypatch.setattr(optim, "cpu_has_fast_bf16", lambda: False)  # bf16 Muon would magnify fp32 rounding
    rows = [next(PackedLoader(Counting(), 1, 32, r, 16, buffer_size=5)) for r in range(16)]

    class Fixed:
        sequence_len = 32

        def __init__(self, size):
            self.batch_size, self.at = size, 0

        def __next__(self):
            part = [rows[i % 16] for i in range(self.at, self.at + self.batch_size)]
            self.at += self.batch_size
            return tuple(torch.cat(x) for x in zip(*part))

    for tag, size in (("one", 8), ("four", 2)):
        tiny_run(tag, mean_loss, loader=Fixed(size), total_batch_size=8 * 32)
    assert losses("one") == pytest.approx(losses("four"), rel=1e-5)  # fp32 sums in another order


def test_the_schedule_rises_stays_and_falls():
    config = TrainConfig(num_iterations=100, warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_frac=0.2)
    factors = [lr_factor(step / 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:51] == pytest.approx([1.0] * 42)
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.2 + 0.8 * 0.02)


def test_max_minutes_ends_the_run_at_the_end_of_its_schedule():
    final = tiny_run(num_iterations=100_000, max_minutes=0.02)
    assert 1 < final["step"] < 5000
    assert logged()[-1]["lr_factor"] < 0.5 and find_checkpoint("base").name == f"step_{final['step']:06d}"


def test_bits_per_byte_of_a_uniform_model_are_known():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token equally likely
    bpb = evaluate_bpb(model, [next(PackedLoader(Counting(), 2, 32))], BYTES.token_bytes())
    assert bpb == pytest.approx(np.log2(BYTES.vocab_size), rel=1e-5)  # one byte a token
    with pytest.raises(UserError, match="no text"):
        evaluate_bpb(model, [(torch.zeros(1, 4).long(), torch.full((1, 4), 256))], BYTES.token_bytes())


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions

KILLED = """
import os, signal, sys, torch
import nanochat.checkpoint_manager as ckpt
torch.set_num_threads(1)
real, calls = torch.save, []
def dying_save(obj, f):
    calls.append(1)
    if len(calls) == 2:  # the second checkpoint: half a file, then the plug is pulled
        f.write(b"half a file")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(obj, f)
torch.save = dying_save
import test_train
test_train.tiny_run("killed", save_every=3)
"""


def subprocess_env(base, **more):
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def test_a_run_killed_in_mid_save_continues_bit_for_bit(tmp_path):
    tiny_run("whole", save_every=3)
    result = subprocess.run(
        [sys.executable, "-c", KILLED], env=subprocess_env(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    run = ckpt.run_dir("base", "killed")
    assert [step for step, _ in ckpt.list_steps(run)] == [3] and list(run.glob(".step_*"))
    assert losses("killed") == losses("whole")[:6]
    tiny_run("killed", save_every=3, resume=True, model=tiny_model(seed=99))
    assert losses("killed") == losses("whole")
    assert not list(run.glob(".*"))
    a, b = (ckpt.load_checkpoint(find_checkpoint("base", tag))[0] for tag in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_exits_with_its_code(number, capsys):
    before = signal.getsignal(number)
    tiny_run("whole")
    with pytest.raises(SystemExit) as stopped:
        tiny_run("cut", evals=[Eval("", 3, lambda m: signal.raise_signal(number) or {})])
    assert stopped.value.code == 128 + number
    assert "--resume true" in capsys.readouterr().out
    tiny_run("cut", resume=True)
    assert losses("cut") == losses("whole")
    assert signal.getsignal(number) == before


def test_a_finished_run_is_not_trained_again():
    first = tiny_run()
    assert tiny_run(resume=True, model=tiny_model(seed=5)) == first


def test_resuming_with_other_data_is_refused_with_what_differs():
    tiny_run(num_iterations=2)
    other = Tokenizer({bytes([i]): 255 - i for i in range(256)})  # as many tokens, but others
    for change, message in (
        ({"seed": 7}, "this run has --seed 7, not 1337; start it without --resume"),
        ({"device_batch_size": 4, "sequence_len": 16}, "--device_batch_size 4, not 8 and --sequence_len 16, not 0"),
        ({"tokenizer": other}, "another tokenizer"),
    ):
        with pytest.raises(UserError, match=message) as error:
            tiny_run(resume=True, **change)
        one_line(error)
    assert tiny_run(resume=True, lr_scale=0.5, save_every=1)["step"] == 8  # what doesn't touch the data may change


def test_a_stage_whose_parent_was_retrained_starts_afresh(capsys):
    parent = lambda sha: ckpt.parent_meta({"source": "base", "step": 3, "model_file": {"sha256": sha}})
    tiny_run(num_iterations=4, meta=parent("a"))
    assert "already complete" not in capsys.readouterr().out
    tiny_run(num_iterations=4, meta=parent("a"), resume=True)
    assert "already complete" in capsys.readouterr().out
    tiny_run(num_iterations=3, meta=parent("b"), resume=True, seed=5)
    assert "the checkpoint it started from has been trained anew" in capsys.readouterr().out
    assert find_checkpoint("base").name == "step_000003" and len(losses()) == 3
    assert ckpt.read_meta(find_checkpoint("base"))["parent_sha256"] == "b"
    assert find_checkpoint("base", "d2.old").name == "step_000004"
    own = ckpt.read_meta(find_checkpoint("base"))  # a run that names its own folder as where it starts from
    assert tiny_run(num_iterations=5, meta=ckpt.parent_meta(own), resume=True, seed=5)["step"] == 5
    assert len(losses()) == 5


def test_what_was_left_out_is_told_at_the_end(capsys):
    class TooLong(Counting):
        skipped = 9

        def sample(self, i):
            return (np.zeros(99, int), np.ones(99)) if i % 5 == 0 else super().sample(i)

    tiny_run(loader=PackedLoader(TooLong(), 2, 32, buffer_size=20))
    [told] = [line for line in capsys.readouterr().out.splitlines() if "full" in line]
    assert "truncated" in told and "samples (longer than a row)" in told and "9 conversations" in told
    assert "skipped" not in told  # every sample had a target
    tiny_run(resume=True, loader=PackedLoader(TooLong(), 2, 32, buffer_size=20))
    assert "full" not in capsys.readouterr().out  # nothing was trained


def test_metrics_that_are_no_rows_of_ours_do_not_stop_a_resume():
    tiny_run(num_iterations=4)
    with open(ckpt.run_dir("base", "d2") / "metrics.jsonl", "a") as f:
        f.write('[1]\nnull\n7\n{"note": 1}\n{"step": "two"}\n{"step": 9, "lo')
    tiny_run(resume=True)
    assert len(losses()) == 8


def test_an_evaluation_that_fails_keeps_the_training_so_far():
    with pytest.raises(ZeroDivisionError):
        tiny_run(evals=[Eval("", 3, lambda m: 1 / 0)])
    assert find_checkpoint("base").name == "step_000003"


def test_a_new_run_puts_an_old_one_of_its_name_aside():
    tiny_run(num_iterations=4)
    tiny_run(num_iterations=2)
    assert find_checkpoint("base").name == "step_000002"
    assert find_checkpoint("base", "d2.old").name == "step_000004"


def test_keep_last_removes_older_checkpoints():
    tiny_run(save_every=2, keep_last=2)
    assert [step for step, _ in ckpt.list_steps(ckpt.run_dir("base", "d2"))] == [6, 8]


class Scores:
    """An evaluation every second step that gives these values, one after the other."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, model):
        return {"score": self.values.pop(0)}


def test_the_best_checkpoint_is_kept_and_loaded(capsys):
    tiny_run(evals=[Eval("", 2, Scores(0.1, 0.5, 0.5, 0.2))], keep_best="score")
    run = ckpt.run_dir("base", "d2")
    assert [step for step, _ in ckpt.list_steps(run)] == [4, 8]
    assert find_checkpoint("base").name == find_checkpoint(str(run)).name == "step_000004"
    assert find_checkpoint("base", step=8).name == "step_000008"
    assert load_model("base")[2]["metrics"]["score"] == 0.5
    assert "the best score was 0.5 at step 4" in capsys.readouterr().out
    shutil.rmtree(run / "step_000004")
    assert find_checkpoint("base").name == "step_000008"


def test_a_run_without_better_validations_stops_early_and_stays_stopped(capsys):
    scores, last = Scores(0.3, 0.2, 0.1, 0.9), Eval("last", 0, lambda m: {"told": 1.0})
    final = tiny_run(evals=[last, Eval("", 2, scores)], keep_best="score", early_stop=2)
    assert final["step"] == 6 and final["told"] == 1.0 and scores.values == [0.9]
    assert find_checkpoint("base").name == "step_000002"
    again = tiny_run(evals=[Eval("", 2, scores)], keep_best="score", early_stop=2, resume=True)
    assert again == final and "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_a_resumed_run_remembers_its_best(cut):
    options = {"keep_best": "score", "early_stop": 2, "num_iterations": 12}
    values = (0.1, 0.6, 0.5, 0.4, 0.7)
    tiny_run("whole", evals=[Eval("", 2, Scores(*values))], **options)
    stop = Eval("", cut, lambda m: signal.raise_signal(signal.SIGINT) or {})
    with pytest.raises(SystemExit):
        tiny_run("cut", evals=[Eval("", 2, Scores(*values)), stop], **options)
    tiny_run("cut", evals=[Eval("", 2, Scores(*values[cut // 2 :]))], resume=True, **options)
    assert losses("cut") == losses("whole") and len(losses("cut")) == 8
    for tag in ("whole", "cut"):
        assert [step for step, _ in ckpt.list_steps(ckpt.run_dir("base", tag))] == [4, 8]
        assert find_checkpoint("base", tag).name == "step_000004"


def test_a_metric_that_nobody_gives_is_named(capsys):
    tiny_run(evals=[Eval("", 0, lambda m: {"f1": 0.5})], keep_best="f2")
    assert "--keep_best f2: no such metric, so the last counts; there are f1, loss" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Two processes

TWO = """
import os, signal, torch
from nanochat import optim
from nanochat.common import cleanup_distributed, from_main, init_distributed, over_ranks
from nanochat.train import Eval, mean_loss
import test_train
torch.set_num_threads(1)
optim.cpu_has_fast_bf16 = lambda: False
d = init_distributed("cpu")
def stop(model):
    if d.rank == 1:
        signal.raise_signal(signal.SIGTERM)
    return {}
for n in (0, 1, 5):
    seen = []
    assert over_ranks(lambda part: [seen.append(i) or i * i for i in part], range(n)) == [i * i for i in range(n)]
    assert seen == list(range(d.rank, n, 2))
run = lambda tag, **o: test_train.tiny_run(tag, mean_loss, dist_info=d, model=test_train.tiny_model(seed=d.rank), **o)
run("two")
try:
    run("cut", evals=[Eval("", 3, stop)])
except SystemExit as e:
    assert e.code == 143
run("cut", resume=True)
try:
    run("failed", evals=[Eval("", 3, lambda model: 1 / 0)])
except ZeroDivisionError:
    assert from_main(10 + d.rank) == 10
cleanup_distributed()
"""


def test_two_processes_have_the_losses_of_one_also_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "cpu_has_fast_bf16", lambda: False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(2):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = subprocess_env(tmp_path, MASTER_PORT=str(port), **where)
        ranks.append(subprocess.Popen([sys.executable, "-c", TWO], env=env, stderr=subprocess.PIPE, text=True))
    loaders = [PackedLoader(Counting(), 2, 32, r, 2, buffer_size=20) for r in range(2)]
    tiny_run("one", mean_loss, loader=Joined(loaders))
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)  # the same sums in another order
    assert losses("cut") == losses("two")
    # an accident may be one rank's alone, and saving would wait for it: several processes leave the last checkpoint
    assert not ckpt.list_steps(ckpt.run_dir("base", "failed"))
    names = {p.name for p in find_checkpoint("base", "two").iterdir()}
    assert names == {"model.safetensors", "meta.json", "tokenizer.json", "optim_rank0.pt", "optim_rank1.pt"}
    with pytest.raises(UserError, match="processes"):
        tiny_run("two", resume=True)


# ----------------------------------------------------------------------------------------------------------------------
# Accidents


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_batch(bad):
    model, calls, before = tiny_model(), [], {}

    def loss_fn(model, inputs, targets):
        calls.append(inputs)
        if len(calls) == 6:  # the second micro-batch of step 3
            before.update({k: v.clone() for k, v in model.state_dict().items()})
            return mean_loss(model, inputs, targets) * bad
        return mean_loss(model, inputs, targets)

    with pytest.raises(UserError, match="step 3: the loss is") as error:
        tiny_run(model=model, loss_fn=loss_fn, save_every=2, total_batch_size=128)
    text = one_line(error)
    assert "micro-batch 1" in text and str(calls[5][0, :12].tolist()) in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert find_checkpoint("base").name == "step_000002"
    dump = torch.load(next(find_checkpoint("base").parent.glob("nonfinite*.pt")), weights_only=True)
    assert dump["step"] == 3 and torch.equal(dump["batches"][1][0], calls[5])


def test_a_full_disk_while_saving_leaves_the_old_checkpoint(monkeypatch):
    real, calls = ckpt.safetensors.torch.save_file, []

    def full(tensors, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(tensors, file)

    monkeypatch.setattr(ckpt.safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="No space left on device") as error:
        tiny_run(save_every=3)
    assert "step_000003" in one_line(error)
    run = ckpt.run_dir("base", "d2")
    assert [p.name for p in run.iterdir() if p.is_dir()] == ["step_000003"]
    assert load_model("base")[2]["step"] == 3


def damage(path, change):
    meta = json.loads((path / "meta.json").read_text())
    change(meta)
    (path / "meta.json").write_text(json.dumps(meta))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def not_safetensors(path):
    (path / "model.safetensors").write_bytes(b"hello" * 100)
    damage(path, lambda m: m["model_file"].update(bytes=500, sha256=ckpt.sha256_of(path / "model.safetensors")))


def smaller_tokenizer(path):
    damage(path, lambda m: m["model_config"].update(vocab_size=100))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "truncated"),
        (flip_a_byte, "damaged"),
        (not_safetensors, "not a safetensors file"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "meta.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "meta.json").write_text("[1]"), "not a checkpoint's"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer"),
        (lambda p: damage(p, lambda m: m.update(schema=99)), "schema 99"),
        (lambda p: damage(p, lambda m: m["model_config"].update(n_embd=64)), "expected"),
        (lambda p: damage(p, lambda m: m["model_config"].update(n_layer=3, block_pattern="TTT")), "lacks"),
        (lambda p: damage(p, lambda m: m["model_config"].update(n_layer=1, block_pattern="T")), "unknown"),
        (lambda p: damage(p, lambda m: m["model_config"].update(colour="red")), "doesn't know"),
        (smaller_tokenizer, "don't belong together"),
    ],
)
def test_a_foreign_or_damaged_checkpoint_is_refused_in_one_line(harm, message, finished_run, tmp_path):
    path = tmp_path / "step_000002"
    shutil.copytree(finished_run, path)
    harm(path)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(path))
    one_line(error)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        tiny_run(num_iterations=2)
        return find_checkpoint("base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "neither a checkpoint folder"),
        (("rag",), "no 'rag' checkpoint"),
        (("base", "nosuch"), "known tags: d2"),
        (("base", "d2", 7), "no step 7"),
        (("base", "../x"), "letters, digits"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named_with_what_is(arguments, message):
    tiny_run(num_iterations=1)
    with pytest.raises(UserError, match=message) as error:
        find_checkpoint(*arguments)
    one_line(error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = bad
    path = ckpt.save_checkpoint(tmp_path / "run", 1, model, BYTES, {}, {}, CPU)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.up\.weight holds NaN or infinity") as error:
        load_model(str(path))
    one_line(error)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = tiny_model()
    model.lm_head.weight = model.wte.weight
    path = ckpt.save_checkpoint(tmp_path / "run", 1, model, BYTES, {}, {}, CPU)
    weights, meta = ckpt.load_checkpoint(path)
    assert meta["tied"] == {"lm_head.weight": "wte.weight"}
    assert torch.equal(weights["lm_head.weight"], model.wte.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_batch_size": 100}, "try 128"),
        ({"num_iterations": 0}, "at least 1"),
        ({"warmup_ratio": 2.0}, "between"),
        ({"total_batch_size": -64}, "--total_batch_size -64: 0 or more"),
        ({"keep_last": -1}, "--keep_last -1"),
        ({"early_stop": -1}, "--early_stop -1"),
        ({"early_stop": 3}, "--early_stop needs --keep_best"),
        ({"eval_every": -1}, "--eval_every -1"),
        ({"save_every": -3}, "--save_every -3"),
        ({"grad_clip": -1.0}, "--grad_clip"),
        ({"max_minutes": float("nan")}, "--max_minutes nan"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        tiny_run(**options)
    one_line(error)
