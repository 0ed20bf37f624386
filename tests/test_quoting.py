"""Answers in the words of their documents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import TOK, V, conversation, make_engine

from nanochat.quoting import Quoting, is_quote
from nanochat.rag_utils import ABSTENTION
from nanochat.tokenizer import Tokenizer

BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # a tokenizer without any merge
TEXT = "Antananarivo is the capital. 24.4% (2020) live in D.C., code .mg; 12,000 of 3.5 at -5 C; Café; "
TEXT += "日本の首都 [7]. [8] on"


@pytest.mark.parametrize(
    ("said", "begins", "done"),
    [
        ("Antan", True, False),
        ("Antananarivo", True, False),
        ("Antananarivo.", True, False),
        ("Antananarivo. ", True, False),
        ("Antananarivo. [", True, False),
        ("Antananarivo. [1", True, False),
        ("Antananarivo. [1]", True, True),
        ("Antananarivo. [1][", True, False),
        ("Antananarivo. [1][12]", True, True),
        ("24.4%. [12]", True, True),
        (".mg. [1]", True, True),
        ("D.C. [1]", True, True),
        ("3.5", True, False),
        ("-5", True, False),
        ("12,000", True, False),
        ("Café", True, False),
        ("日本", True, False),
        ("首都. [1]", True, True),
        ("[7]. [8] o", True, False),
        ("12,000 of 3.5. [1]", True, True),
        ("12,000 of. [1]", False, False),  # of what?
        ("24.4% (2020). [1]", True, True),
        ("24.4% (2020. [1]", False, False),
        ("", True, False),
        (" ", False, False),
        ("ntan", False, False),
        ("Anta ", False, False),
        ("Antananarive", False, False),
        ("Antananarivo. []", False, False),
        ("Antananarivo. [2", False, False),
        ("Antananarivo. [1][1", True, False),
        ("Antananarivo. [1][1]", False, False),
        ("Antananarivo. [1][12][", False, False),
        ("Antananarivo. [3]", False, False),
        ("Antananarivo. [1]x", False, False),
        ("Antananariv. [1]", False, False),
        ("capital code", False, False),
        ("12", True, False),
        ("12,", True, False),
        ("000", False, False),
        ("3", True, False),
        ("5 C", False, False),
        ("Caf", True, False),
        (".", True, False),
        ("D.C.,", True, False),
        ("D.C.,. [1]", False, False),
    ],
)
def test_a_quote_is_whole_words_and_numbers_of_the_text_and_citations(said, begins, done):
    assert (is_quote(said, TEXT, {"1", "12"}), is_quote(said, TEXT, {"1", "12"}, done=True)) == (begins, done)


@given(st.text("ab .,1é日", max_size=30), st.integers(0, 29), st.integers(1, 30))
def test_what_may_be_said_may_be_begun(text, start, length):
    """Whatever is a quote as a whole is one letter by letter, and byte by byte."""
    said = text[start : start + length]
    if is_quote(cited := f"{said.rstrip().removesuffix('.')}. [1]", text, {"1"}, done=True):
        ids = BYTES.encode_text(cited)
        quoting = Quoting(BYTES, BYTES.render_conversation(conversation("Q?", text))[0])
        quoting.texts, quoting.numbers = [text], {"1"}
        assert all(quoting.allows(ids[:n]) for n in range(len(ids) + 1)) and quoting.allows(ids, done=True)


def test_the_documents_are_those_of_the_prompt():
    talk = conversation("Q?", "one\n two", "three")
    talk["messages"][0]["documents"][1]["number"] = 7
    quoting = Quoting(BYTES, BYTES.render_conversation(talk)[0])
    assert quoting.texts == ["T0", "one two", "T1", "three"] and quoting.numbers == {"1", "7"}
    assert quoting.allows(BYTES.encode_text("one two. [7]"), done=True)
    assert not quoting.allows(BYTES.encode_text("T0 one"))
    cut = BYTES.render_conversation(conversation("Q?", "one " * 50), max_tokens=60)[0]
    assert 5 < len(Quoting(BYTES, cut).texts[1]) < 60
    assert not Quoting(BYTES, BYTES.render_conversation(conversation("Q?"))[0])


def test_abstaining_is_allowed_where_it_is():
    prompt = BYTES.render_conversation(conversation("Q?", "It is here."))[0]
    refusal = BYTES.encode_text(ABSTENTION)
    may, must = Quoting(BYTES, prompt), Quoting(BYTES, prompt, abstain=False)
    assert all(may.allows(refusal[:n]) for n in range(len(refusal))) and may.allows(refusal, done=True)
    assert not may.allows(refusal[:9], done=True) and not must.allows(refusal[:9])


def test_what_ends_with_a_letter_is_finished_and_a_lone_article_is_not():
    text = "The doctor found hepatitis A in ward A."
    for said, done in (("hepatitis A. [1]", True), ("ward A. [1]", True), ("A. [1]", True), ("The. [1]", False)):
        assert is_quote(said, text, {"1"}, done=True) == done


def test_half_a_character_must_become_one_of_the_text():
    quoting = Quoting(BYTES, BYTES.render_conversation(conversation("Q?", "Café – open"))[0])
    cafe = BYTES.encode_text("Café")
    assert quoting.allows(cafe[:-1]) and not quoting.allows(cafe[:-1], done=True)
    assert quoting.allows([*cafe, *b". [1]"], done=True)
    assert not quoting.allows([*cafe[:-2], "–".encode()[0]])
    assert quoting.allows(BYTES.encode_text("Café –")[:-1])


def test_an_untrained_model_quotes_too():
    engine = make_engine(sequence_len=256)
    talks = [conversation("Q?", text) for text in ("The capital of Freedonia is Oldtown.", "Its river is 1234 km.")]
    prompts = [*(engine.prompt(talk, 12) for talk in talks), engine.prompt(conversation("Q?"), 12)]
    free, bound = engine.generate(prompts, 12), engine.generate(prompts, 12, quote=True, abstain=False)
    assert bound[2].ids == free[2].ids  # without a document as it was
    for prompt, completion in zip(prompts[:2], bound):
        assert completion.ids and Quoting(TOK, prompt, abstain=False).allows(completion.ids, completion.finished)
    assert not any(Quoting(TOK, prompt).allows(c.ids) for prompt, c in zip(prompts[:2], free))
    alone = [engine.generate([p], 12, quote=True, abstain=False)[0].ids for p in prompts]
    assert alone == [c.ids for c in bound]
    answers = engine.answer_batch(talks, max_tokens=12, quote=True, abstain=False)
    assert ["".join(engine.stream(talk, 12, quote=True, abstain=False)) for talk in talks] == answers


def test_who_may_not_abstain_gives_the_next_best_answer(monkeypatch):
    engine = make_engine()
    prompt = engine.prompt(conversation("Q?", "It is the land of Freedonia."), 16)
    words = TOK.encode_text("Freedonia. [1]")
    assert engine.refusal[0] != words[0]

    def play(abstain: bool) -> str:
        """The model wants to abstain and, if it can't, to say Freedonia."""
        calls = []

        def logits(given):
            calls.append(1)
            n = len(calls) - 1 - (not abstain and len(calls) > 2)  # to look ahead is a call, too
            out = torch.zeros(1, V)
            for weight, plan in ((2, engine.refusal), (1, words)):
                out[0, (plan + [TOK.assistant_end] * 9)[n]] += weight
            return out

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_logits", logits)
            return engine.text(engine.generate([prompt], 16, quote=True, abstain=abstain)[0].ids)

    assert play(abstain=False) == "Freedonia. [1]" and ABSTENTION.startswith(play(abstain=True))
