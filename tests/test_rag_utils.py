"""Metrics and the reward, on cases labelled by hand."""

from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.rag_utils import (
    ABSTENTION,
    all_gold_at_k,
    also_said,
    answer_f1,
    bootstrap_interval,
    citation_precision_recall,
    compute_rag_reward,
    document_text,
    exact_match,
    extract_citations,
    hallucination,
    is_abstention,
    is_supported,
    judge_retrieval,
    main_answer,
    mean_with_intervals,
    mrr,
    ndcg_at_k,
    normalize_answer,
    recall_at_k,
    statements,
    strip_citations,
)

DOCS = [
    {
        "id": "at",
        "title": "Austria - land",
        "content": "The total area of Austria is 83,871 sq km. Its capital is Vienna.",
    },
    {"id": "pe", "title": "Peru - land", "content": "The lowest point is -34 m. GDP: $268.2 billion (2023 est.)."},
    {"id": "ht", "title": "Haiti", "content": "The capital is Port-au-Prince; Washington, D.C. is far away."},
]


def test_a_document_is_shown_with_number_title_and_content():
    assert document_text(DOCS[2], 3).startswith("[3] Haiti\nThe capital is")


def test_citations_are_found_once_each_in_order():
    assert extract_citations("Vienna. [2] Also Graz [1][2], and [3, 4].") == [2, 1, 3, 4]
    assert extract_citations("In 1990 [sic] a[] [x1]") == []
    assert strip_citations("Vienna. [2] Also Graz [1][2], and [3, 4].") == "Vienna. Also Graz, and."


@pytest.mark.parametrize(
    ("first", "others", "expected"),
    [
        (("Rome. [1]", ""), [], "Rome. [1]"),
        (("Rome. [1]", ""), [("rome. [3]", "")], "Rome. [1][3]"),
        (("Rome. [1]", ""), [("Turin. [2]", "")], "Rome. [1] Or, by another document: Turin. [2]"),
        (("Rome. [1]", "2025"), [("Turin. [2]", "")], "Rome. [1] Or, by another document: Turin. [2]"),
        (
            ("Rome. [1]", "2025"),
            [
                ("Rome. [3]", "2024"),
                ("Turin. [2]", "1862"),
                ("Milan. [5]", "1900"),
                ("Turin. [4]", "1861"),
                (ABSTENTION, ""),
            ],
            "Rome. [1][3] This is as of 2025. As of 1862: Turin. [2] As of 1900: Milan. [5]",
        ),
        (("Rome.", ""), [("Rome. [3]", ""), ("Turin.", "")], "Rome. [3] Or, by another document: Turin."),
        ((ABSTENTION, ""), [("Turin. [2]", "")], ABSTENTION),
    ],
)
def test_documents_that_agree_are_cited_and_others_quoted(first, others, expected):
    assert first[0] + also_said(first, others) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rome. [1][3] This is as of 2025. As of 1862: Turin. [2]", [("Rome.", [1, 3]), ("Turin.", [2])]),
        ("Rome. [1] Or, by another document: Turin. [2]", [("Rome.", [1]), ("Turin.", [2])]),
        ("Rome. Or, by another document: Turin. Or, by another document: Milan. [3]",
         [("Rome.", []), ("Turin.", []), ("Milan.", [3])]),
        ("Lima. [1] Cusco. [2] Quito.", [("Lima. Cusco. Quito.", [1, 2])]),
        ("[1][2] Rome.", [("Rome.", [1, 2])]),
        ("Rome", [("Rome", [])]),
        (ABSTENTION, [(ABSTENTION, [])]),
        ("", [("", [])]),
    ],
)  # fmt: skip
def test_an_answer_is_what_it_says_document_by_document(text, expected):
    assert statements(text) == expected and main_answer(text) == expected[0][0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (ABSTENTION, True),
        ("I don't know.", True),
        ("I don’t know based on the provided documents. [1]", True),
        ("i do not know", True),
        ("Vienna. I don't know more.", False),
        ("I don't knowingly lie", False),
        ("", False),
    ],
)
def test_an_abstention_is_recognised(text, answer):
    assert is_abstention(text) is answer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("83,871 sq km", "83871 square kilometers"),
        ("83,871 km²", "83,871 km2."),
        ("1.2 million", "1,200,000"),
        ("$268.2 billion", "US$268,200,000,000"),
        ("56%", "56 percent"),
        ("56.50%", "56.5 per cent"),
        ("The Hague", "hague [1]"),
        ("Port-au-Prince", "port au prince"),
        ("Washington, D.C.", "washington dc"),
        ("St. John's", "St John’s"),
        ("São Tomé", "Sao Tome"),
        ("−5.2%", "-5.2 percent"),
    ],
)
def test_answers_that_mean_the_same_are_equal_once_normalised(a, b):
    assert normalize_answer(a) == normalize_answer(b) != ""


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("-28 m", "28 m"),
        ("3.5", "35"),
        ("5 km", "5 m"),
        ("1.2 million", "1.2 billion"),
        ("-$5", "$5"),
        ("$5", "€5"),
        ("1,2", "12"),
        ("1,200", "1,20"),
        ("1.10.3", "1.1.3"),
        ("A", "The"),
        ("Vitamin A", "Vitamin"),
        ("C", "C++"),
        ("C#", "C++"),
        ("कि", "का"),
        ("か", "が"),
    ],
)
def test_answers_that_differ_stay_different(a, b):
    assert normalize_answer(a) != normalize_answer(b)


@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing_for_words(text):
    words = normalize_answer("".join(c if c.isalpha() and c.isascii() else " " for c in text))
    assert normalize_answer(words) == words


@given(st.text(max_size=120))
def test_any_text_can_be_judged(text):
    assert exact_match(text, ["Vienna"]) in (0.0, 1.0)
    assert 0.0 <= answer_f1(text, ["Vienna", text or "x"]) <= 1.0
    assert hallucination(text, DOCS) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("Vienna. [1]", ["Vienna"], 1, 1),
        ("the capital is Vienna", ["Vienna"], 0, 2 * (1 / 3) / (1 / 3 + 1)),
        ("City of Vienna", ["Wien", "Vienna"], 0, 0.5),
        ("83871", ["83,871 sq km"], 1, 1),
        ("83,871 sq mi", ["83,871 sq km"], 0, 2 / 3),
        ("83,871 sq km", ["83871"], 0, 0.5),
        ("5 million", ["$5 million"], 1, 1),
        ("$5 million", ["€5 million"], 0, 0),
        ("$5", ["5"], 0, 0),
        ("A", ["A"], 1, 1),
        ("Graz", ["Vienna"], 0, 0),
        ("", ["Vienna"], 0, 0),
        (ABSTENTION, ["the documents"], 0, 0),
        (ABSTENTION, [], 1, 1),
        (ABSTENTION, [ABSTENTION], 1, 1),
        ("Vienna", [ABSTENTION], 0, 0),
    ],
)
def test_answers_are_scored_as_by_hand(prediction, answers, em, f1):
    assert exact_match(prediction, answers) == em
    assert answer_f1(prediction, answers) == pytest.approx(f1)


def test_an_answer_is_supported_where_its_words_stand_together():
    assert is_supported("83871 square kilometers", DOCS) and is_supported("Port-au-Prince [3]", DOCS)
    assert is_supported("Peru - land", DOCS) and is_supported("-34 m", DOCS)
    assert is_supported("268,200,000,000", DOCS) and not is_supported("€268.2 billion", DOCS)
    gallery = [{"id": "g", "title": "", "content": "It hangs in gallery A on a wall. Once Upon A Time is a play."}]
    assert all(is_supported(words, gallery) for words in ("gallery A", "A", "wall", "once upon a time"))
    assert not is_supported("Vien", DOCS) and not is_supported("34 m", DOCS) and not is_supported("", DOCS)
    assert not is_supported("land the total", DOCS)  # title and content don't run together
    assert (hallucination("Vienna", DOCS), hallucination("Graz", DOCS), hallucination(ABSTENTION, DOCS)) == (0, 1, 0)
    assert hallucination("Vienna", []) == 1


@pytest.mark.parametrize(
    ("cited", "gold", "precision", "recall"),
    [
        ([1], ["at"], 1, 1),
        ([1, 2], ["at"], 0.5, 1),
        ([1], ["at", "pe"], 1, 0.5),
        ([1, 2], ["at", "pe"], 1, 1),
        ([9], ["at"], 0, 0),
        ([], ["at"], 0, 0),
        ([], [], 1, 1),
        ([1], [], 0, 0),
    ],
)
def test_citations_are_scored_as_by_hand(cited, gold, precision, recall):
    assert citation_precision_recall(cited, DOCS, gold) == (precision, recall)


def test_retrieval_is_scored_as_by_hand():
    ranked, gold = ["x", "a", "y", "b"], ["a", "b"]
    assert [recall_at_k(ranked, gold, k) for k in (1, 2, 4)] == [0, 0.5, 1]
    assert [all_gold_at_k(ranked, gold, k) for k in (2, 4)] == [0, 1]
    assert mrr(ranked, gold) == 0.5 and mrr(["x"], gold) == 0
    assert ndcg_at_k(ranked, gold, 4) == pytest.approx((1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3)))
    assert ndcg_at_k(["a", "b"], gold, 5) == 1 and ndcg_at_k(["a"], gold, 1) == 1
    row = mean_with_intervals([judge_retrieval(ranked, gold), judge_retrieval(["a", "b"], gold)])
    assert row["n"] == 2 and row["recall@1"] == 0.25 and row["mrr"] == 0.75 and row["mrr_lo"] <= 0.75 <= row["mrr_hi"]


def test_a_metric_is_averaged_over_the_answers_it_is_defined_for():
    row = mean_with_intervals([{"f1": 1.0}, {"f1": 0.0, "citation_recall": 0.5}])
    assert row["n"] == 2 and row["f1"] == 0.5 and row["citation_recall"] == row["citation_recall_lo"] == 0.5
    assert mean_with_intervals([]) == {"n": 0}


def test_the_bootstrap_interval_is_deterministic_and_of_the_right_width():
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    # the normal approximation gives 0.3 ± 1.96 · sqrt(0.3 · 0.7 / 1000) = 0.3 ± 0.028; 1000 resamples blur it a little
    assert low == pytest.approx(0.272, abs=0.006) and high == pytest.approx(0.328, abs=0.006)
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    assert all(x != x for x in bootstrap_interval([]))


def test_the_reward_is_what_the_weights_say():
    gold = ["at", "pe"]
    assert compute_rag_reward("Vienna", ["Vienna"], DOCS, gold, max_documents=6) == pytest.approx(0.6 + 0.3 + 0.05)
    assert compute_rag_reward("Vienna", ["Vienna"], DOCS[:1], gold, max_documents=4) == pytest.approx(
        0.6 + 0.15 + 0.075
    )
    assert compute_rag_reward("Graz", ["Vienna"], DOCS, gold) == pytest.approx(0.3)
    assert compute_rag_reward("city of Vienna", ["Vienna"], [], gold, soft=True) == pytest.approx(0.3)


def test_the_reward_cannot_be_gamed():
    # the answer's words in a document that isn't gold earn nothing for relevance
    assert compute_rag_reward("Vienna", ["Vienna"], DOCS[:1], ["other"], max_documents=1) == pytest.approx(0.6)
    # retrieving nothing is efficient only if the answer is right
    assert compute_rag_reward("Graz", ["Vienna"], [], ["at"]) == 0
    # abstaining pays on what can't be answered, and only there
    assert compute_rag_reward(ABSTENTION, ["Vienna"], [], ["at"]) == 0
    assert compute_rag_reward(ABSTENTION, [], [], []) == pytest.approx(1)
    assert compute_rag_reward("Vienna", [ABSTENTION], [], []) == 0
