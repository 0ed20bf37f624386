"""The engine: the same answers however prompts are read, batched, resumed or streamed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.engine import Engine, sample
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXT = "The capital of Freedonia is Oldtown. Its river is long, 1234 km. What is the name of the river? " * 20
TOK = Tokenizer.train([TEXT], 256 + len(SPECIAL_TOKENS) + 40)
V = TOK.vocab_size


def make_engine(pattern: str = "MT", sequence_len: int = 128, seed: int = 0) -> Engine:
    """An engine on a small random model that talks in varied tokens."""
    torch.manual_seed(seed)
    # a vocabulary padded beyond the tokenizer's, as a trained model may have
    model = GPT(GPTConfig(sequence_len, V + 7, len(pattern), 2, 2, 32, pattern, d_state=16, headdim=16))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(0, 0.3)
        model.lm_head.weight.normal_(0, 0.4)
    model.tokenizer = TOK
    return Engine(model.eval(), TOK)


def conversation(question: str, *documents: str) -> dict:
    docs = [{"title": f"T{i}", "content": d, "score": 1.0 / (i + 1)} for i, d in enumerate(documents)]
    retrieval = [{"role": "retrieval", "query": question, "documents": docs}] if docs else []
    return {"messages": [*retrieval, {"role": "user", "content": question}]}


def greedy_by_hand(engine: Engine, ids: list[int], n: int) -> list[int]:
    """Read everything again for every token: no cache, no batch."""
    out = []
    for _ in range(n):
        with torch.no_grad():
            token = int(engine.model(torch.tensor([ids + out]))[0, -1, :V].argmax())
        if token in engine.stop:
            break
        out.append(token)
    return out


def prompts_of(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("pattern", ["TT", "MM", "MT"])
def test_a_batch_of_any_lengths_says_what_each_prompt_alone_would(pattern):
    engine = make_engine(pattern)
    prompts = prompts_of(5, 17, 5, 70, 1)
    done = engine.generate(prompts, max_tokens=12)
    for ids, completion in zip(prompts, done):
        assert completion.ids == greedy_by_hand(engine, ids, 12)
        assert len(completion.logprobs) == len(completion.ids) + completion.finished
        assert completion.finished or len(completion.ids) == 12


def test_finished_rows_leave_the_batch_and_the_others_go_on():
    engine = make_engine()
    prompts = prompts_of(4, 9, 14)
    free = [greedy_by_hand(engine, ids, 10) for ids in prompts]
    stop = {free[0][2], free[1][5]}  # two rows will end early
    cut = [next((row[:i] for i, t in enumerate(row) if t in stop), row) for row in free]
    done = engine.generate(prompts, max_tokens=10, stop=stop)
    assert [c.ids for c in done] == cut
    assert [c.finished for c in done] == [len(a) < len(b) for a, b in zip(cut, free)]
    assert sorted(map(len, cut)) != [10, 10, 10]


def test_batches_of_any_size_give_the_same_answers_in_order():
    engine = make_engine()
    prompts = prompts_of(9, 2, 30, 2, 17, 9, 5)
    one = engine.complete_batch(prompts, batch_size=1, max_tokens=8)
    for size in (3, 100):
        many = engine.complete_batch(prompts, batch_size=size, max_tokens=8, progress=size == 3)
        assert [c.ids for c in many] == [c.ids for c in one]
    assert engine.complete_batch([], 4) == engine.generate([]) == []


def test_a_long_prompt_read_in_pieces_is_read_as_one(monkeypatch):
    engine = make_engine(sequence_len=512)
    (ids,) = prompts_of(300)
    whole = engine.prefill(ids).logits
    monkeypatch.setattr("nanochat.engine.PREFILL_TOKENS", 64)
    torch.testing.assert_close(engine.prefill(ids).logits, whole, rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["T", "M", "MT"]), st.integers(1, 40), st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_a_prefix_is_read_once_and_continued_many_times(pattern, n, tails):
    engine = make_engine(pattern)
    head, *rest = prompts_of(n, *tails)
    prefix = engine.prefill(head)
    prompts = [head + tail for tail in rest] + prompts_of(6)  # the last one doesn't begin with the prefix
    for _ in range(2):  # twice: the prefix must not be written to
        got = engine.generate(prompts, max_tokens=5, prefix=prefix)
        assert [c.ids for c in got] == [greedy_by_hand(engine, ids, 5) for ids in prompts]


def test_logprobs_are_the_models():
    engine = make_engine()
    (ids,) = prompts_of(8)
    watch = [TOK.encode(" I")[0], TOK.bos]
    (done,) = engine.generate([ids], max_tokens=6, watch=watch)
    with torch.no_grad():
        logprobs = engine.model(torch.tensor([ids + done.ids]))[0, :, :V].log_softmax(-1)
    want = [logprobs[len(ids) - 1 + i, t].item() for i, t in enumerate(done.ids)]
    assert done.logprobs[: len(want)] == pytest.approx(want, abs=1e-4)
    assert done.watched == pytest.approx(logprobs[len(ids) - 1, watch].tolist(), abs=1e-4)
    assert engine.score(ids, done.ids) == pytest.approx(want, abs=1e-4)
    assert engine.score(ids, done.ids[:1]) == pytest.approx(want[:1], abs=1e-4)
    assert engine.score(ids, []) == []


def test_seeds_decide_what_is_sampled():
    engine = make_engine()
    prompts = prompts_of(8, 8)
    draw = lambda seed, t: [c.ids for c in engine.generate(prompts, 12, temperature=t, seed=seed)]
    assert draw(1, 1.0) == draw(1, 1.0) != draw(2, 1.0)
    assert draw(1, 1e-9) == draw(1, 0.0), "the cold limit is greedy"


def test_sampling_follows_the_distribution_and_its_cuts():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, -1)
    g = torch.Generator().manual_seed(0)
    freq = lambda **kw: torch.bincount(sample(logits, generator=g, **kw), minlength=4) / 4000
    # 4000 draws: the standard deviation of a frequency is below 0.008
    assert torch.allclose(freq(temperature=1.0), torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.03)
    assert torch.allclose(freq(temperature=0.5), torch.tensor([0.16, 0.09, 0.04, 0.01]) / 0.3, atol=0.03)
    assert torch.allclose(freq(temperature=1.0, top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03)
    assert torch.allclose(freq(temperature=1.0, top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03)
    assert freq(temperature=1.0, top_p=1e-6)[0] == 1 and freq()[0] == 1
    assert torch.allclose(freq(temperature=1.0, top_k=99), torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.03)


def test_streamed_pieces_make_up_the_answer():
    engine = make_engine()
    for seed in range(5):
        kw = {"max_tokens": 40, "temperature": 1.0, "seed": seed}
        pieces = list(engine.stream(conversation("What is the river?"), **kw))
        assert "".join(pieces) == engine.answer(conversation("What is the river?"), **kw)
        assert all(pieces)


def test_characters_spread_over_tokens_are_streamed_whole():
    engine = make_engine()
    text = "Ünïcode 😀 “quotes”"
    steps = ([(0, i, 0.0)] for i in [*TOK.encode_text(text), TOK.assistant_end])
    pieces = list(engine._pieces(steps))
    assert "".join(pieces) == text and not any("�" in p for p in pieces)
    cut = ([(0, i, 0.0)] for i in TOK.encode(" é".encode()[:-1]))
    assert "".join(engine._pieces(cut)) == "�"


def test_a_follow_up_reads_only_what_is_new(monkeypatch):
    engine = make_engine(sequence_len=512)
    first = conversation("What is the river?")
    answer = "".join(engine.stream(first, max_tokens=5))
    turn = [{"role": "assistant", "content": answer}, {"role": "user", "content": "And the capital?"}]
    second = {"messages": first["messages"] + turn}
    read = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, ids, **kw: read.append(ids.size(1)) or forward(self, ids, **kw))
    again = "".join(engine.stream(second, max_tokens=5))
    new = len(engine.prompt(second)) - len(engine.prompt(first))
    assert read[0] == new
    assert again == engine.answer(second, max_tokens=5)


def test_streaming_leaves_no_global_state_behind():
    engine = make_engine()
    pieces = engine.stream(conversation("Q?"), max_tokens=5, temperature=1.0)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    pieces.close()


def test_too_many_documents_are_trimmed_and_too_long_a_question_is_refused():
    engine = make_engine(sequence_len=96)
    long = conversation("What is the river?", *["word " * 60] * 3)
    assert len(engine.prompt(long, max_tokens=20)) <= 96 - 20
    assert len(engine.prompt(long, max_tokens=10_000)) <= 48  # an answer never takes more than half of the context
    assert isinstance(engine.answer(long, max_tokens=20), str)
    with pytest.raises(UserError, match="the model reads at most"):
        engine.answer(conversation("word " * 200))
    with pytest.raises(UserError):
        engine.stream(conversation("word " * 200))  # before the first piece is asked for


def test_answer_batch_answers_as_answer_does():
    engine = make_engine()
    asked = [conversation("What is the river?", "one two"), conversation("Why?"), conversation("Who is it?", "x", "y")]
    assert engine.answer_batch(asked, batch_size=2, max_tokens=9) == [engine.answer(c, max_tokens=9) for c in asked]


def test_bf16_weights_cast_once_work():
    engine = make_engine()
    engine.model.set_compute_dtype(torch.bfloat16)
    slow = engine.generate(prompts_of(9, 4), 6)
    for p in engine.model.parameters():
        if p.ndim >= 2:
            p.data = p.data.to(torch.bfloat16)
    fast = engine.generate(prompts_of(9, 4), 6)
    assert [c.ids[0] for c in slow] == [c.ids[0] for c in fast]


@pytest.mark.parametrize(
    "bad",
    [{"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}],
)
def test_sampling_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        make_engine("T").answer(conversation("Q?"), **bad)


def test_an_empty_prompt_or_batch_size_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        make_engine("T").generate([[]])
    with pytest.raises(UserError, match="batch_size"):
        make_engine("T").complete_batch([[1]], batch_size=0)


def test_the_line_ends_of_a_page_are_not_read():
    assert TOK.render_conversation(conversation("Q?", "one\n two\t three ")) == TOK.render_conversation(
        conversation("Q?", "one two three")
    )


@pytest.mark.parametrize("pattern", ["MT", "MM"])
def test_scores_of_a_batch_of_any_lengths_are_those_of_each_alone(pattern):
    engine = make_engine(pattern)
    prompts, answer = prompts_of(5, 70, 17, 1, 17, 40), [3, 1, 200, 7]
    alone = [sum(engine.score(prompt, answer)) for prompt in prompts]
    assert engine.score_batch(prompts, answer, batch_size=4) == pytest.approx(alone, abs=1e-3)
    assert engine.score_batch([], answer) == []
