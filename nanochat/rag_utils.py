"""Judging answers and retrieval: citations, abstention, answer and grounding metrics, retrieval metrics, the reward.

Nothing here needs a model, a judge or a network, and everything is deterministic. Documents are `Document` objects or
their JSON form; citation numbers count the documents shown, from 1, through all hops.

    answer_f1("Paris. [1]", ["Paris", "City of Paris"])                                       # 1.0
    hallucination("Lyon [1]", [{"id": "fr", "title": "France", "content": "Capital: Paris"}])  # 1.0
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from math import log2
from typing import Any

import numpy as np

ABSTENTION = "I don't know based on the provided documents."


def _get(doc: Any, name: str) -> Any:
    return doc.get(name, "") if isinstance(doc, dict) else getattr(doc, name)


def document_text(doc: Any, n: int) -> str:
    """A document as model and reader see it: "[n] Title", line break, content."""
    return f"[{n}] {_get(doc, 'title')}\n{_get(doc, 'content')}"


# ----------------------------------------------------------------------------------------------------------------------
# Citations and abstention

_CITATION = re.compile(r"\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")


def extract_citations(text: str) -> list[int]:
    """The numbers cited as [1], [1][2] or [1, 2], each once, in order of appearance."""
    numbers = (int(n) for group in _CITATION.findall(text) for n in group.split(","))
    return list(dict.fromkeys(numbers))


def strip_citations(text: str) -> str:
    """The text without its citations and the spaces before them."""
    return re.sub(r"\s*" + _CITATION.pattern, "", text).strip()


_DATED, _OTHER = "As of {}: ", "Or, by another document: "
_LEAD = re.compile(r"(?:^|\s+)(?:This is as of \S+\s+)?(?:As of \S+: |Or, by another document: )")


def also_said(first: tuple[str, str], others: Sequence[tuple[str, str]]) -> str:
    """What to append to an answer because of other documents' answers; all come as (answer with citations, date).

    Whoever says the same is cited, too; who says something else is quoted, with dates if both have one. Abstentions
    add nothing, and to one nothing is added.

    also_said(("Rome. [1]", "2025"), [("Rome. [3]", ""), ("Turin. [2]", "1862")])
    # "[3] This is as of 2025. As of 1862: Turin. [2]"
    """
    said = [strip_citations(first[0])]
    agree, differ, dated = "", "", ""
    for answer, date in () if is_abstention(first[0]) else others:
        words = strip_citations(answer)
        if is_abstention(answer) or any(same_answer(words, told) for told in said[1:]):
            continue
        if same_answer(words, said[0]):
            agree += "".join(f"[{n}]" for n in extract_citations(answer))
            continue
        said.append(words)
        if first[1] and date:
            dated = f" This is as of {first[1]}."
        differ += f" {_DATED.format(date) if first[1] and date else _OTHER}{answer}"
    return (" " if agree and not first[0].endswith("]") else "") + agree + dated + differ


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are one: equal once normalised, a missing unit aside."""
    return bool(exact_match(a, [b]) or exact_match(b, [a]))


def statements(text: str) -> list[tuple[str, list[int]]]:
    """An answer as what it says and cites, and what `also_said` has added to it.

    statements("Rome. [1][3] Or, by another document: Turin. [2]")  # [("Rome.", [1, 3]), ("Turin.", [2])]
    """
    return [(strip_citations(part), extract_citations(part)) for part in _LEAD.split(text)]


def main_answer(text: str) -> str:
    """What an answer says first, without citations: of documents that disagree, the newest or surest."""
    return statements(text)[0][0]


def is_abstention(text: str) -> bool:
    """True if the answer says that it doesn't know: the fixed sentence, or anything that begins as it does."""
    return re.match(r"i (?:dont|do not) know\b", normalize_answer(text)) is not None


# ----------------------------------------------------------------------------------------------------------------------
# Normalising answers

_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNITS = {
    "%": "percent", "per cent": "percent", "km²": "sq km", "km2": "sq km", "m²": "sq m", "m2": "sq m",
    "square kilometers": "sq km", "square kilometres": "sq km",
    "square kilometer": "sq km", "square kilometre": "sq km",
    "square miles": "sq mi", "square meters": "sq m", "square metres": "sq m",
    "kilometers": "km", "kilometres": "km", "kilometer": "km", "kilometre": "km",
    "meters": "m", "metres": "m", "meter": "m", "metre": "m", "years": "year",
}  # fmt: skip
_UNIT = re.compile(r"(?<![^\W\d_])(?:" + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True)) + r")(?!\w)")
_NUMBER = re.compile(  # a comma before three digits is part of it
    r"(?<![\w.])(\d+(?:,\d{3})+(?!\d)|\d+)((?:\.\d+)?)(?!\.?\d)(?:\s*(thousand|million|billion|trillion)\b)?"
)
_NAMED_UNITS = {*_UNITS.values(), "nm", "cm", "mm", "bbl", "bbl/day", "kwh", "deaths", "births"}
_SIGNS = "$€£¥"
_LETTER = re.compile(r"(?<=\w )A(?![\w'’]| [A-Z])")  # "in gallery A there", no article; a small capital stands for it
_MARKS = re.compile(rf"((?<=\w)[+#]+(?!\w)|[{_SIGNS}](?=\d))|(?<=\w)-|-(?![{_SIGNS}]?\d)|[^\w\s.-]|_")


@lru_cache(maxsize=20_000)  # evaluation and RL normalise the same passages again and again
def normalize_answer(text: str) -> str:
    """Text -> the form in which two answers are compared (SQuAD's, and numbers made equal that are).

    Citations, case, accents, articles before a word, punctuation and extra spaces go; "83,871 km²" and "83871 square
    kilometers" both give "83871 sq km"; "1.2 million" gives "1200000". What tells answers apart stays: a minus sign, a
    decimal point, "$5", "C++", and the vowel signs of scripts that write them as marks.
    """
    text = _LETTER.sub("\u1d00", strip_citations(text).replace("²", "2").replace("−", "-"))
    text = unicodedata.normalize("NFKD", text.casefold())
    text = re.sub("[\u0300-\u036f]", "", text)  # accents
    text = _NUMBER.sub(_plain_number, text.replace("us$", "$"))
    text = _UNIT.sub(lambda m: f" {_UNITS[m[0]]} ", text)
    text = re.sub(r"['’`´]|(?<!\d)\.|\.(?!\d)", "", text)  # D.C. -> dc, St. John's -> st johns, but 3.5
    text = _MARKS.sub(_kept_mark, text)  # Port-au-Prince -> three words, but -28
    text = re.sub(r"\b(?:a|an|the)\s+(?=\w)", " ", text)  # but not from "vitamin A"
    return " ".join(text.replace("\u1d00", "a").split())


def _plain_number(match: re.Match) -> str:
    digits, decimals, scale = match.groups()
    number = format(Decimal(digits.replace(",", "") + decimals).scaleb(_SCALES.get(scale, 0)), "f")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _kept_mark(match: re.Match) -> str:
    return match[0] if match[1] or unicodedata.category(match[0])[0] == "M" else " "


def is_unanswerable(answers: Sequence[str]) -> bool:
    """True if a question has no accepted answer but to abstain."""
    return all(is_abstention(answer) for answer in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals an accepted answer once both are normalised.

    A question without accepted answers (or whose accepted answer is to abstain) is answered by abstaining.
    A bare number also matches an accepted number with its unit: "83871" answers "83,871 sq km", and "5" answers "$5".
    Not the other way round, and a wrong unit doesn't match.
    """
    if is_unanswerable(answers) or is_abstention(prediction):
        return float(is_unanswerable(answers) and is_abstention(prediction))
    found = normalize_answer(prediction)
    accepted = {normalize_answer(answer) for answer in answers}
    for answer in list(accepted):
        number, _, unit = answer.partition(" ")
        if unit in {*_NAMED_UNITS, ""} and re.fullmatch(rf"-?[{_SIGNS}]?[\d.]+", number):
            accepted.add(_without_sign(number))
    return float(bool(found) and found in accepted)


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 against the accepted answer that fits best; 1.0 wherever `exact_match` is. Abstaining earns 0 or 1."""
    if is_unanswerable(answers) or is_abstention(prediction) or exact_match(prediction, answers):
        return exact_match(prediction, answers)
    found, best = Counter(normalize_answer(prediction).split()), 0.0
    for answer in answers:
        wanted = Counter(normalize_answer(answer).split())
        if shared := (found & wanted).total():
            best = max(best, 2 * shared / (found.total() + wanted.total()))
    return best


# ----------------------------------------------------------------------------------------------------------------------
# Grounding


def is_supported(answer: str, documents: Sequence[Any]) -> bool:
    """True if the normalised answer occurs, as whole words, in the title or content of one of the documents.

    A number without a currency's sign also where it has one.
    """
    wanted = normalize_answer(answer)
    told = [f" {normalize_answer(_get(doc, 'title'))} | {normalize_answer(_get(doc, 'content'))} " for doc in documents]
    return bool(wanted) and any(f" {wanted} " in text or f" {wanted} " in _without_sign(text) for text in told)


def _without_sign(text: str) -> str:
    return re.sub(rf"[{_SIGNS}](?=\d)", "", text)


def hallucination(prediction: str, documents: Sequence[Any]) -> float:
    """1.0 if the model answered and no document it was shown holds that answer."""
    return float(not is_abstention(prediction) and not is_supported(prediction, documents))


def citation_precision_recall(
    citations: Sequence[int], documents: Sequence[Any], gold_ids: Sequence[str]
) -> tuple[float, float]:
    """ALCE's citation precision and recall, with gold ids where ALCE asks an entailment model.

    Precision: the share of cited numbers that stand for a gold document (a number without a document is wrong).
    Recall: the share of all gold documents that are cited, shown or not. Without citations both are 0, without gold
    documents both are 1 if nothing is cited, else 0.
    """
    cited, gold = list(dict.fromkeys(citations)), set(gold_ids)
    if not gold or not cited:
        return (1.0, 1.0) if not gold and not cited else (0.0, 0.0)
    ids = [_get(documents[n - 1], "id") if 1 <= n <= len(documents) else None for n in cited]
    right = [i for i in ids if i in gold]
    return len(right) / len(cited), len(set(right)) / len(gold)


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval: `ranked` are the ids found, best first; `gold` the ids that answer the question (at least one)


def recall_at_k(ranked: Sequence[str], gold: Sequence[str], k: int) -> float:
    """The share of gold ids among the first k."""
    return len(set(ranked[:k]) & set(gold)) / len(set(gold))


def all_gold_at_k(ranked: Sequence[str], gold: Sequence[str], k: int) -> float:
    """1.0 if every gold id is among the first k: what a multi-hop question needs, and what recall hides."""
    return float(set(gold) <= set(ranked[:k]))


def mrr(ranked: Sequence[str], gold: Sequence[str]) -> float:
    """One over the rank of the first gold id; 0 if none was found."""
    return next((1 / rank for rank, found in enumerate(ranked, 1) if found in gold), 0.0)


def ndcg_at_k(ranked: Sequence[str], gold: Sequence[str], k: int) -> float:
    """Normalised discounted cumulative gain of the first k; a document is relevant or it isn't, and counts once."""
    wanted = set(gold)
    found = dict.fromkeys(ranked[:k])
    gain = sum(1 / log2(rank + 1) for rank, i in enumerate(found, 1) if i in wanted)
    return gain / sum(1 / log2(rank + 1) for rank in range(1, min(len(wanted), k) + 1))


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values`; (nan, nan) if there are none."""
    if not values:
        return float("nan"), float("nan")
    rng, array = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    means = np.sort([array[rng.integers(0, len(array), len(array))].mean() for _ in range(resamples)])
    tail = round((1 - level) / 2 * resamples)
    return float(means[tail]), float(means[resamples - 1 - tail])


def judge_retrieval(ranked: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """One question's retrieval metrics, by the names that evaluations use."""
    scores = {f"recall@{k}": recall_at_k(ranked, gold, k) for k in (1, 5, 10)}
    return {**scores, "all_gold@5": all_gold_at_k(ranked, gold, 5), "mrr": mrr(ranked, gold)}


def mean_with_intervals(judged: Sequence[dict[str, float]], seed: int = 0) -> dict[str, float]:
    """Metrics per question -> n, and each metric's mean with the ends of its bootstrap interval (`_lo`, `_hi`).

    A metric that isn't defined for every question is averaged over those that have it.
    """
    row: dict[str, float] = {"n": len(judged)}
    for metric in dict.fromkeys(name for scores in judged for name in scores):
        values = [scores[metric] for scores in judged if metric in scores]
        row[metric] = sum(values) / len(values)
        row[f"{metric}_lo"], row[f"{metric}_hi"] = bootstrap_interval(values, seed)
    return row


# ----------------------------------------------------------------------------------------------------------------------
# Reward


def reward_parts(
    prediction: str,
    answers: Sequence[str],
    documents: Sequence[Any],
    gold_ids: Sequence[str],
    max_documents: int = 15,
    soft: bool = False,
) -> dict[str, float]:
    """The reward's three parts, each 0 to 1: answer, relevance, efficiency.

    answer: exact match, or token F1 if `soft` (which drifts into long, vague answers: use it late). relevance: the
    share of gold ids among the documents retrieved, so that words of the answer in a wrong document earn nothing.
    efficiency: 1 - documents / max_documents, and only if the answer is right. An unanswerable question pays for
    abstaining, relevance included, and nothing for answering.
    """
    right = exact_match(prediction, answers)
    found = {_get(doc, "id") for doc in documents}
    relevance = len(found & set(gold_ids)) / len(set(gold_ids)) if gold_ids else right
    return {
        "answer": answer_f1(prediction, answers) if soft else right,
        "relevance": relevance,
        "efficiency": right * max(0.0, 1 - len(documents) / max_documents),
    }


def compute_rag_reward(
    prediction: str,
    answers: Sequence[str],
    documents: Sequence[Any],
    gold_ids: Sequence[str],
    max_documents: int = 15,
    soft: bool = False,
) -> float:
    """0.6 answer + 0.3 relevance + 0.1 efficiency, from 0 to 1 (see `reward_parts`)."""
    parts = reward_parts(prediction, answers, documents, gold_ids, max_documents, soft)
    return 0.6 * parts["answer"] + 0.3 * parts["relevance"] + 0.1 * parts["efficiency"]
