"""The whole pipeline through the scripts' own `main`, tiny: what each stage writes, that it learns, what it refuses.

One run is shared by all tests of this file: tokenizer, pretraining, midtraining, SFT, RAG fine-tuning, the evaluations
and the chat. Nothing here can answer well after a dozen steps; that it can is shown by the presets, not by the tests.
"""

import json
import os
import random
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat.checkpoint_manager import find_checkpoint, load_model
from nanochat.common import DATA, UserError, write_jsonl
from nanochat.config import run
from nanochat.documents import Document
from nanochat.engine import Engine
from nanochat.evidence import Evidence, evidence_of
from nanochat.rag_utils import ABSTENTION
from nanochat.reader import FEATURES
from nanochat.retrieval import RetrievalManager, build_kb
from nanochat.retrievers import BM25Retriever, DenseRetriever, HybridRetriever
from nanochat.tokenizer import Tokenizer
from scripts import (
    base_eval,
    base_train,
    chat_cli,
    chat_eval,
    chat_sft,
    evidence_train,
    mid_train,
    prepare_rag_dataset,
    rag_eval,
    rag_finetune,
    tok_eval,
    tok_train,
)
from tasks.factbook import load_documents, load_queries
from tasks.fiction import make_world

# Everything as small as it goes; fp32, because emulated bf16 is slow where the CPU lacks it.
TINY = {"device": "cpu", "dtype": "float32", "device_batch_size": 2, "lr_scale": 1.0}


def configure(script, **options):
    return script.Config(**{k: v for k, v in TINY.items() if k in {f.name for f in fields(script.Config)}} | options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every stage once, in the order of the speedrun; .found holds what each `main` returned."""
    home = tmp_path_factory.mktemp("world")
    w = SimpleNamespace(home=home, base=home / "base", kb=str(home / "rag" / "knowledge_base"), found={})
    w.queries = str(home / "rag" / "queries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(w.base))
        # 1. Text of ours, tokenizer
        docs = [d["content"] for d in load_documents().values() if d["split"] == "train"]
        (home / "text").mkdir()
        for n, text in enumerate(random.Random(0).sample(docs, 300)):
            (home / "text" / f"{n}.txt").write_text(text)
        w.text = str(home / "text")
        w.found["tok_train"] = tok_train.main(tok_train.Config(data=w.text, vocab_size=700))
        w.found["tok_eval"] = tok_eval.main(
            tok_eval.Config(data=w.text, max_examples=50, output=str(home / "tok_eval.json"))
        )
        # 2. Pretraining: no drills but a few, so that the loss is that of text
        w.found["base_train"] = base_train.main(configure(
            base_train, depth=2, block_pattern="MT", n_embd=64, sequence_len=128, data=w.text, num_iterations=25,
            drill_until=0.05, val_batches=2, eval_every=0,
        ))  # fmt: skip
        w.found["base_eval"] = base_eval.main(base_eval.Config(
            data=w.text, val_batches=2, device_batch_size=2, max_examples=10, device="cpu",
            output=str(home / "base_eval.json"),
        ))  # fmt: skip
        # 3. Midtraining and SFT, with conversations of our own
        mine = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"I, {n}."}]}
                for n in range(30)]  # fmt: skip
        (home / "mine.jsonl").write_text("".join(json.dumps(c) + "\n" for c in mine))
        w.found["mid_train"] = mid_train.main(configure(
            mid_train, sequence_len=384, data=w.text, conversations=str(home / "mine.jsonl"), num_iterations=6,
            val_batches=2, eval_every=0,
        ))  # fmt: skip
        w.found["chat_sft"] = chat_sft.main(configure(chat_sft, sequence_len=384, num_iterations=24, eval_every=0))
        w.found["chat_eval"] = chat_eval.main(chat_eval.Config(
            max_examples=4, batch_size=4, show=1, device="cpu", output=str(home / "chat_eval.json"),
        ))  # fmt: skip
        # 4. RAG
        prepare_rag_dataset.main(prepare_rag_dataset.Config(mode="example", output=str(home / "rag"), type="bm25"))
        w.found["rag_finetune"] = rag_finetune.main(configure(
            rag_finetune, knowledge_base=w.kb, block_pattern="M,T", retriever_type="bm25", top_k=3, sequence_len=384,
            num_iterations=24, eval_every=0, val_examples=3,
        ))  # fmt: skip
        w.found["evidence_train"] = evidence_train.main(configure(
            evidence_train, knowledge_base=w.kb, model_tag="d2", device_batch_size=4, num_iterations=3,
            eval_every=0, val_examples=4,
        ))  # fmt: skip
        (home / "sides.jsonl").write_text("".join(json.dumps(disagreement(n)) + "\n" for n in range(2)))
        rows = [(i, f"What is thing {i}?", "a spoon" if i % 2 else "a fork") for i in range(4)]
        write_jsonl(home / "own" / "queries" / "val.jsonl", (
            {"id": f"own{i}", "query": q, "answer": a, "answers": [a], "positive_ids": [f"t{i}"], "type": "single"}
            for i, q, a in rows))  # fmt: skip
        build_kb([Document(f"t{i}", f"Thing {i}", f"Thing {i} is {a}.") for i, _, a in rows],
                 home / "own" / "knowledge_base", "bm25")  # fmt: skip
        w.asked = str(home / "asked" / "test.jsonl")
        asked = load_queries(w.queries + "/test.jsonl")
        golds = list(dict.fromkeys(row["positive_ids"][0] for row in asked if row["positive_ids"]))
        write_jsonl(w.asked, [*asked, *(
            {"id": f"two{n}", "query": "Zzz?", "answer": "spoon", "positive_ids": golds[n : n + 2], "hops": 2,
             "type": "two_hop"} for n in (0, 1))])  # fmt: skip
        w.found["rag_eval"] = rag_eval.main(rag_eval.Config(
            knowledge_base=w.kb, queries=w.asked, retriever_type="bm25", top_k=3, max_examples=3,
            max_tokens=6, device="cpu", output=str(home / "rag_eval.json"), context=512,
            calibrate=f"{w.queries}/val.jsonl,{home}/own/queries/val.jsonl", contradictions=str(home / "sides.jsonl"),
        ))  # fmt: skip
        yield w


def disagreement(n: int) -> dict:
    """A row of contradictions.jsonl."""
    old, new = (
        {"answer": town, "answers": [town, f"city of {town}"], "date": date, "title": f"Learning {n}",
         "passage": f"In {date} the capital of learning was {town}.", "passage_undated": f"Its capital is {town}."}
        for town, date in (("Turin", "1862"), ("Rome", "2025"))
    )  # fmt: skip
    return {"id": f"c{n}", "query": "What is the capital of learning?", "country": "learning", "old": old, "new": new}


@pytest.fixture(autouse=True)
def _base(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world.base))


def curve(world, source, tag="d2"):
    rows = [json.loads(x) for x in (world.base / "checkpoints" / source / tag / "metrics.jsonl").open()]
    return [r["loss"] for r in rows if "loss" in r]


# ----------------------------------------------------------------------------------------------------------------------
# What every stage leaves behind


@pytest.mark.parametrize(("source", "steps"), [("base", 25), ("mid", 6), ("sft", 24), ("rag", 24)])
def test_a_stage_leaves_a_checkpoint_that_loads_and_its_metrics(world, source, steps):
    run_folder = world.base / "checkpoints" / source / "d2"
    assert {p.name for p in run_folder.iterdir()} == {"metrics.jsonl", f"step_{steps:06d}"}
    assert len(curve(world, source)) == steps
    model, tokenizer, meta = load_model(source)
    assert (meta["step"], meta["source"], meta["tag"]) == (steps, source, "d2")
    assert model.config.block_pattern == "MT" and tokenizer.vocab_size == model.config.vocab_size == 700
    assert model.generate_from_conversation({"messages": [{"role": "user", "content": "Hi"}]}, max_tokens=2) is not None


def test_longer_rows_lengthen_the_context_of_the_next_stages(world):
    lengths = [load_model(source)[0].config.sequence_len for source in ("base", "mid", "sft", "rag")]
    assert lengths == [128, 384, 384, 384]


def test_every_stage_names_the_one_it_came_from(world):
    parents = {s: load_model(s)[2].get("parent") for s in ("base", "mid", "sft", "rag")}
    assert parents == {"base": None, "mid": "base", "sft": "mid", "rag": "mid"}
    sums = {s: load_model(s)[2]["model_file"]["sha256"] for s in ("base", "mid")}
    assert load_model("mid")[2]["parent_sha256"] == sums["base"]
    assert load_model("rag")[2]["parent_sha256"] == load_model("sft")[2]["parent_sha256"] == sums["mid"]
    assert load_model("rag")[2]["parent_step"] == 6 and load_model("rag")[2]["knowledge_base"] == world.kb


@pytest.mark.parametrize("source", ["base", "sft", "rag"])
def test_the_loss_on_training_data_falls(world, source):
    losses = curve(world, source)
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.97 * sum(losses[:third])  # three per cent: far less than any run of ours showed


def test_the_final_metrics_are_those_of_all_evaluations(world):
    assert world.found["base_train"].keys() >= {"val_bpb", "copy", "recall", "level", "loss", "step", "tokens"}
    assert world.found["mid_train"].keys() >= {"val_bpb", "copy", "f1", "em"}
    assert "chat_val_loss" in world.found["chat_sft"]
    assert world.found["rag_finetune"].keys() >= {"one_f1", "several_em", "fiction_abstains"}
    assert 1 < world.found["base_train"]["val_bpb"] < 6  # 25 steps from the 6 or so bits of a uniform guess


def test_the_tokenizer_is_stored_as_json_and_round_trips(world):
    assert [p.name for p in (world.base / "tokenizer").iterdir()] == ["tokenizer.json"]
    tokenizer = Tokenizer.load(world.base / "tokenizer")
    assert tokenizer.vocab_size == 700 == world.found["tok_train"].vocab_size
    text = "São Tomé: 83,871 sq km <|bos|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.bos not in tokenizer.encode(text)


def shares(row, names):
    return all(0 <= row[name] <= 1 for name in names if name in row)


@pytest.mark.parametrize("name", ["tok_eval", "base_eval", "chat_eval", "rag_eval"])
def test_an_evaluation_writes_rows_config_and_versions(world, name):
    written = json.loads((world.home / f"{name}.json").read_text())
    assert set(written) == {"rows", "config", "versions"} and written == json.loads(json.dumps(world.found[name]))
    assert written["rows"] and written["versions"]
    assert {"seed", "max_examples", "output"} <= written["config"].keys()
    for row in written["rows"].values():
        assert isinstance(row["n"], int) and row["n"] > 0
        assert all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in row.values())
        assert shares(row, {"f1", "em", "accuracy", "hallucination", "abstention", "over_abstention", "recall@k"})


def test_the_evaluations_have_the_rows_they_promise(world):
    assert set(world.found["base_eval"]["rows"]) == {
        "text", "cloze_train_countries", "cloze_val_countries", "drill_copy", "drill_recall", "drill_lookup",
    }  # fmt: skip
    assert {f"{s}/{r}" for s in ("sft", "mid") for r in ("chat", "reading")} <= set(world.found["chat_eval"]["rows"])
    rows = world.found["rag_eval"]["rows"]
    assert {"closed_book", "oracle", "retrieved", "distractors_only", "always_abstain", "first_entity"} <= set(rows)
    assert rows["always_abstain"]["over_abstention"] == 1 and rows["always_abstain"]["f1"] == 0
    assert rows["oracle"]["recall@k"] == 1 and rows["distractors_only"].get("recall@k", 0) == 0
    assert "recall@k" not in rows["closed_book"]
    assert rows["two_hop_half"]["recall@k"] == 0.5 and "abstention" in rows["two_hop_half"]
    assert rows["two_hop"]["all_gold"] == 1 and "over_abstention" in rows["two_hop"]
    for row in rows.values():
        assert all(row[f"{m}_lo"] <= row[m] <= row[f"{m}_hi"] for m in ("f1", "em", "hallucination") if m in row)
    answers = [json.loads(x) for x in (world.home / "rag_eval.answers.jsonl").open()]
    assert len(answers) == sum(row["n"] for row in rows.values())
    assert {a["answer"] for a in answers if a["row"] == "always_abstain"} == {ABSTENTION}
    assert all(set(a["positive_ids"]) <= set(a["documents"]) for a in answers if a["row"] == "oracle")
    assert not any(set(a["positive_ids"]) & set(a["documents"]) for a in answers if a["row"] == "distractors_only")


def test_the_confidence_learned_on_validation_questions_stays_with_the_checkpoint(world):
    fitted = world.found["rag_eval"]["config"]["confidence"]
    model, _, meta = load_model("rag", "cpu")
    assert model.confidence == meta["confidence"] == fitted
    answers = [json.loads(x) for x in (world.home / "rag_eval.answers.jsonl").open()]
    read = [a for a in answers if "confidence" in a]
    assert {"retrieved", "oracle"} <= {a["row"] for a in read}
    assert all(a["answer"] == ABSTENTION for a in read if a["confidence"] <= 0)


def test_who_calibrates_with_few_questions_is_told(world, capsys):
    config = rag_eval.Config(
        knowledge_base=world.kb, queries=world.asked, calibrate=f"{world.home}/own/queries/val.jsonl", max_tokens=3
    )
    engine = Engine(*load_model("rag", "cpu")[:2])
    rag_eval.calibrate(engine, RetrievalManager("bm25", world.kb), config, set())
    told = capsys.readouterr().out
    assert "calibrated on 4 questions that a document found answers, 0 that none does" in told and "fewer than" in told


def test_an_evidence_reader_is_heard_unless_it_is_gone_or_another(world, capsys):
    model, _, meta = load_model("rag", "cpu")
    assert model.evidence.told == meta["evidence"] == world.found["rag_eval"]["config"]["evidence_reader"]
    assert meta["evidence"]["tag"] == "d2" and meta["evidence"]["step"] == 3
    run_folder = world.base / "checkpoints" / "evidence" / "d2"
    run_folder.rename(run_folder.with_name("aside"))
    capsys.readouterr()
    try:
        model = load_model("rag", "cpu")[0]
        assert model.evidence is None and model.confidence is None and meta["confidence"]  # learned with the reader
    finally:
        run_folder.with_name("aside").rename(run_folder)
    assert evidence_of(meta["evidence"] | {"sha256": "0"}) is None
    told = capsys.readouterr().out
    assert told.count("calibrate again") == 2 and "trained anew" in told and "d2" in told


def test_evidence_training_goes_on_where_it_was(world):
    options = {"knowledge_base": world.kb, "device_batch_size": 4, "num_iterations": 4, "eval_every": 0}
    options |= {"val_examples": 4, "save_every": 2, "keep_last": 0, "model_tag": "again"}
    evidence_train.main(configure(evidence_train, **options))
    steps = world.base / "checkpoints" / "evidence" / "again"
    losses = curve(world, "evidence", "again")
    shutil.rmtree(steps / "step_000004")
    evidence_train.main(configure(evidence_train, resume=True, **options))
    assert curve(world, "evidence", "again") == losses and len(losses) == 4
    shutil.rmtree(steps)


def test_questions_to_calibrate_with_are_asked_of_the_knowledge_base_beside_them(world, monkeypatch):
    asked = []

    def found(engine, manager, config, rows, path):
        assert engine.model.confidence is None  # an earlier one's, for which the model may not be asked
        asked.append((manager.path, len(rows)))
        return [], [len(asked)], []

    monkeypatch.setattr(rag_eval, "calibration_features", found)
    monkeypatch.setattr(rag_eval, "fit_confidence", lambda *a, **k: {"in_vain": a[1], "abstain": a[2]} | k)
    monkeypatch.setattr(rag_eval, "fit_words", lambda *a: [1.0, 2.0, 3.0])
    model = SimpleNamespace(evidence=None, confidence={"weights": [0.0]})
    engine = SimpleNamespace(model=model, prompt=None, room=lambda n: n, complete_batch=lambda *a, **k: [])
    config = rag_eval.Config(
        knowledge_base=world.kb, calibrate=f"{world.queries}/val.jsonl,{world.home}/own/queries/val.jsonl"
    )
    manager = RetrievalManager("bm25", world.kb)
    fitted = rag_eval.calibrate(engine, manager, config, set())
    assert fitted == {"in_vain": [1, 2], "abstain": config.abstain, "words": [1.0, 2.0, 3.0], "together": None}
    mask, seen = np.array([True]), [np.zeros((1, FEATURES)), np.ones((1, FEATURES))]
    monkeypatch.setattr(rag_eval, "features_together", lambda *a: [(seen[0], mask, True), (seen[1], mask, False)])
    two = rag_eval.calibrate(engine, manager, config, set())["together"]
    assert two == {"in_vain": seen[1:] * 2, "abstain": config.abstain_together, "count_rivals": False}
    assert asked[:2] == [
        (manager.path, len(load_queries(f"{world.queries}/val.jsonl"))),
        (world.home / "own" / "knowledge_base", 4),
    ]


def test_of_two_documents_calibration_learns_which_two_a_question_takes(tmp_path):
    invented = make_world("val", 12)
    build_kb([Document.from_dict(doc) for doc in invented.documents.values()], tmp_path / "kb", "bm25")
    bridges = {r["query"]: r for r in invented.queries if r.get("bridge_relation") != "compare"}
    said = {}  # instead of the answer

    def one(question, docs):
        told = [n for n, doc in enumerate(docs) if (bridges[question].get("bridge") or " ") in doc["title"]]
        words = said.get("instead", bridges[question]["answer"])
        return Evidence(words, told[0], docs[told[0]]["content"], -0.1, 5.0) if told else None

    finder = SimpleNamespace(find=lambda asked: [one(*each) for each in asked])
    engine = SimpleNamespace(model=SimpleNamespace(evidence=finder))
    manager, config = RetrievalManager("bm25", tmp_path / "kb"), rag_eval.Config(max_examples=4)
    seen = rag_eval.features_together(engine, manager, config, list(bridges.values()))
    assert [whole for *_, whole in seen] == [True, False] * 4 + [False] * 4
    assert all(f.shape == (10, FEATURES) and len(mask) == 10 for f, mask, _ in seen)
    assert all(mask.sum() == whole for _, mask, whole in seen)  # the two that it takes, if they are there
    said["instead"] = "nothing of the kind"
    assert not any(
        mask.any() for _, mask, _ in rag_eval.features_together(engine, manager, config, [*bridges.values()])
    )
    one_is_enough = [r | {"positive_ids": r["positive_ids"][:1]} for r in bridges.values()]
    assert len(rag_eval.features_together(engine, manager, config, one_is_enough)) == 4  # of single-hop questions
    engine.model.evidence = None
    assert rag_eval.features_together(engine, manager, config, list(bridges.values())) == []


def test_a_refused_evaluation_changes_no_checkpoint(world, tmp_path):
    before = (find_checkpoint("rag") / "meta.json").read_bytes()
    for rows, calibrate, says in (("typo", "val", "--rows typo"), ("retrieved", "test", "validation questions")):
        with pytest.raises(UserError, match=says):
            rag_eval.main(rag_eval.Config(
                knowledge_base=world.kb, queries=world.queries + "/test.jsonl", rows=rows, device="cpu",
                calibrate=f"{world.queries}/{calibrate}.jsonl",
            ))  # fmt: skip
    assert (find_checkpoint("rag") / "meta.json").read_bytes() == before


def test_counterfactual_questions_are_asked_about_changed_documents(world):
    answers = [json.loads(x) for x in (world.home / "rag_eval.answers.jsonl").open()]
    oracle, changed = ([a for a in answers if a["row"] == name] for name in ("oracle", "counterfactual"))
    assert {a["id"] for a in changed} <= {a["id"] for a in oracle}
    rows = load_queries(DATA / "factbook" / "queries" / "test.jsonl")
    pool = [r for r in rows if r["type"] == "single"]
    single = random.Random(0).sample(pool, 20)
    documents = {i: Document.from_dict(d) for i, d in load_documents().items()}
    asked, shown = rag_eval.counterfactual(single, pool, documents, seed=0)
    by_id = {row["id"]: row for row in single}
    for new in asked:
        row = by_id[new["id"]]
        [doc] = shown[row["id"]]
        assert row["country"] not in new["query"] + doc.title and new["answers"][0] in doc.content
        assert rag_eval.judge(new, [doc], f"{new['answer']}. [1]")["f1"] == 1
        assert new["answer"] != row["answer"]
    assert len(asked) > 12


def test_documents_that_disagree_stand_among_others(world):
    answers = [json.loads(x) for x in (world.home / "rag_eval.answers.jsonl").open()]
    for kind in ("dated", "undated"):
        shown = [a for a in answers if a["row"] == f"contradictory_{kind}"]
        assert {a["id"] for a in shown} == {f"c{n}-{kind}" for n in (0, 1)} and len(shown) == 2
        assert all(len(a["documents"]) == 3 and set(a["positive_ids"]) < set(a["documents"]) for a in shown)
        assert "over_abstention" in world.found["rag_eval"]["rows"][f"contradictory_{kind}"]


@pytest.mark.parametrize(
    ("kind", "answer", "f1", "recall", "hallucination"),
    [
        ("dated", "Rome. [2] This is as of 2025. As of 1862: Turin. [1]", 1, 1, 0),
        ("dated", "Turin. [1]", 0, 0.5, 0),
        ("dated", "Rome. [2]", 1, 0.5, 0),
        ("undated", "Turin. [1] Or, by another document: Rome. [2]", 1, 1, 0),
        ("undated", "Turin. [2] Or, by another document: Rome. [1]", 0, 1, 0),
        ("undated", "Turin. [1]", 0.5, 0.5, 0),
        ("undated", "Turin. [1] Or, by another document: Milan. [3]", 0.5, 0.5, 1),
        ("undated", ABSTENTION, 0, None, 0),
    ],
)
def test_answers_over_documents_that_disagree_are_judged_by_what_they_say_of_each(
    world, kind, answer, f1, recall, hallucination, tmp_path
):
    rows = (disagreement(0), disagreement(1) | {"split": "test"})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = rag_eval.Config(contradictions=str(tmp_path / "c.jsonl"))
    [row] = rag_eval.contradictions(config, {"val"})[kind]
    assert [d.shown().get("date") for d in row["sides"]] == (["1862", "2025"] if kind == "dated" else [None, None])
    judged = rag_eval.judge(row, [*row["sides"], Document("x", "X", "x")], answer)
    assert (judged["f1"], judged.get("citation_recall"), judged["hallucination"]) == (f1, recall, hallucination)
    assert len(rag_eval.contradictions(config, {"test"})[kind]) == 2
    assert len(rag_eval.contradictions(config, {None})[kind]) == 2  # a user's documents have no splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": {"answer": "x"}}, "'c0' need answer, answers, date"),
        ({"old": None}, "'c0' need answer, answers, date"),
        ({"split": ["val"]}, "record 1: 'split' must be text"),
        ({"country": 5}, "record 1: 'country' must be text"),
        ({"new": {**disagreement(0)["new"], "answers": "Rome"}}, "record 1, 'new': 'answers' must be a list of texts"),
        ({"new": {**disagreement(0)["new"], "date": 2025}}, "record 1, 'new': 'date' must be text"),
    ],
)
def test_a_malformed_contradiction_is_named(tmp_path, change, message):
    (tmp_path / "c.jsonl").write_text(json.dumps({**disagreement(0), **change}))
    with pytest.raises(UserError, match=message):
        rag_eval.contradictions(rag_eval.Config(contradictions=str(tmp_path / "c.jsonl")), {None})


def test_an_evaluation_says_what_an_answer_costs(world):
    rows = world.found["rag_eval"]["rows"]
    assert all(row["ttft_ms"] > 0 for name, row in rows.items() if name not in ("always_abstain", "first_entity"))
    assert rows["closed_book"]["tokens"] < rows["oracle"]["tokens"] < rows["retrieved"]["tokens"]


def test_what_an_answer_costs_does_not_hang_on_what_was_asked_before(world, monkeypatch):
    """Sentence vectors are remembered; a question that finds them in memory is no measure of one that doesn't."""
    encoded, texts = [], [f"Thing {n} is made of silver. It is kept in a drawer." for n in range(4)]
    docs = [Document(f"d{n}", f"Thing {n}", text) for n, text in enumerate(texts)]

    class Encoder:
        def encode_passages(self, texts):
            return np.eye(len(texts), 8, dtype=np.float32)

        def encode_queries(self, texts):
            return np.ones((len(texts), 8), dtype=np.float32)

        def encode_together(self, texts):
            encoded.append(len(texts))
            return np.ones((len(texts), 8), dtype=np.float32)

    dense = DenseRetriever(docs, Encoder())
    for retriever in (dense, HybridRetriever(BM25Retriever(docs), dense)):
        retriever.compare("What?", docs)
        seen = len(encoded)
        retriever.compare("And what?", docs)
        assert len(encoded) == seen  # remembered
        retriever.forget()
        retriever.compare("What?", docs)
        assert len(encoded) == seen + len(docs)
        retriever.forget()
    forgotten = []
    manager = RetrievalManager("bm25", world.kb)
    monkeypatch.setattr(manager.retriever, "forget", lambda: forgotten.append(1))
    engine = Engine(*load_model("rag", "cpu")[:2])
    asks = [("What?", docs[:2]), ("Which?", []), ("Who?", docs)]
    cost = rag_eval.what_it_costs(engine, manager, rag_eval.Config(max_tokens=3), "retrieved", asks)
    assert len(forgotten) == 2 and cost["ttft_ms"] > 0  # the question without documents costs nothing
    assert rag_eval.what_it_costs(engine, manager, rag_eval.Config(), "retrieved", [("Which?", [])]) == {}


def test_where_nothing_is_found_the_model_is_not_asked(world):
    engine, manager = Engine(*load_model("rag", "cpu")[:2]), RetrievalManager("bm25", world.kb)
    config = rag_eval.Config(max_tokens=3)
    for read in ("each", "together"):
        config.read = read
        [(answer, _)] = rag_eval.read_and_answer(engine, manager, config, "retrieved", {}, [("Qqq?", [])])
        assert answer == ABSTENTION
    [(answer, _)] = rag_eval.read_and_answer(engine, manager, config, "closed_book", {}, [("Qqq?", [])])
    assert answer != ABSTENTION


def test_questions_the_knowledge_base_lacks_are_counted_out_aloud(world, tmp_path, capsys):
    gone = {"id": "gone", "query": "Q?", "answer": "x", "positive_ids": ["nowhere"]}
    none = {"id": "none", "query": "Q?", "answer": "x"}
    write_jsonl(tmp_path / "test.jsonl", [*load_queries(world.asked), gone, none])
    found = rag_eval.main(rag_eval.Config(
        knowledge_base=world.kb, queries=str(tmp_path / "test.jsonl"), rows="always_abstain", device="cpu",
    ))["rows"]  # fmt: skip
    asked = load_queries(world.asked)
    assert found["always_abstain"]["n"] == sum(row["type"] == "single" for row in asked)
    told = capsys.readouterr().out
    assert f"2 of {len(asked) + 2} questions are left out" in told, told


def test_other_retrievers_are_asked_where_rows_says_so(world):
    found = rag_eval.main(rag_eval.Config(
        knowledge_base=world.kb, queries=world.queries + "/test.jsonl", max_examples=2, max_tokens=3,
        rows="retrieved_simple", device="cpu",
    ))["rows"]  # fmt: skip
    assert list(found) == ["retrieved_simple"] and "retrieved_simple" not in world.found["rag_eval"]["rows"]


def test_the_same_seed_asks_the_same_questions(world, tmp_path):
    config = rag_eval.Config(
        knowledge_base=world.kb, queries=world.queries + "/test.jsonl", retriever_type="bm25", max_examples=2,
        max_tokens=3, rows="retrieved,always_abstain", device="cpu",
    )  # fmt: skip
    first, second = rag_eval.main(config)["rows"], rag_eval.main(config)["rows"]
    for rows in (first, second):
        assert rows["retrieved"].pop("ttft_ms") > 0
    assert list(first) == ["retrieved", "always_abstain"] and first == second


def test_the_gold_document_stands_at_its_place_also_where_the_retriever_finds_little(world, tmp_path):
    """The first question shares no word with any document but its own; it is also phrased unlike training's."""
    manager = RetrievalManager(retriever_type="simple", knowledge_base_path=world.kb)
    [gold] = [doc for doc in manager.documents if doc.title == "Machine learning"]
    rows = [
        {"id": "q", "query": "zzz", "answer": "computers", "positive_ids": [gold.id], "wording": "held_out"},
        {"id": "r", "query": "What is machine learning?", "answer": "computers", "positive_ids": [gold.id]},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rag_eval.main(rag_eval.Config(
        knowledge_base=world.kb, queries=str(tmp_path / "test.jsonl"), retriever_type="simple", top_k=4, max_tokens=3,
        device="cpu", output=str(tmp_path / "out.json"),
    ))["rows"]  # fmt: skip
    answers = [json.loads(x) for x in (tmp_path / "out.answers.jsonl").open()]
    for p in range(1, 5):
        shown = [a["documents"] for a in answers if a["row"] == f"oracle_distractors_p{p}"]
        assert len(shown) == 2 and all(ids[p - 1] == gold.id and len(set(ids)) == 4 for ids in shown)
        assert found[f"oracle_distractors_p{p}"]["recall@k"] == 1
    assert found["retrieved_held_out_wording"]["n"] == 1 and found["retrieved"]["n"] == 2
    assert {"two_hop", "unanswerable"}.isdisjoint(found)


def test_citations_are_counted_where_they_are_judged(world):
    for row in world.found["rag_eval"]["rows"].values():
        assert ("citation_precision" in row) == ("citation_n" in row)
        assert row.get("citation_n", 1) <= row["n"] and row.get("citation_n", 1) > 0


def test_the_example_data_set_opens_and_its_conversations_render(world):
    manager = RetrievalManager(retriever_type="simple", knowledge_base_path=world.kb)
    assert manager.retrieve("What is machine learning?", top_k=3)[0].title == "Machine learning"
    tokenizer = Tokenizer.load(world.base / "tokenizer")
    for split in ("train", "val"):
        rows = [json.loads(x) for x in (world.home / "rag" / "conversations" / f"{split}_rag.jsonl").open()]
        assert rows and all(any(tokenizer.render_conversation(row)[1]) for row in rows)
    assert {p.stem for p in Path(world.queries).iterdir()} == {"train", "val", "test"}


def test_the_chat_answers_one_question_and_says_what_it_read(world, capsys):
    argv = f"--source rag --knowledge_base {world.kb} --max_tokens 6 --device cpu --top_k 2".split()
    run(chat_cli.main, chat_cli.Config, [*argv, "-p", "When was the Suez Canal opened?"])
    out, err = capsys.readouterr()
    assert out.count("\n") >= 1 and "Suez Canal" in err and "cited:" in err


def test_training_goes_on_where_it_stopped(world):
    """A run of 8 steps in two parts has the losses of one that went through."""
    options = {"depth": 1, "block_pattern": "M", "n_embd": 32, "sequence_len": 64, "data": world.text, "eval_every": 0,
               "val_batches": 1, "drill_until": 0.0, "num_iterations": 8}  # fmt: skip
    base_train.main(configure(base_train, model_tag="whole", save_every=4, keep_last=0, **options))
    part = world.base / "checkpoints" / "base" / "part"
    part.mkdir()
    (part / "step_000004").symlink_to(part.parent / "whole" / "step_000004")
    base_train.main(configure(base_train, model_tag="part", resume=True, **options))
    assert curve(world, "base", "part") == curve(world, "base", "whole")[4:]
    for tag in ("whole", "part"):  # out of the way of "the newest"
        (part.parent / tag).rename(world.home / tag)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing half-written


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = (
        p for p in folder.rglob("*") if p.is_file() and p.parent.name != "cache"
    )  # which may remember what it likes
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


BAD = {
    "unknown option": (base_train, "--dept 3", "did you mean --depth?"),
    "pattern of another length": (base_train, "--depth 3 --block_pattern MT --data TEXT", "2 blocks, but the depth"),
    "unknown block": (base_train, "--depth 2 --block_pattern MX --data TEXT", "unknown block 'X'"),
    "no such text": (base_train, "--data nowhere", "does not exist"),
    "empty text": (base_train, "--data EMPTY", "too little text"),
    "text that is not UTF-8": (base_train, "--data LATIN", "not valid UTF-8"),
    "share above 1": (base_train, "--drill_share 1.5 --data TEXT", "between 0 and 1"),
    "negative seed": (base_train, "--seed -1", "--seed -1"),
    "no steps": (base_train, "--depth 3 --data TEXT --num_iterations 0", "at least 1"),
    "batch that does not divide": (base_train, "--depth 3 --data TEXT --total_batch_size 1000", "not a multiple"),
    "batch of none": (base_train, "--depth 3 --data TEXT --device_batch_size 0", "at least 1"),
    "unknown device": (base_train, "--device toaster", "choose cpu, cuda or mps"),
    "unknown dtype": (base_train, "--depth 3 --data TEXT --dtype float13", "choose one of"),
    "evidence, dry": (evidence_train, "--knowledge_base KB --dry_run true", "isn't for the evidence reader"),
    "evidence, no row": (evidence_train, "--knowledge_base KB --sequence_len 0", "at least 1"),
    "evidence as the speaker": (rag_eval, "--knowledge_base KB --queries QUERIES --source evidence", "not a language"),
    "evidence for nothing": (rag_eval, "--knowledge_base KB --queries QUERIES --evidence none", "is for --calibrate"),
    "bad tag": (base_train, "--depth 3 --data TEXT --model_tag ../x", "letters, digits"),
    "vocabulary below bytes": (tok_train, "--data TEXT --vocab_size 200", "too small"),
    "vocabulary beyond the text": (tok_train, "--data SMALL --vocab_size 9000", "byte pairs"),
    "config that is not there": (tok_train, "--config nowhere.py", "cannot read the config"),
    "config with code": (tok_train, "--config CODE", "only plain assignments"),
    "unknown stage": (mid_train, "--source nonsense", "neither a checkpoint folder nor one of"),
    "missing stage": (mid_train, "--source refrag", "no 'refrag' checkpoint"),
    "missing tag": (mid_train, "--source_tag d99", "known tags: d2"),
    "shares above 1": (mid_train, "--text_share 0.9 --chat_share 0.9 --data TEXT", "between 0 and 1"),
    "malformed conversations": (mid_train, "--conversations BROKEN --data TEXT", "line 2: not valid JSON"),
    "conversations that are none": (chat_sft, "--conversations QUERIES", "a conversation is"),
    "shares above 1 in SFT": (chat_sft, "--facts_share 0.9 --reading_share 0.9", "between 0 and 1"),
    "truncated checkpoint": (chat_sft, "--source CUT", "truncated"),
    "foreign checkpoint": (chat_sft, "--source FOREIGN", "not a checkpoint"),
    "no knowledge base named": (rag_finetune, "", "--knowledge_base is needed"),
    "folder that is no knowledge base": (rag_finetune, "--knowledge_base TEXT", "not a knowledge base"),
    "folder around a knowledge base": (rag_finetune, "--knowledge_base RAG", "name that"),
    "pattern of another model": (rag_finetune, "--knowledge_base KB --block_pattern T,M", "checkpoint has MT"),
    "index that was not built": (rag_finetune, "--knowledge_base KB --retriever_type dense", "no dense index"),
    "unknown retriever": (rag_finetune, "--knowledge_base KB --retriever_type psychic", "unknown retriever type"),
    "no documents": (rag_finetune, "--knowledge_base KB --top_k 0", "--top_k 0"),
    "questions that are not there": (rag_finetune, "--knowledge_base KB --queries TEXT", "cannot read"),
    "malformed questions": (rag_eval, "--knowledge_base KB --queries BROKEN", "line 2: not valid JSON"),
    "questions without an answer": (rag_eval, "--knowledge_base KB --queries MINE", "line 1: no field 'id'"),
    "questions to another knowledge base": (rag_eval, "--knowledge_base KB --queries OTHER", "no single-hop question"),
    "unknown row": (rag_eval, "--knowledge_base KB --queries QUERIES --rows oracel", "--rows oracel"),
    "a row that nobody asks for": (rag_eval, "--knowledge_base KB --queries QUERIES --rows retrieved_held_out_wording",
                                   "has no question for it"),
    "question whose id is no text": (rag_eval, "--knowledge_base KB --queries LISTED", "record 1: 'id', 'query' and"),
    "a tower of brackets": (rag_eval, "--knowledge_base KB --queries DEEP", "line 1: not valid JSON"),
    "fewer than no conversations": (prepare_rag_dataset, "--output NEW --max_conversations -1", "at least 0"),
    "unknown way to read": (rag_eval, "--knowledge_base KB --queries QUERIES --read all", "--read all: choose each or"),
    "a row that would be another's": (rag_eval, "--knowledge_base KB --queries QUERIES --read together --rows "
                                      "retrieved_together", "--rows retrieved_together: choose from"),
    "no examples": (rag_eval, "--knowledge_base KB --queries QUERIES --max_examples 0", "--max_examples 0: at least 1"),
    "batches of none": (rag_eval, "--knowledge_base KB --queries QUERIES --batch_size 0", "--batch_size 0"),
    "a share above one": (rag_eval, "--knowledge_base KB --queries QUERIES --abstain 2", "--abstain 2"),
    "no document shown": (rag_eval, "--knowledge_base KB --queries QUERIES --top_k 0", "--top_k 0"),
    "answers of no length": (rag_eval, "--knowledge_base KB --queries QUERIES --max_tokens -1", "--max_tokens -1"),
    "more documents than there are": (rag_eval, "--knowledge_base KB --queries QUERIES --rows oracle_distractors_p1 "
                                                "--top_k 5000", "too few documents for --top_k 5000"),
    "no layer that attends": (base_train, "--depth 2 --data TEXT", "needs a depth of 3 or more"),
    "no such GPU": (base_train, "--device cuda:x --data TEXT", "choose cpu, cuda or mps"),
    "neither of two": (rag_eval, "--knowledge_base KB", "are needed"),
    "output where a file stands": (rag_eval, "--knowledge_base KB --queries QUERIES --rows always_abstain "
                                             "--output MINE/x.json", "MINE"),
    "nothing to evaluate": (chat_eval, "--max_examples 0", "at least 1"),
    "missing model": (base_eval, "--model_tag d99", "known tags"),
    "unknown mode": (prepare_rag_dataset, "--mode toy --output NEW", "choose example, factbook, handbooks or fiction"),
    "no output": (prepare_rag_dataset, "--mode example", "give --output"),
    "unknown index": (prepare_rag_dataset, "--output NEW --type psychic", "unknown retriever type"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(world):
    """What the capitals in the table above stand for."""
    home = world.home
    for name in ("empty", "latin", "small", "foreign", "cut"):
        (home / name).mkdir()
    (home / "latin" / "a.txt").write_bytes(b"caf\xe9")
    (home / "small" / "a.txt").write_text("a few words\n\nand some more")
    (home / "code.py").write_text("import os")
    (home / "broken.jsonl").write_text('{"id": "a", "query": "q?", "answer": "x", "messages": [{"role": "assistant", '
                                       '"content": "x"}]}\n{"id": "b", "que\n')  # fmt: skip
    (home / "other.jsonl").write_text('{"id": "a", "query": "q?", "answer": "x", "positive_ids": ["not-here"]}\n')
    (home / "listed.jsonl").write_text('{"id": ["a"], "query": "q?", "answer": "x"}\n')
    (home / "deep.jsonl").write_text('{"a": ' + "[" * 100_000 + "\n")
    (home / "foreign" / "config.json").write_text("{}")
    step = world.base / "checkpoints" / "mid" / "d2" / "step_000006"
    for file in step.iterdir():
        (home / "cut" / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    return {
        "TEXT": world.text, "EMPTY": home / "empty", "LATIN": home / "latin", "SMALL": home / "small",
        "CODE": home / "code.py", "BROKEN": home / "broken.jsonl", "MINE": home / "mine.jsonl", "CUT": home / "cut",
        "LISTED": home / "listed.jsonl", "DEEP": home / "deep.jsonl",
        "OTHER": home / "other.jsonl", "FOREIGN": home / "foreign", "KB": world.kb, "RAG": home / "rag",
        "QUERIES": world.queries + "/test.jsonl", "NEW": home / "new",
    }  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_behind(world, places, case, capfd, monkeypatch):
    script, line, message = BAD[case]
    monkeypatch.chdir(world.home)
    argv = line.split()
    for name, path in places.items():
        argv = [a.replace(name, str(path)) if a.startswith(name) else a for a in argv]
        message = message.replace(name, str(path))
    if "--device" not in argv and "device" in {f.name for f in fields(script.Config)}:
        argv += ["--device", "cpu"]
    if script is rag_eval:
        argv += ["--retriever_type", "bm25"]
    before = snapshot(world.home)
    with pytest.raises(SystemExit) as end:
        run(script.main, script.Config, argv)
    out, err = capfd.readouterr()
    [told] = [x for x in err.replace("\r", "\n").splitlines() if x.startswith("error: ")]
    assert end.value.code == 2 and message in told and len(told) < 500
    assert "Traceback" not in out + err
    assert snapshot(world.home) == before


def test_a_full_disk_leaves_no_output(world, tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    argv = ["--data", world.text, "--output", str(tmp_path / "out.json"), "--max_examples", "5"]
    with pytest.raises(SystemExit) as end:
        run(tok_eval.main, tok_eval.Config, argv)
    assert end.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rag_finetune_refuses_questions_of_another_knowledge_base(world, tmp_path):
    row = {"id": "a", "query": "q?", "answer": "x", "positive_ids": ["not-here"]}
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="are they from the same data"):
        rag_finetune.main(
            configure(rag_finetune, knowledge_base=world.kb, queries=str(tmp_path), retriever_type="bm25")
        )
