"""Reading documents one by one: which one answers, how sure it is, who else is heard."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_engine import TOK, conversation, make_engine

from nanochat.common import UserError
from nanochat.documents import Document
from nanochat.evidence import Evidence
from nanochat.rag_utils import ABSTENTION, also_said
from nanochat.reader import (
    BESIDE,
    FEATURES,
    answer_each,
    answer_together,
    answer_views,
    check_confidence,
    confidence,
    fit_confidence,
    fit_words,
    focus,
    look,
    look_together,
    names_in,
    one_document_each,
    shared_words,
    speak,
)


def only(feature, weight=1.0):
    """Weights of which one isn't 0."""
    return [weight * (n == feature) for n in range(FEATURES)]


def by_similarity(bias: float = 0.0, beside: float = 0.2) -> dict:
    """A confidence that is a document's similarity above the others'."""
    shape = {"mean": [0.0] * FEATURES, "scale": [1.0] * FEATURES, "weights": only(1)}
    return shape | {
        "usual": 0.0,
        "bias": bias,
        "rivals": 0.0,
        "beside": beside,
        "words": [0.0, 0.0, 1.0],
        "together": None,
    }


class Finder:
    """An evidence reader that finds the first word of `words` that a document has."""

    def __init__(self, *words: str, odds: float = 5.0):
        self.words, self.odds, self.asked = words, odds, []

    def find(self, asked):
        self.asked += asked
        return [self.one(docs) for _, docs in asked]

    def one(self, docs):
        there = [(w, n) for w in self.words for n, doc in enumerate(docs) if w in doc["content"].split()]
        said = [docs[n]["content"] for _, n in there[:1]]
        return Evidence(*there[0], *said, -0.1, self.odds) if there else None


@pytest.mark.parametrize(
    ("question", "names", "words"),
    [
        ("What is the capital of Freedonia?", 1, 1),
        ("What is the capital of Sylvania in 1933?", 0, 1 / 3),
        ("what is freedonia's capital", None, 1),
        ("Who is it?", None, None),
    ],
)
def test_which_words_of_a_question_a_document_has(question, names, words):
    found = shared_words(question, {"title": "Freedonia", "content": "Its capital is Oldtown."})
    assert found == pytest.approx([math.nan if x is None else x for x in (names, words)], nan_ok=True)


def words(engine, views) -> list[str]:
    return [answer for answer, _ in answer_views(engine, views, 4, 9)]


def test_of_a_document_only_the_closest_sentences_are_read_in_their_order():
    talk = conversation("River?", "It is one. It is two. It is three.")
    talk["messages"][0]["documents"][0]["closest"] = ["It is three.", "It is one."]
    [view] = one_document_each(talk)
    assert view["messages"][0]["documents"][0]["content"] == "It is one. It is three."


def test_reading_together_takes_more_sentences():
    talk = conversation("River?", "It is one. It is two. It is three. It is four. It is five.")
    talk["messages"][0]["documents"][0]["closest"] = [f"It is {n}." for n in ("four", "two", "one", "five")]
    engine = make_engine(sequence_len=256)
    engine.model.evidence = Finder("four")
    answer_together(engine, [talk])
    [(_, [doc])] = engine.model.evidence.asked
    assert doc["content"] == "It is one. It is two. It is four."
    [view] = one_document_each(talk)
    assert view["messages"][0]["documents"][0]["content"] == "It is two. It is four."


def test_the_sentence_with_the_evidence_is_read_too():
    talk = conversation("River?", "It is one. It is two. It is three.  It is four.")
    talk["messages"][0]["documents"][0]["closest"] = ["It is three.", "It is one."]
    for text, sentence, read in (
        ("two", "It is two.", "It is two. It is three."),
        ("two", "T1. It is two.", "It is two. It is three."),  # a title that ends no sentence
        ("It", "It is four.", "It is three. It is four."),
        ("three", "It is three.", None),
        ("no", "It is no.", None),
    ):
        [view] = one_document_each(talk, [Evidence(text, 0, sentence, -0.1, 2.0)])
        assert view["messages"][0]["documents"][0]["content"] == (read or "It is one. It is three.")
        assert view["evidence"] == {"text": text, "logprob": -0.1, "number": 1}


def test_what_an_evidence_reader_finds_counts_and_goes_with_its_document():
    engine = make_engine(sequence_len=256)
    talk = conversation("River?", "a one", "the two")
    talk["messages"].insert(1, {"role": "retrieval", "query": "hop", "documents": [Document("3", "T3", "two and one")]})
    engine.model.evidence, known = Finder("two", "one"), {}
    [(views, features)] = look(engine, [talk], known=known)
    assert [view["evidence"] for view in views] == [
        {"text": t, "logprob": -0.1, "number": n} for n, t in enumerate(("one", "two", "two"), 1)
    ]
    assert features[:, 6].tolist() == [5.0] * 3
    look(engine, [talk], known=known)
    assert len(engine.model.evidence.asked) == 3  # read once
    engine.model.confidence = by_similarity(bias=1.0) | {"weights": only(6), "words": [0.0, 0.0, -1.0]}
    assert answer_each(engine, [talk], max_tokens=9)[0] == ["one. [1] Or, by another document: two. [2]"]


def test_names_and_words_count_in_the_document_and_in_the_sentence_with_the_evidence():
    engine = make_engine(sequence_len=256)
    talk = conversation("How long is the border of Freedonia?", "It borders Freedonia. Its border is 9 km long.")
    engine.model.evidence = SimpleNamespace(
        find=lambda asked: [Evidence("9 km", 0, "Its border is 9 km long.", -0.1, 5.0)] * len(asked)
    )
    [(_, features)] = look(engine, [talk])
    assert features[0, 2:7].tolist() == [1, 2 / 2, 0, 1 / 2, 5.0] and np.isnan(features[0, 7])  # no name in the title
    talk["messages"][0]["documents"][0]["title"] = (
        "Freedonia - Borders"  # the first of its two names is in the question
    )
    assert look(engine, [talk])[0][1][0, 7] == 1 / 2
    engine.model.evidence = SimpleNamespace(find=lambda asked: [None] * len(asked))
    [(_, features)] = look(engine, [talk])
    assert features[0, 2:4].tolist() == [1, 1] and np.isnan(features[0, 4:8]).all() and features[0, 8] == 1
    for question, every in (("How long is the border of Freedonia with Sylvania?", 0), ("how long is it?", math.nan)):
        talk["messages"][-1]["content"] = question
        assert look(engine, [talk])[0][1][0, 8] == pytest.approx(every, nan_ok=True)  # has it all the names?


def test_the_closest_sentences_are_looked_at_a_second_time():
    engine, shown = make_engine(sequence_len=256), []

    class Counter(Finder):  # the more it reads, the less sure it is
        def one(self, docs):
            shown.append(docs[0]["content"])
            return Evidence("five", 0, "It is five.", -0.1, -float(len(docs[0]["content"])))

    engine.model.evidence = Counter()
    text = "It is one. It is two. It is three. It is four. It is five."
    talk = conversation("How many?", text, "It is five.")
    talk["messages"][0]["documents"][0]["closest"] = ["It is three.", "It is one.", "It is two.", "It is four."]
    [(_, features)] = look(engine, [talk])
    near = "It is one. It is three. It is five."
    assert shown == [text, "It is five.", near]  # what has no closest sentences is the same again
    assert features[:, [6, 9]].tolist() == [[-len(text), -len(near)], [-len("It is five.")] * 2]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_language_model_is_asked_only_where_its_vote_counts(weight, monkeypatch):
    engine, scored = make_engine(sequence_len=256), []
    score = engine.score_batch
    monkeypatch.setattr(engine, "score_batch", lambda ids, *a: scored.extend(ids) or score(ids, *a))
    engine.model.confidence = by_similarity() | {"weights": [weight, 1.0] + [0.0] * (FEATURES - 2)}
    [(_, features)] = look(engine, [conversation("River?", "a b", "c")])
    assert len(scored) == (2 if weight else 0) and np.isnan(features[:, 0]).all() == (not weight)


def test_what_is_said_are_the_words_that_are_rather_to_be_trusted():
    engine = make_engine(sequence_len=256)
    found = lambda text, n: {"evidence": {"text": text, "logprob": -0.4, "number": n}}
    heard = [(conversation("River?", "It is one.") | found("It", 4), 1.0), (conversation("River?", "two"), 0.5)]
    said = [("one. [4]", -0.5), ("two. [5]", -0.1)]
    for words, quote, answer in (
        ([1.0, 0.0, 0.4], True, "It. [4] Or, by another document: two. [5]"),
        ([1.0, 0.0, 0.4], False, "one. [4] Or, by another document: two. [5]"),
        ([1.0, 0.0, 0.6], True, "one. [4] Or, by another document: two. [5]"),
        ([0.0, 1.0, 0.3], True, "It. [4] Or, by another document: two. [5]"),
    ):
        engine.model.confidence = by_similarity() | {"words": words}
        assert speak(engine, heard, said, quote) == answer
    heard[0][0]["evidence"]["text"] = "It [7]"  # a footnote
    assert speak(engine, heard[:1], [("one. [4]", -9.0)], True) == "It. [4]"
    views = [view for view, _ in heard]
    assert [text == "" for text, _ in answer_views(engine, views, 2, 9)] == [True, False]  # it would not be heard
    assert all(text for text, _ in answer_views(engine, views, 2, 9, quote=False))
    engine.model.confidence = None
    assert speak(engine, heard[:1], said[:1], True) == "one. [4]"


def test_two_by_two_documents_answer_by_the_evidence_and_who_leads_to_it_is_cited():
    engine = make_engine(sequence_len=256)
    talks = [
        conversation(
            "What is the river of Oldtown's country?", "Oldtown lies in Freedonia", "none", "of Freedonia the Rill"
        ),
        conversation("What is the river of Freedonia?", "Freedonia is old", "of Freedonia the Rill"),
        conversation("River?", "none", "nothing"),
        conversation("Hi"),
    ]
    own = engine.answer_batch(talks, max_tokens=9, quote=True)
    assert answer_together(engine, talks, max_tokens=9) == own
    engine.model.evidence = finder = Finder("Rill")
    answers = ["Rill. [1][3]", "Rill. [2]", ABSTENTION, own[3]]
    assert answer_together(engine, talks, max_tokens=9) == answers
    assert [[doc["number"] for doc in docs] for _, docs in finder.asked] == [[1, 2], [1, 3], [2, 3], [1, 2], [1, 2]]
    assert engine.model.generate_from_conversation(talks[1], read="together", max_tokens=9) == answers[1]
    finder.odds = -0.5
    assert answer_together(engine, talks[:1], max_tokens=9) == [ABSTENTION]
    assert answer_together(engine, talks[:1], max_tokens=9, quote=False) == engine.answer_batch(talks[:1], max_tokens=9)


def test_of_what_two_documents_say_the_surest_counts():
    engine = make_engine(sequence_len=256)
    engine.model.evidence = finder = Finder("Rill", "Dan")
    talk = conversation("What is the river of Freedonia?", "the Dan", "Freedonia is old", "the Rill")
    sure = {"Rill": 1.0, "Dan": 2.0}
    find = finder.find
    finder.find = lambda asked: [e and replace(e, odds=sure[e.text]) for e in find(asked)]
    assert answer_together(engine, [talk], max_tokens=9) == ["Dan. [1][2]"]
    sure["Rill"] = 3.0
    assert answer_together(engine, [talk], max_tokens=9) == ["Rill. [3]"]


def test_who_leads_to_the_answer_speaks_for_two_documents():
    engine = make_engine(sequence_len=256)
    engine.model.evidence = Finder("Rill", "Dan")
    talk = conversation("What is the river of Oldtown's country?", "the Dan", "Oldtown in Freedonia", "the Rill")
    for doc, title in zip(talk["messages"][0]["documents"], ("Sylvania", "Oldtown", "Freedonia")):
        doc["title"] = title
    [(texts, found, features)] = look_together(engine, [talk])
    assert [[doc["number"] for doc in docs] for docs in texts] == [[1, 2], [1, 3], [2, 3]]
    assert [e.text for e in found] == ["Dan", "Rill", "Rill"]
    # odds and similarity of pairs aren't known; "oldtown" of the question's names; river, oldtown, country; ...
    assert np.isnan(features[:, :2]).all() and features[:, 2].tolist() == [1, 0, 1]
    assert features[:, 3] == pytest.approx([1 / 3, 0, 1 / 3])
    assert np.isnan(features[:, 9]).all()  # they aren't looked at twice
    assert features[:, 4:9].tolist() == [[0, 0, 5.0, 0, 1], [0, 0, 5.0, 0, 0], [0, 0, 5.0, 1, 1]]  # Oldtown tells
    shape = by_similarity() | {"weights": only(7), "bias": -0.5}
    alone = by_similarity() | {"weights": only(6), "words": [0.0, 0.0, -1.0]}
    engine.model.confidence = alone | {"bias": -4.9, "beside": 9.0, "together": shape}  # of one alone: 0.1, of two 0.5
    assert answer_together(engine, [talk], max_tokens=9) == ["Rill. [2][3]"]
    engine.model.confidence["bias"] = -4.0  # of one alone: 1
    assert answer_together(engine, [talk], max_tokens=9) == answer_each(engine, [talk], max_tokens=9)[0] == ["Dan. [1]"]
    engine.model.confidence["bias"], shape["bias"] = -5.5, -1.5
    assert answer_together(engine, [talk], max_tokens=9) == [ABSTENTION]


def test_a_lone_document_is_weighed_alone_and_one_without_a_title_too():
    engine, pair = make_engine(sequence_len=256), by_similarity(bias=9.0)
    engine.model.evidence = Finder("Rill", "two")
    alone = by_similarity(bias=-1.0) | {"words": [0.0, 0.0, -1.0]}
    engine.model.confidence = alone | {"together": {k: v for k, v in pair.items() if k not in ("words", "together")}}
    talk, both = conversation("River?", "the Rill"), conversation("River?", "the Rill", "two")
    for doc in (talk["messages"][0]["documents"] + both["messages"][0]["documents"])[:2]:
        doc["title"] = None
    assert answer_together(engine, [talk, both], max_tokens=9) == [ABSTENTION, "Rill. [1]"]


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("What is the capital of Chad?", "chad"),
        ("What is the capital of Chad? Just the answer.", "chad"),
        ("Thanks. Where is Mt. Everest?", "mt everest"),
        ("Mt. Everest: how high is it?", "everest"),
        ('"Excuse me!" Is St. John\'s in Antigua?', "st john antigua"),
        ("A quick question: Describe the U.S. Virgin Islands in 1990", "u s virgin islands 1990"),
        ("Kenya: area?", ""),
        ("WHERE IS CHAD?", ""),
    ],
)
def test_a_questions_names_are_its_capitalised_words_that_begin_no_sentence(question, names):
    assert names_in(question) == set(names.split())


def test_a_titles_names_are_its_capitalised_words():
    assert names_in("Chad: Land. The area", title=True) == {"chad", "land"}


def test_more_words_are_right_than_wrong_from_there_on():
    rng = np.random.default_rng(0)
    sure = rng.uniform(-2, 0, (4000, 2))
    right = rng.uniform(size=4000) < 1 / (1 + np.exp(-6 * (sure[:, 0] + 0.5 * sure[:, 1] + 1.2)))
    assert fit_words(sure, right) == pytest.approx([6, 3, 7.2], rel=0.15)
    assert fit_words([*sure, (-math.inf, 0)], [*right, True]) == fit_words(sure, right)  # where nothing was said
    for all_right in (True, False):
        assert (np.dot(fit_words([(-1, 0), (-2, 1)], [all_right] * 2), (-1, 0, 1)) > 0) == all_right


def test_words_that_are_surer_where_they_are_worse_tell_nothing():
    rng = np.random.default_rng(0)
    sure = rng.uniform(-2, 0, (4000, 2))
    right = rng.uniform(size=4000) < 1 / (1 + np.exp(4 * sure[:, 0] + 3 * sure[:, 1] + 6))
    own, evidence, bias = fit_words(sure, right)
    assert own == 0 and evidence < -1 and bias < 0
    believed = 1 / (1 + np.exp(-(evidence * sure[:, 1] + bias)))
    assert believed.mean() == pytest.approx(right.mean(), abs=0.01)  # with the bias of both, it would be far off


def test_alone_a_document_keeps_its_number_and_its_question():
    talk = conversation("And the river?", "one", "two")
    talk["messages"].insert(1, {"role": "retrieval", "query": "hop", "documents": [Document("3", "T3", "three")]})
    views = [TOK.decode(TOK.render_conversation(view)[0]) for view in one_document_each(talk)]
    assert [v.partition("<|doc_start|>")[2].partition("<|doc_end|>")[0] for v in views] == [
        " [1] T0\n one", " [2] T1\n two", " [3] T3\n three"]  # fmt: skip
    assert all(v.count("<|retrieval_start|>") == 1 and " And the river?<|user_end|>" in v for v in views)
    assert "<|retrieval_start|> hop<|doc_start|>" in views[2]
    assert one_document_each(conversation("Hi")) == []


def test_the_answer_comes_from_the_document_that_makes_abstaining_least_probable():
    engine = make_engine(sequence_len=256)
    several = [
        conversation(q, *docs) for q in ("River?", "Capital?") for docs in (["a b", "c", "The river."], ["x", "y"])
    ]
    several += [conversation("Hi"), conversation("Alone?", "one")]
    refusal = TOK.encode_text(ABSTENTION)
    for talk, [(chosen, score)] in zip(several, focus(engine, several, max_tokens=20)):
        if not (views := one_document_each(talk)):
            assert (chosen, score) == (talk, math.inf)
            continue
        unsure = [sum(engine.score(engine.prompt(view, 20), refusal)) for view in views]
        assert chosen == views[unsure.index(min(unsure))] and len(set(unsure)) == len(unsure)
        assert score == pytest.approx(-min(unsure), rel=1e-2)  # log-odds of something rare


def test_calibrated_it_abstains_where_the_confidence_is_too_low():
    engine = make_engine(sequence_len=256)
    talks = [conversation(q, *docs) for q in ("River?", "Capital?") for docs in (["a b", "c"], ["x", "y"])]
    for k, talk in enumerate(talks):  # the second document is the likelier one, in two of the talks likely enough
        for doc, similarity in zip(talk["messages"][0]["documents"], (0.1, k / 4 + 0.2)):
            doc["similarity"] = similarity
    engine.model.confidence = by_similarity(bias=-0.5, beside=9)
    kept, scores = answer_each(engine, [*talks, conversation("Hi")], max_tokens=9)
    assert scores == pytest.approx([*(k / 4 + 0.2 - 0.1 / 1.5 - 0.5 for k in range(4)), math.inf])
    chosen = [heard[0][0] for heard in focus(engine, talks, 9)]
    assert kept[:2] == [ABSTENTION] * 2 and kept[2:4] == words(engine, chosen[2:])
    assert ABSTENTION not in kept[2:]  # the last has no document: the model is asked
    assert [engine.model.generate_from_conversation(t, max_tokens=9) for t in talks] == kept[:4]


def test_what_the_retriever_thinks_may_decide():
    engine = make_engine(sequence_len=256)
    talk = conversation("River?", "a b", "c", "d")
    for doc, similarity in zip(talk["messages"][0]["documents"], (0.1, None, 0.9)):
        doc["similarity"] = similarity
    [(_, features)] = look(engine, [talk])
    assert features[:, 1] == pytest.approx([0.1, math.nan, 0.9], nan_ok=True)
    by = lambda weight: by_similarity(beside=9) | {"weights": only(1, weight)}
    assert confidence(features, by(1)) == pytest.approx([0.1 - 0.9 / 1.5, 0, 0.9 - 0.1 / 1.5])  # unknown is average
    assert confidence(features[:1], by(1) | {"usual": 0.3}) == pytest.approx([0.1 - 0.3])  # alone
    for weight, number in ((1, 3), (-1, 1)):
        engine.model.confidence = by(weight)
        [[(chosen, _)]] = focus(engine, [talk])
        assert [d["number"] for m in chosen["messages"] for d in m.get("documents", ())] == [number]


def test_the_weights_are_learned_from_what_tells_right_documents_from_others(monkeypatch):
    rng = np.random.default_rng(0)

    def documents(n, gold):
        """Features of which the first is noise, the second tells, and the third is unknown."""
        mask = np.arange(n) == gold
        unknown = np.full(n, math.nan)
        return np.stack([rng.normal(size=n), mask * 2 + rng.normal(size=n) / 4, *[unknown] * (FEATURES - 2)], 1), mask

    known = [documents(4, i % 4) for i in range(60)]
    unknown = [documents(4, -1)[0] for _ in range(60)]
    fitted = fit_confidence(known, unknown, 0.86)
    assert fitted["weights"][1] > 1 and fitted["weights"][0] == 0 == fitted["weights"][2]
    against = [(np.hstack([-f[:, 1:2], f[:, 1:]]), mask) for f, mask in known]
    assert fit_confidence(against, unknown, 0.86)["weights"][0] == 0  # who is surer elsewhere has no say
    monkeypatch.setattr("nanochat.reader.FAINT", -math.inf)
    assert 0 < abs(fit_confidence(known, unknown, 0.86)["weights"][0]) < 0.05  # too faint to be worth a reading
    assert fit_confidence(against, unknown, 0.86)["weights"][0] < -0.05
    best = lambda f: confidence(f, fitted)
    assert np.mean([best(f).argmax() == mask.argmax() and best(f).max() > 0 for f, mask in known]) > 0.95
    assert np.mean([best(f).max() <= 0 for f in unknown]) == pytest.approx(0.86, abs=0.02)
    strict = fit_confidence(known, unknown, abstain=1.0)
    assert np.mean([confidence(f, strict).max() <= 1e-9 for f in unknown]) == 1
    assert fitted == json.loads(json.dumps(fitted))


def test_what_an_earlier_version_learned_is_passed_over(capsys):
    now = by_similarity() | {"together": {k: v for k, v in by_similarity().items() if k not in ("words", "together")}}
    assert (
        check_confidence(now) == now
        and check_confidence(by_similarity()) == by_similarity()
        and check_confidence(None) is None
        and not capsys.readouterr().out
    )
    without = {name: value for name, value in now.items() if name != "together"}
    for old in (without, now | {name: [0.0] * 5 for name in ("mean", "scale", "weights")}):
        assert check_confidence(old) is None and "calibrate again" in capsys.readouterr().out


def test_among_many_documents_about_the_thing_asked_one_has_to_be_more_convincing():
    rng = np.random.default_rng(1)

    def documents(named, gold):
        """Of those that have the question's names, a wrong one's evidence is as good as it chances to be."""
        rows, mask = np.full((5, FEATURES), math.nan), np.arange(5) == gold
        rows[:, 2], rows[:, 6] = np.arange(5) < named, rng.normal(size=5) + 5 * mask - 9 * (np.arange(5) >= named)
        return rows, mask

    known = [documents(named, 0) for named in rng.integers(1, 6, 300)]
    unknown = [documents(named, -1)[0] for named in rng.integers(1, 6, 2000)]
    fitted = fit_confidence(known, unknown, 0.86)
    assert fitted["rivals"] > 0

    def refused(fitted, named):
        return np.mean([confidence(f, fitted).max() <= 0 for f in unknown if f[:, 2].sum() == named])

    assert all(0.8 < refused(fitted, named) < 0.92 for named in (1, 2, 5))
    flat = fitted | {"rivals": 0.0, "bias": fitted["bias"] - fitted["rivals"] * math.log(3)}
    assert refused(flat, 1) - refused(flat, 5) > 0.1  # one bar is too high here and too low there
    alone = documents(1, 0)[0][:1]
    assert confidence(alone, fitted) == confidence(alone, fitted | {"rivals": 9.0})
    some = documents(5, 0)[0] * np.where(np.arange(FEATURES) == 2, 0.5, 1)  # of each half of the names
    assert (confidence(some, fitted) == confidence(some, fitted | {"rivals": 9.0})).all()
    assert fit_confidence(known, unknown, 0.86, count_rivals=False)["rivals"] == 0
    fewer = [np.where(np.arange(FEATURES) == 6, f - 3 * f[:, 2:3].sum(), f) for f in unknown]  # the more, the worse
    assert fit_confidence(known, fewer, 0.86)["rivals"] == 0


def test_what_nothing_answers_teaches_the_weights_but_sets_no_bar():
    rng = np.random.default_rng(3)

    def documents(odds, sentence, gold):
        """Two: the first may be the right one; its evidence, and how much the sentence has of the question."""
        rows = np.full((2, FEATURES), math.nan)
        rows[:, 6], rows[:, 4] = rng.normal(size=2) + [odds, 0], rng.normal(size=2) + [sentence, 0]
        return rows, np.arange(2) == gold

    known = [documents(4, 2, 0) for _ in range(300)]
    unknown = [documents(0, 0, -1)[0] for _ in range(300)]
    never = [documents(4, 0, -1) for _ in range(300)]  # only the sentence tells
    before, after = (fit_confidence(asked, unknown, 0.9) for asked in (known, known + never))
    refused = lambda fitted, seen: np.mean([confidence(f, fitted).max() <= 0 for f in seen])
    assert refused(before, unknown) == refused(after, unknown) == 0.9
    assert refused(after, [f for f, _ in never]) > refused(before, [f for f, _ in never]) + 0.1
    others = [confidence(f, after)[1] for f, _ in known]
    assert np.mean(np.array(others) <= after["beside"]) == pytest.approx(0.95, abs=0.01)


def test_how_many_rivals_there_are_is_not_put_down_to_what_rivals_look_like():
    rng = np.random.default_rng(2)

    def documents(n, gold):
        """All have the names; where they are many the fifth feature is high, and tells none of them from another."""
        rows, mask = np.full((n, FEATURES), math.nan), np.arange(n) == gold
        rows[:, 2], rows[:, 6] = 1, rng.normal(size=n) + 3 * mask
        rows[:, 4] = (n > 1) + rng.normal(size=n) / 9
        return rows, mask

    known = [documents(n, 0) for n in (1, 5) * 150]
    unknown = [documents(5, -1)[0] for _ in range(600)]
    weights = lambda **how: np.array(fit_confidence(known, unknown, 0.86, **how)["weights"])
    assert abs(weights()[4]) < 0.5 * abs(weights(count_rivals=False)[4])


@pytest.mark.parametrize(
    "talk",
    [
        {},
        {"messages": [{"role": "retrieval"}, {"role": "user", "content": "Q?"}]},
        {"messages": [{"role": "retrieval", "documents": ["text"]}]},
        {"messages": [{"role": "retrieval", "documents": [{"content": "x", "number": "3"}]}]},
        {"messages": [{"role": "retrieval", "documents": [{"content": "x", "similarity": "high"}]}]},
    ],
)
def test_what_is_no_conversation_is_refused_before_it_is_read(talk):
    with pytest.raises(UserError):
        answer_each(make_engine("T"), [talk])


@pytest.mark.parametrize("read", ["each", "together"])
def test_the_model_itself_answers_after_reading_one_by_one_or_together(read):
    engine = make_engine(sequence_len=256)
    talks = [conversation(q, "one two", "three", "x y z") for q in ("River?", "Capital?", "Where is it?")]
    alone = [heard[0][0] for heard in focus(engine, talks, 9)]
    each = words(engine, alone)
    together = engine.answer_batch(talks, max_tokens=9, quote=True)
    expected = each if read == "each" else together
    assert [engine.model.generate_from_conversation(c, read=read, max_tokens=9) for c in talks] == expected
    assert each != together
    with pytest.raises(UserError, match="each"):
        engine.model.generate_from_conversation(talks[0], read="both")


# ----------------------------------------------------------------------------------------------------------------------
# Several documents that may answer


def sure(*documents: tuple[str, float, str]) -> dict:
    """A conversation over documents (content, similarity, date)."""
    talk = conversation("River?", *[content for content, _, _ in documents])
    for doc, (_, similarity, date) in zip(talk["messages"][0]["documents"], documents):
        doc |= {"similarity": similarity} | ({"date": date} if date else {})
    return talk


def numbers(heard) -> list[int]:
    return [d["number"] for view, _ in heard for m in view["messages"] for d in m.get("documents", ())]


def test_other_documents_are_heard_if_they_are_as_sure_the_newest_first():
    engine = make_engine(sequence_len=256)
    engine.model.confidence = by_similarity(bias=-0.1, beside=0.03)
    talks = [
        sure(("one", 0.9, ""), ("two", 0.6, ""), ("three", 0.8, "")),
        sure(("one", 0.9, "2015"), ("two", 0.75, "2025-01"), ("three", 0.3, "2026")),
        sure(("one", 0.9, "2015"), ("two", 0.75, "")),
        sure(("one", 0.1, "2015"), ("two", 0.12, "2016")),
        sure(("one", 0.9, "31.31.2099"), ("two", 0.85, "2015"), ("three", 0.88, "2020-01")),
    ]
    assert [numbers(heard) for heard in focus(engine, talks)] == [[1, 3], [2, 1], [1, 2], [2], [3, 2, 1]]
    answers, scores = answer_each(engine, talks, max_tokens=9)
    assert scores == pytest.approx([0.24, 0.38, 0.3, -0.14 / 3, 0.108]) and answers[3] == ABSTENTION
    for talk, answer in zip(talks[:3], answers):
        [heard] = focus(engine, [talk])
        first, second = words(engine, [view for view, _ in heard])
        dates = [view["messages"][0]["documents"][0].get("date", "") for view, _ in heard]
        assert answer == first + also_said((first, dates[0]), [(second, dates[1])])


def test_what_was_read_once_is_not_read_again(monkeypatch):
    engine, known, read = make_engine(sequence_len=256), {}, []
    score = engine.score_batch
    monkeypatch.setattr(engine, "score_batch", lambda prompts, *a: read.extend(prompts) or score(prompts, *a))
    talks = [conversation("River?", "one", "two"), conversation("River?", "one", "three")]
    first = [features for _, features in look(engine, talks, known=known)]
    assert len(read) == 3 == len(known)
    again = [features for _, features in look(engine, talks, known=known)]
    assert len(read) == 3 and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, again))


def test_wrong_documents_seldom_speak_beside_right_ones():
    rng = np.random.default_rng(1)
    mask = np.arange(4) == 0
    known = [(np.stack([mask * 4 + rng.normal(size=4)] * FEATURES, 1), mask) for _ in range(200)]
    fitted = fit_confidence(known, [f[1:] for f, _ in known], 0.86)
    beside = [(confidence(f, fitted)[1:] > fitted["beside"]).any() for f, _ in known]
    assert np.mean(beside) == pytest.approx(1 - BESIDE, abs=0.005)
    assert np.mean([confidence(f, fitted)[0] > fitted["beside"] for f, _ in known]) > 0.7
