"""Reading documents one by one: how sure is the model that this one answers, which ones speak, what do they say?

    texts, confidences = answer_each(engine, conversations)     # abstains where no document is convincing
    views = focus(engine, [conversation])[0]                    # the one-document contexts that may answer, best first

A small model reads one document well and loses its way among five. So each stands alone in a context, under the number
it has among the others, and the answer comes from the one that speaks most for itself, as in OPRM (2505.07793), which
goes by the entropy of the answer; how probable the sentence is that the model abstains with was at hand (the two were
not compared). What the retriever and an evidence reader think is added to it (`confidence`, learned by scripts.rag_eval
--calibrate). Of a document the model reads the sentences that the retriever finds closest to the question, if it
compares sentences, and the one that the evidence reader points into.

Where that is convincing enough to answer, either the model's own words are taken or those that an evidence reader
points at (nanochat/evidence.py), whichever calibration found better to trust. Where other documents are convincing,
too, they are heard: who agrees is cited, who disagrees is quoted, the newest first, then those without a `date`.

A question that takes two documents at once can't be asked this way: `answer_together` also reads every two as one text.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from nanochat.common import print0
from nanochat.documents import tokenize
from nanochat.engine import Engine
from nanochat.passages import sentences
from nanochat.rag_utils import ABSTENTION, also_said, strip_citations
from nanochat.tokenizer import check_conversation

if TYPE_CHECKING:
    from nanochat.evidence import Evidence

ALONE, TOGETHER = 2, 3  # sentences that are read of a document, the closest ones (docs/LOG.md has others)
BESIDE = 0.95  # share of answerable questions in which no wrong document may speak beside the right one
FEATURES = 10  # of a document or of two read as one text: what `look` and `look_together` give, of which these are
MODEL, LIKENESS, NAMES, ODDS = 0, 1, 2, 6  # the language model's, similarity, names of the question, evidence's odds
FAINT = 0.05  # a vote of the language model that weighs less than this isn't worth the time it takes
_BEGINNING = re.compile(r"(?:^|[.!?:][\"”')]*\s)\W*\w")  # of a question's sentence
_SHORT = re.compile(r"\b(?:[A-Za-z]|St|Mt|Ft|Dr|Mr|Mrs|Ms|Jr|Sr)\.$")  # a full stop that doesn't end one
COMMON = set(  # words of questions that say nothing about who answers them
    "a about an and any are as at be been by can could did do does far find for from give had has have how i in is it "
    "its know like long many me much my name of old on or please tell that the there this to was were what when where "
    "which who whom whose why with would you".split()
)


def look(
    engine: Engine,
    conversations: Sequence[dict],
    max_tokens: int = 256,
    batch_size: int = 16,
    progress: bool = False,
    known: dict | None = None,
) -> list[tuple[list[dict], np.ndarray]]:
    """Each conversation once for every document in it, and what speaks for answering from that one.

    The latter is (documents, FEATURES): the log-odds that the model answers rather than abstains when it reads this
    document alone (abstains in all words: other answers begin with an "I", too; nan where calibration gave them no
    weight); the document's similarity to the query (nan where the retriever gave none); the shares of the question's
    names and of its words that the document has (`shared_words`), and that its title and the sentence with the evidence
    have; the evidence reader's odds; the share of its title's names that the question has (these four are nan without
    an evidence reader; the last of them tells little of one document, but much of two); 1 if it has all of the
    question's names, else 0; and the evidence reader's odds when it reads only the `TOGETHER` closest sentences, the
    one with the evidence among them: a second look. Its place among the others doesn't count. `known` remembers from
    call to call what models said. A view has as its "evidence" what was found in its document.
    """
    known = {} if known is None else known
    fitted = engine.model.confidence
    asked = [[(asks(c), [doc]) for doc in _documents(check_conversation(c))] for c in conversations]
    said = iter(point(engine, [one for each in asked for one in each], known))
    found = [[next(said) for _ in each] for each in asked]
    views = [one_document_each(c, told) for c, told in zip(conversations, found)]
    closer = [one_document_each(c, told, TOGETHER) for c, told in zip(conversations, found)]
    again = iter(point(engine, [(asks(view), _documents(view)) for each in closer for view in each], known))
    counts = fitted is None or fitted["weights"][MODEL]
    prompts = [engine.prompt(view, max_tokens) for v in views for view in v] if counts else []
    keys = [np.array(ids).tobytes() for ids in prompts]
    new = {key: ids for key, ids in zip(keys, prompts) if key not in known}
    known.update(zip(new, engine.score_batch(list(new.values()), engine.refusal, batch_size, progress)))
    abstains = np.array([known[key] for key in keys]).clip(max=-1e-6)
    odds, out = iter(np.log(-np.expm1(abstains)) - abstains), []
    for v, pairs, told in zip(views, asked, found):
        rows = []
        for (question, docs), evidence in zip(pairs, told):
            likeness = math.nan if docs[0].get("similarity") is None else docs[0]["similarity"]
            rows.append((next(odds, math.nan), likeness, *_speaks(question, docs, evidence), _odds(next(again))))
        out.append((v, np.array(rows).reshape(-1, FEATURES)))
    return out


def look_together(
    engine: Engine, conversations: Sequence[dict], known: dict | None = None
) -> "list[tuple[list[Sequence[dict]], list[Evidence | None], np.ndarray]]":
    """Every two documents of each conversation (a lone one alone), what the evidence reader finds in them read as one
    text, and what speaks for it. Of a document the `TOGETHER` closest sentences are read.

    What speaks for it are `look`'s features (texts, FEATURES) but for the first two and the last, which are nan. The
    shares are of what either document has in the sentences that are read, and of the names in the answering document's
    title it is told how many the question or the other one has: who is asked about leads to who answers.
    """
    asked = []
    for c in conversations:
        docs = [_documents(view)[0] for view in one_document_each(check_conversation(c), most=TOGETHER)]
        asked.append([(asks(c), two) for two in combinations(docs, 2)] or [(asks(c), tuple(docs))])
    told = iter(point(engine, [one for each in asked for one in each], known))
    out = []
    for each in asked:
        found = [next(told) for _ in each]
        rows = [(math.nan, math.nan, *_speaks(question, docs, e), math.nan) for (question, docs), e in zip(each, found)]
        out.append(([docs for _, docs in each], found, np.array(rows)))
    return out


def _odds(evidence: "Evidence | None") -> float:
    return math.nan if evidence is None else evidence.odds


def _speaks(question: str, docs: Sequence[dict], evidence: "Evidence | None") -> tuple[float, ...]:
    """`look`'s features of documents read as one text, but for the first two and the last."""
    held = shared_words(question, *docs)
    all_names = math.nan if math.isnan(held[0]) else float(held[0] >= 1)
    if evidence is None:
        return (*held, math.nan, math.nan, math.nan, math.nan, all_names)
    doc = docs[evidence.document]
    near = shared_words(question, {**doc, "content": evidence.sentence})
    others = [_told(other) for n, other in enumerate(docs) if n != evidence.document]
    linked = _share(names_in(f"{doc.get('title') or ''}", title=True), set(tokenize(_plain(question))).union(*others))
    return (*held, *near, evidence.odds, linked, all_names)


def asks(conversation: dict) -> str:
    """The question of a conversation: its last user message."""
    return next((m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user"), "")


def point(
    engine: Engine, asked: Sequence[tuple[str, Sequence[dict]]], known: dict | None = None
) -> "list[Evidence | None]":
    """What the model's evidence reader finds for questions in documents; None for each if the model has none."""
    if engine.model.evidence is None:
        return [None] * len(asked)
    known = {} if known is None else known
    keys = [(question, *((doc.get("title", ""), doc["content"]) for doc in docs)) for question, docs in asked]
    new = {key: one for key, one in zip(keys, asked) if key not in known}
    known.update(zip(new, engine.model.evidence.find(list(new.values()))))
    return [known[key] for key in keys]


def shared_words(question: str, *docs: dict) -> tuple[float, float]:
    """Which share of a question's names and numbers, and of all its words that say something, documents have in their
    titles or texts; nan where the question has none.

    A passage about another country may be as similar to a question as the right one, but hasn't the country's name.
    """
    told = set().union(*map(_told, docs))
    return _share(names_in(question), told), _share(set(tokenize(_plain(question))) - COMMON, told)


def _share(wanted: set[str], told: set[str]) -> float:
    return len(wanted & told) / len(wanted) if wanted else math.nan


def names_in(text: str, title: bool = False) -> set[str]:
    """The words of names and the numbers in a question, or in a title. The first word of a question's sentence has a
    capital anyway.
    """
    if text.isupper():
        text = text.lower()
    elif not title:
        text = _BEGINNING.sub(lambda m: m[0] if _SHORT.search(text, 0, m.start() + 1) else m[0].lower(), text)
    words = re.findall(r"\w+(?:[.,]\d+)*", _plain(text))  # as they are written
    return set(tokenize(" ".join(w for w in words if w[0].isdigit() or w[0].isupper()))) - COMMON


def _plain(question: str) -> str:
    return re.sub(r"['’]s\b", "", question)


def _told(doc: dict) -> set[str]:
    return set(tokenize(f"{doc.get('title') or ''} {doc['content']}"))


def focus(
    engine: Engine, conversations: Sequence[dict], max_tokens: int = 256, **options
) -> list[list[tuple[dict, float]]]:
    """For each conversation the contexts that may answer, first the one to begin with, and how sure that is.

    The first is the newest of those with a `date`, or else the surest. A conversation without documents stays as it is,
    with a confidence of infinity. `options` are `look`'s.
    """
    fitted, chosen = engine.model.confidence, []
    bar = math.inf if fitted is None else max(fitted["beside"], 0)
    looked = look(engine, conversations, max_tokens, **options)
    for conversation, (views, features) in zip(conversations, looked):
        scores = confidence(features, fitted)
        order = sorted(range(len(views)), key=lambda n: -scores[n])
        heard = [(views[n], float(scores[n])) for k, n in enumerate(order) if not k or scores[n] > bar]
        heard.sort(key=lambda one: date_of(one[0]), reverse=True)
        chosen.append(heard or [(conversation, math.inf)])
    return chosen


def abstains(engine: Engine, heard: Sequence[tuple[dict, float]]) -> bool:
    """Whether an answer of this confidence is better not given. Never, unless scripts.rag_eval has calibrated."""
    return engine.model.confidence is not None and max(score for _, score in heard) <= 0


def answer_views(
    engine: Engine, views: Sequence[dict], batch_size: int, max_tokens: int, quote: bool = True, **options
) -> list[tuple[str, float]]:
    """The answers over contexts that `focus` chose, and how sure of its words the model is: a token's mean
    log-probability. Where `abstains` decides about abstaining, quoting doesn't. Where the evidence reader's words would
    be said however sure the model were, it isn't asked: "" and -inf.
    """
    out = [("", -math.inf)] * len(views)
    wanted = [n for n, view in enumerate(views) if not quote or own_words(engine, view, 0.0)]
    prompts = [engine.prompt(views[n], max_tokens) for n in wanted]
    options |= {"quote": quote, "abstain": engine.model.confidence is None}
    for n, c in zip(wanted, engine.complete_batch(prompts, batch_size, engine.room(max_tokens), **options)):
        out[n] = (engine.text(c.ids), float(np.mean(c.logprobs)) if c.logprobs else -math.inf)
    return out


def speak(engine: Engine, heard: Sequence[tuple[dict, float]], said: Sequence[tuple[str, float]], quote: bool) -> str:
    """One answer from what the model says (`answer_views`) over the contexts that `focus` chose for a question.

    A context's answer is in the model's own words, or if those are less to be trusted in the evidence reader's.
    """
    answers = [
        own
        if not quote or own_words(engine, view, logprob)
        else _pointed(view["evidence"]["text"], view["evidence"]["number"])
        for (view, _), (own, logprob) in zip(heard, said)
    ]
    others = [(answer, date_of(view)) for answer, (view, _) in zip(answers[1:], heard[1:])]
    return answers[0] + also_said((answers[0], date_of(heard[0][0])), others)


def own_words(engine: Engine, view: dict, logprob: float) -> bool:
    """Whether over this context the model's own words, of this mean log-probability, are rather right than what the
    evidence reader points at. Always where that is nothing.
    """
    evidence, fitted = view.get("evidence"), engine.model.confidence or {}
    if not evidence or "words" not in fitted:
        return True
    known = (max(logprob, -1e6), evidence["logprob"], 1.0)
    return bool(np.dot(fitted["words"], known) > 0)


def _pointed(text: str, *numbers: int) -> str:
    """Words of a document as an answer; what looks like a citation in them is none."""
    return f"{strip_citations(text)}. " + "".join(f"[{number}]" for number in sorted(numbers))


def stream_each(
    engine: Engine, heard: Sequence[tuple[dict, float]], max_tokens: int = 256, quote: bool = True, **sampling
) -> Iterator[str]:
    """The answer of what `focus` chose, and then what other documents add to it: in pieces as they come, or at once
    where a calibrated model weighs its words before they are said.
    """
    if abstains(engine, heard):
        return iter([ABSTENTION])
    views = [view for view, _ in heard]
    if quote and engine.model.confidence:
        return iter([speak(engine, heard, answer_views(engine, views, len(views), max_tokens, **sampling), quote)])
    pieces = engine.stream(views[0], max_tokens, quote=quote, abstain=engine.model.confidence is None, **sampling)

    def play() -> Iterator[str]:
        said = ""
        for piece in pieces:
            said += piece
            yield piece
        if others := views[1:]:
            more = answer_views(engine, others, len(others), max_tokens, quote, **sampling)
            yield speak(engine, heard, [(said, 0.0), *more], quote).removeprefix(said)

    return play()


def answer_each(
    engine: Engine,
    conversations: Sequence[dict],
    batch_size: int = 16,
    max_tokens: int = 256,
    quote: bool = True,
    progress: bool = False,
    known: dict | None = None,
    **sampling,
) -> tuple[list[str], list[float]]:
    """The answers, documents read one by one, and the confidence of each. Where it is too low, the abstention."""
    focused = focus(engine, conversations, max_tokens, batch_size=batch_size, progress=progress, known=known)
    tried = [view for heard in focused if not abstains(engine, heard) for view, _ in heard]
    said = iter(answer_views(engine, tried, batch_size, max_tokens, quote, progress=progress, **sampling))
    answers = [
        ABSTENTION if abstains(engine, heard) else speak(engine, heard, [next(said) for _ in heard], quote)
        for heard in focused
    ]
    return answers, [max(score for _, score in heard) for heard in focused]


def answer_together(
    engine: Engine,
    conversations: Sequence[dict],
    batch_size: int = 16,
    max_tokens: int = 256,
    quote: bool = True,
    progress: bool = False,
    known: dict | None = None,
    **sampling,
) -> list[str]:
    """The answers, documents of a conversation read two by two, too, for questions that may take more than one of them.

    By the evidence reader: it reads every two documents as one text (`look_together`), and what it finds in the most
    convincing two is said, unless one alone is more so (`answer_each`). Cited is the document of these words, and the
    other of the two if it has names of the question which that one lacks. (Five documents are ten such texts, twenty
    are 190: this isn't for many.) Where calibration had no questions that take two, no document is read alone, and the
    words of the surest two are said if the evidence reader finds them rather there than not. By the language model,
    all in one context, where there is no such reader or no document, or where it needn't `quote`.
    """
    known = {} if known is None else known
    options = {"max_tokens": max_tokens, "batch_size": batch_size, "progress": progress}
    answers: list[str | None] = [None] * len(conversations)
    pointed = [n for n, c in enumerate(conversations) if quote and engine.model.evidence and _documents(c)]
    asked, fitted = [conversations[n] for n in pointed], engine.model.confidence
    two = fitted and fitted["together"]
    bars = [0.0] * len(asked)
    if two:  # a lone document has nothing to be read with
        looked = look(engine, asked, known=known, **options)
        bars = [max(0.0, confidence(f, fitted).max()) if len(f) > 1 else math.inf for _, f in looked]
    for n, bar, (texts, found, features) in zip(pointed, bars, look_together(engine, asked, known)):
        scores = confidence(features, two) if two else features[:, ODDS]
        best = np.where([e is None for e in found], -math.inf, scores).argmax()
        if found[best] is not None and scores[best] > bar:
            answers[n] = _cite(asks(conversations[n]), texts[best], found[best])
        elif not two:
            answers[n] = ABSTENTION
    left = [n for n in pointed if answers[n] is None]
    said, _ = answer_each(engine, [conversations[n] for n in left], quote=quote, known=known, **options, **sampling)
    rest = sorted({*range(len(conversations))} - {*pointed})
    own = engine.answer_batch([conversations[n] for n in rest], quote=quote, **options, **sampling)
    for n, answer in [*zip(left, said), *zip(rest, own)]:
        answers[n] = answer
    return answers


def _cite(question: str, docs: Sequence[dict], found: "Evidence") -> str:
    lacks = names_in(question) - _told(docs[found.document])
    cited = [doc for n, doc in enumerate(docs) if n == found.document or lacks & _told(doc)]
    return _pointed(found.text, *(doc["number"] for doc in cited))


def confidence(features: np.ndarray, fitted: dict | None) -> np.ndarray:
    """`look`'s features of a question's documents (n, FEATURES) -> (n,): above 0, answer. What isn't known counts as
    average. `fitted` is `fit_confidence`'s; without it, the reader's odds alone.
    """
    if fitted is None or not len(features):
        return features[:, MODEL]
    scaled = (_beside_others(features, fitted["usual"]) - np.array(fitted["mean"])) / np.array(fitted["scale"])
    return np.nan_to_num(scaled) @ np.array(fitted["weights"]) + fitted["bias"] - fitted["rivals"] * _rivals(features)


def _rivals(features: np.ndarray) -> float:
    """How many of a question's documents have all its names, as a logarithm; 0 if one or none has.

    Among many about the very thing asked, the most convincing wrong one is more so: it is the best of more tries.
    """
    return math.log(max(1, (features[:, NAMES] >= 1).sum()))


def _beside_others(features: np.ndarray, usual: float) -> np.ndarray:
    """`look`'s features with a document's similarity replaced by how far it is above the mean of the others'.

    How similar a right passage is depends on the kind of text and on the question's wording, by how much it stands out
    doesn't (docs/LOG.md). What is `usual` counts as half a document more, and is all there is beside one alone.
    """
    x = features.clip(-20, 20)
    n = (~np.isnan(x[:, LIKENESS])).sum()
    x[:, LIKENESS] -= (np.nansum(x[:, LIKENESS]) - x[:, LIKENESS] + usual / 2) / (n - 0.5)
    return x


def fit_confidence(
    asked: Sequence[tuple[np.ndarray, np.ndarray]],
    without: Sequence[np.ndarray],
    abstain: float,
    count_rivals: bool = True,
) -> dict:
    """Weights for `confidence` from validation questions, each with its documents' features.

    A question that is `asked` comes with a mask of the documents (n,) that answer it; that may be none. A logistic
    regression tells these documents from all others, knowing how many `_rivals` there are: that fewer are right where
    there are more isn't put down to what those look like. A weight of the language model below `FAINT` is none. The
    bias, and what is taken off for `_rivals`, are such that the share `abstain` of questions `without` the documents
    that answer them isn't answered (a quantile regression; without `count_rivals`, where features are of two documents
    and don't say how many have the names, just a quantile). What nothing ever answers doesn't count there: a bar for
    passages about the very thing asked costs too many answers (docs/LOG.md). `beside` is the confidence that a further
    document needs to be heard: of the questions that can be answered, `BESIDE` have no wrong document that has it.
    """
    from sklearn.linear_model import LogisticRegression, QuantileRegressor  # comes with sentence-transformers; slow

    seen = [f for f, _ in asked] + list(without)
    y = np.concatenate([mask for _, mask in asked] + [np.zeros(len(f), bool) for f in without])
    likeness = np.concatenate(seen)[~y, LIKENESS]
    usual = 0.0 if np.isnan(likeness).all() else float(np.nanmean(likeness))
    x = np.concatenate([_beside_others(f, usual) for f in seen])
    known = ~np.isnan(x)
    count = known.sum(0).clip(1)
    mean = np.where(known, x, 0).sum(0) / count
    spread = np.sqrt(np.where(known, (x - mean) ** 2, 0).sum(0) / count)
    scale = np.where(spread > 0, spread, 1.0)
    crowd = np.concatenate([np.full(len(f), _rivals(f) * count_rivals) for f in seen])
    model = LogisticRegression().fit(np.c_[np.nan_to_num((x - mean) / scale), crowd], y)
    weights = model.coef_[0][:-1]
    weights[MODEL] *= weights[MODEL] >= FAINT  # one that is negative is chance
    fitted = {"mean": mean.tolist(), "scale": scale.tolist(), "weights": weights.tolist(), "usual": usual}
    fitted |= {"bias": 0.0, "rivals": 0.0}
    best = lambda: np.array([confidence(f, fitted).max() for f in without])
    rivals = np.array([[_rivals(f)] for f in without])
    if count_rivals and rivals.std() > 0:
        line = QuantileRegressor(quantile=min(max(abstain, 0.01), 0.99), alpha=0.0, solver="highs").fit(rivals, best())
        fitted["rivals"] = max(0.0, float(line.coef_[0]))
    bias = -float(np.quantile(best(), abstain))
    others = [confidence(f, fitted)[~mask].max() for f, mask in asked if mask.any() and not mask.all()]
    return fitted | {"bias": bias, "beside": float(np.quantile(others, BESIDE)) + bias if others else 0.0}


def check_confidence(fitted: object) -> dict | None:
    """meta.json's "confidence" (scripts.rag_eval's `calibrate`), or None, also where it is an older version's.

    Raises KeyError, TypeError or ValueError for what no version has written.
    """
    if fitted is None:
        return None
    if isinstance(fitted, dict) and (
        len(fitted.get("weights", ())) != FEATURES or not fitted.keys() >= {"rivals", "together"}
    ):
        print0(
            "this checkpoint's confidence is an older version's. Neither it nor the evidence reader is used, and "
            "the language model answers alone, as if it were sure: run scripts.rag_eval --calibrate again"
        )
        return None
    words = [float(v) for v in fitted["words"]]
    if len(words) != 3:
        raise ValueError("confidence needs three numbers for words")
    together = None if fitted["together"] is None else _check_weights(fitted["together"])
    return _check_weights(fitted) | {"words": words, "together": together}


def _check_weights(fitted: dict) -> dict:
    """What `fit_confidence` gives."""
    out = {name: [float(v) for v in fitted[name]] for name in ("mean", "scale", "weights")}
    if {len(v) for v in out.values()} != {FEATURES} or 0 in out["scale"]:
        raise ValueError(f"confidence needs {FEATURES} numbers of each kind")
    return out | {name: float(fitted[name]) for name in ("usual", "bias", "rivals", "beside")}


def fit_words(sure: Sequence[tuple[float, float]], better: Sequence[bool]) -> list[float]:
    """Weights of the own words' mean log-probability and of the evidence's log-probability, and a bias: where they add
    up to more than 0, the own words are rather `better`. From validation questions where their F1 differs.
    """
    from sklearn.linear_model import LogisticRegression

    known = [(x, ok) for x, ok in zip(sure, better) if np.isfinite(x).all()]
    if len({ok for _, ok in known}) < 2:
        return [0.0, 0.0, 1.0 if all(ok for _, ok in known) else -1.0]
    x, y = map(np.array, zip(*known))
    model = LogisticRegression(C=1e3)
    if model.fit(x, y).coef_[0][0] < 0:  # the surer of its words the worse is chance, and not to be learned
        model.fit(x * [0, 1], y)
    return [*model.coef_[0].tolist(), float(model.intercept_[0])]


def one_document_each(conversation: dict, found: "Sequence[Evidence | None]" = (), most: int = ALONE) -> list[dict]:
    """The conversation once for each document in it, alone, under the number it had, and cut to the `most` sentences
    that are `closest`, the one in which words were `found` among them.
    """
    messages, views, number = conversation["messages"], [], 0
    told = iter(found)
    for at, message in enumerate(messages):
        for doc in message["documents"] if message["role"] == "retrieval" else []:
            doc = doc if isinstance(doc, dict) else doc.shown()
            number = doc.get("number") or number + 1
            evidence = next(told, None)
            if close := (doc.get("closest") or [])[:most]:
                doc = {
                    **doc,
                    "content": " ".join(sorted(_with(close, doc["content"], evidence), key=doc["content"].find)),
                }
            only = {**message, "documents": [{**doc, "number": number}]}
            rest = [only if i == at else m for i, m in enumerate(messages) if i == at or m["role"] != "retrieval"]
            view = {**conversation, "messages": rest}
            if evidence:
                view["evidence"] = {"text": evidence.text, "logprob": evidence.logprob, "number": number}
            views.append(view)
    return views


def _with(close: list[str], content: str, evidence: "Evidence | None") -> list[str]:
    """The closest sentences, the last of them replaced by the one with the evidence if that isn't among them."""
    if evidence is None:
        return close
    held = next((s for s in sentences(content) if evidence.sentence.endswith(" ".join(s.split()))), None)
    return close if held is None or held in close else [*close[: max(1, len(close) - 1)], held]


def date_of(view: dict) -> str:
    """The `date` of a view's document, if it is one that sorts as text ("2015", "2015-04", "2015-04-01"), or ""."""
    date = next((str(doc.get("date") or "") for doc in _documents(view)), "")
    return date if re.fullmatch(r"\d{4}(?:-\d\d){0,2}", date) else ""


def _documents(conversation: dict) -> list[dict]:
    docs = [doc for m in conversation["messages"] if m["role"] == "retrieval" for doc in m["documents"]]
    return [doc if isinstance(doc, dict) else doc.shown() for doc in docs]
