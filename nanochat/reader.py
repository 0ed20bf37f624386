"""Reading documents one by one: how sure is the model that this one answers, which ones speak, what do they say?

    texts, confidences = answer_each(engine, conversations)     # abstains where no document is convincing
    views = focus(engine, [conversation])[0]                    # the one-document contexts that may answer, best first

A small model reads one document well and loses its way among five. So each stands alone in a context, under the number
it has among the others, and the answer comes from the one that speaks most for itself, as in OPRM (2505.07793), which
goes by the entropy of the answer; how probable the sentence is that the model abstains with was at hand (the two were
not compared). What the retriever thinks is added to it (`confidence`, learned by scripts.rag_eval --calibrate). Of a
document only the sentences are read that the retriever finds closest to the question, if it compares sentences.

Where that is convincing enough to answer, but the model isn't sure of its words, the closest sentence is quoted as a
whole. Where other documents are convincing, too, they are heard: who agrees is cited, who disagrees is quoted, the
newest first, then those without a `date`. A question that needs two documents at once can't be asked this way.
"""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from nanochat.documents import tokenize
from nanochat.engine import Engine
from nanochat.rag_utils import ABSTENTION, also_said, is_supported, strip_citations
from nanochat.tokenizer import check_conversation

BESIDE = 0.95  # share of answerable questions in which no wrong document may speak beside the right one
FEATURES = 4  # of a document: what `look` gives
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
    known: dict[bytes, float] | None = None,
) -> list[tuple[list[dict], np.ndarray]]:
    """Each conversation once for every document in it, and what speaks for answering from that one.

    The latter is (documents, FEATURES): the log-odds that the model answers rather than abstains when it reads this
    document alone (abstains in all words: other answers begin with an "I", too); the document's similarity to the query
    (nan where the retriever gave none); the shares of the question's names and of its words that the document has
    (`shared_words`). Its place among the others doesn't count. `known` remembers the model's part from call to call.
    """
    views = [one_document_each(check_conversation(c)) for c in conversations]
    prompts = [engine.prompt(view, max_tokens) for v in views for view in v]
    keys, known = [np.array(ids).tobytes() for ids in prompts], {} if known is None else known
    new = {key: ids for key, ids in zip(keys, prompts) if key not in known}
    known.update(zip(new, engine.score_batch(list(new.values()), engine.refusal, batch_size, progress)))
    abstains = np.array([known[key] for key in keys]).clip(max=-1e-6)
    odds, found = iter(np.log(-np.expm1(abstains)) - abstains), []
    for v, conversation in zip(views, conversations):
        question = next((m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user"), "")
        docs = [doc if isinstance(doc, dict) else doc.shown() for doc in _documents(conversation)]
        likeness = [math.nan if doc.get("similarity") is None else doc["similarity"] for doc in docs]
        rows = [(next(odds), x, *shared_words(question, doc)) for x, doc in zip(likeness, docs)]
        found.append((v, np.array(rows).reshape(-1, FEATURES)))
    return found


def shared_words(question: str, doc: dict) -> tuple[float, float]:
    """Which share of a question's names and numbers, and of all its words that say something, a document has in its
    title or text; nan where the question has none.

    A passage about another country may be as similar to a question as the right one, but hasn't the country's name.
    """
    question = re.sub(r"['’]s\b", "", question)
    words = re.findall(r"\w+(?:[.,]\d+)*", question)  # as they are written; the first has a capital anyway
    names = [w for n, w in enumerate(words) if w[0].isdigit() or (n and w[0].isupper() and not question.isupper())]
    told = set(tokenize(f"{doc.get('title', '')} {doc['content']}"))
    share = lambda wanted: len(wanted & told) / len(wanted) if wanted else math.nan
    return share(set(tokenize(" ".join(names))) - COMMON), share(set(tokenize(question)) - COMMON)


def focus(
    engine: Engine, conversations: Sequence[dict], max_tokens: int = 256, **options
) -> list[list[tuple[dict, float]]]:
    """For each conversation the one-document contexts that may answer, first the one to begin with, and how sure.

    The first is the newest of those with a `date`, or else the surest. A conversation without documents stays as it is,
    with a confidence of infinity. `options` are `look`'s.
    """
    fitted, chosen = engine.model.confidence, []
    bar = math.inf if fitted is None else max(fitted["beside"], 0)
    for conversation, (views, features) in zip(conversations, look(engine, conversations, max_tokens, **options)):
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
    log-probability. Where `abstains` decides about abstaining, quoting doesn't.
    """
    prompts = [engine.prompt(view, max_tokens) for view in views]
    options |= {"quote": quote, "abstain": engine.model.confidence is None}
    done = engine.complete_batch(prompts, batch_size, engine.room(max_tokens), **options)
    return [(engine.text(c.ids), float(np.mean(c.logprobs)) if c.logprobs else -math.inf) for c in done]


def speak(engine: Engine, heard: Sequence[tuple[dict, float]], said: Sequence[tuple[str, float]], quote: bool) -> str:
    """One answer from what the model says (`answer_views`) over the contexts that `focus` chose for a question.

    Where the model is less sure of its words than calibration wants, the first document's closest sentence is quoted
    instead; of other documents only sure words are heard, and only if the sentence doesn't have them.
    """
    weights = engine.model.confidence["words"] if quote and engine.model.confidence else (0.0, 0.0, 1.0)
    known = [(max(logprob, -1e6), min(score, 1e6), 1.0) for (_, logprob), (_, score) in zip(said, heard)]
    sure = [np.dot(weights, one) > 0 for one in known]
    answer, [doc, *_] = said[0][0], [*_documents(heard[0][0]), {}]
    others = [(a, date_of(view)) for (a, _), (view, _), ok in zip(said[1:], heard[1:], sure[1:]) if ok]
    if not sure[0] and doc.get("closest"):
        sentence = " ".join(doc["closest"][0].split())
        others = [o for o in others if not is_supported(strip_citations(o[0]), [{"title": "", "content": sentence}])]
        answer = sentence + ("" if re.search(r"[.?!…]\W*$", sentence) else ".") + f" [{doc['number']}]"
    return answer + also_said((answer, date_of(heard[0][0])), others)


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
    known: dict[bytes, float] | None = None,
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


def confidence(features: np.ndarray, fitted: dict | None) -> np.ndarray:
    """`look`'s features of a question's documents (n, FEATURES) -> (n,): above 0, answer. What isn't known counts as
    average. `fitted` is `fit_confidence`'s; without it, the reader's odds alone.
    """
    if fitted is None or not len(features):
        return features[:, 0]
    scaled = (_beside_others(features, fitted["usual"]) - np.array(fitted["mean"])) / np.array(fitted["scale"])
    return np.nan_to_num(scaled) @ np.array(fitted["weights"]) + fitted["bias"]


def _beside_others(features: np.ndarray, usual: float) -> np.ndarray:
    """`look`'s features with a document's similarity replaced by how far it is above the mean of the others'.

    How similar a right passage is depends on the kind of text and on the question's wording, by how much it stands out
    doesn't (docs/LOG.md). What is `usual` counts as half a document more, and is all there is beside one alone.
    """
    x = features.clip(-20, 20)
    n = (~np.isnan(x[:, 1])).sum()
    x[:, 1] -= (np.nansum(x[:, 1]) - x[:, 1] + usual / 2) / (n - 0.5)
    return x


def fit_confidence(
    answerable: Sequence[tuple[np.ndarray, np.ndarray]], unanswerable: Sequence[np.ndarray], abstain: float = 0.86
) -> dict:
    """Weights for `confidence` from validation questions, each with its documents' features.

    A question that can be answered comes with a mask of the documents (n,) that do. A logistic regression tells these
    documents from all others; the bias is such that the share `abstain` of the unanswerable questions isn't answered.
    `beside` is the confidence that a further document needs to be heard: of the answerable questions, `BESIDE` have no
    wrong document that has it.
    """
    from sklearn.linear_model import LogisticRegression  # comes with sentence-transformers; slow to import

    seen = [f for f, _ in answerable] + list(unanswerable)
    y = np.concatenate([mask for _, mask in answerable] + [np.zeros(len(f), bool) for f in unanswerable])
    likeness = np.concatenate(seen)[~y, 1]
    usual = 0.0 if np.isnan(likeness).all() else float(np.nanmean(likeness))
    x = np.concatenate([_beside_others(f, usual) for f in seen])
    known = ~np.isnan(x)
    count = known.sum(0).clip(1)
    mean = np.where(known, x, 0).sum(0) / count
    spread = np.sqrt(np.where(known, (x - mean) ** 2, 0).sum(0) / count)
    scale = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression().fit(np.nan_to_num((x - mean) / scale), y)
    fitted = {"mean": mean.tolist(), "scale": scale.tolist(), "weights": model.coef_[0].tolist(), "bias": 0.0}
    fitted["usual"] = usual
    scores = [(confidence(f, fitted), mask) for f, mask in answerable]
    bias = -float(np.quantile([confidence(f, fitted).max() for f in unanswerable], abstain))
    others = [s[~mask].max() for s, mask in scores if not mask.all()]
    return fitted | {"bias": bias, "beside": float(np.quantile(others, BESIDE)) + bias if others else 0.0}


def fit_words(sure: Sequence[tuple[float, float]], right: Sequence[bool]) -> list[float]:
    """Weights of the words' mean log-probability (`answer_views`) and of the confidence in their document, and a bias:
    where they add up to more than 0, more answers are right than wrong. From answers to validation questions.
    """
    from sklearn.linear_model import LogisticRegression

    known = [(x, ok) for x, ok in zip(sure, right) if np.isfinite(x).all()]
    if len({ok for _, ok in known}) < 2:
        return [0.0, 0.0, 1.0 if all(ok for _, ok in known) else -1.0]
    model = LogisticRegression(C=1e3).fit(*map(np.array, zip(*known)))
    return [*map(float, model.coef_[0]), float(model.intercept_[0])]


def one_document_each(conversation: dict) -> list[dict]:
    """The conversation once for each document in it, alone, under the number it had, and cut to what is `closest`."""
    messages, views, number = conversation["messages"], [], 0
    for at, message in enumerate(messages):
        for doc in message["documents"] if message["role"] == "retrieval" else []:
            doc = doc if isinstance(doc, dict) else doc.shown()
            number = doc.get("number") or number + 1
            if close := doc.get("closest"):
                doc = {**doc, "content": " ".join(sorted(close, key=doc["content"].find))}
            only = {**message, "documents": [{**doc, "number": number}]}
            rest = [only if i == at else m for i, m in enumerate(messages) if i == at or m["role"] != "retrieval"]
            views.append({**conversation, "messages": rest})
    return views


def date_of(view: dict) -> str:
    """The `date` of a view's document, if it is one that sorts as text ("2015", "2015-04", "2015-04-01"), or ""."""
    date = next((str(doc.get("date") or "") for doc in _documents(view)), "")
    return date if re.fullmatch(r"\d{4}(?:-\d\d){0,2}", date) else ""


def _documents(conversation: dict) -> list[dict]:
    return [doc for m in conversation["messages"] if m["role"] == "retrieval" for doc in m["documents"]]
