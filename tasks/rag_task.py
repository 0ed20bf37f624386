"""Questions over documents as conversations: what RAG fine-tuning trains on.

    task = RAGTask(load_queries("train"), load_documents(), max_docs=5)
    task[0] -> {"messages": [{"role": "retrieval", ...}, {"role": "user", ...}, {"role": "assistant", ...}], ...}
    MultiHopRAGTask(load_queries("train"), load_documents())[0]  # two retrieval messages, for two-hop questions

Each example is drawn anew in every epoch: which distractors stand beside the gold document, their order and so their
numbers, the wording of the question, whether the gold document is there at all (if not, the answer is the abstention).
Three things are meant to make a small model read rather than remember (only the last has been compared, docs/LOG.md):

- many questions to one context: a document answers up to a dozen questions, each costs only its own few tokens;
- counterfactuals: the country gets an invented name and the answer is exchanged for another country's, in the document
  and in the target alike, so that what the weights know is of no use;
- near misses: questions that differ from an answered one by the country alone, and are answered by abstaining.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nanochat.common import UserError, over_ranks
from nanochat.engine import Engine
from nanochat.rag_utils import ABSTENTION, answer_f1, exact_match, is_abstention, is_supported, strip_citations
from nanochat.tokenizer import Tokenizer
from tasks.common import Task, whole_word
from tasks.factbook import judgeable


@dataclass
class RAGMix:
    """What a context looks like, as shares of examples."""

    absent: float = 0.2  # the gold document (of two, one or both) is missing; also the chance of a near miss
    paired: float = 0.0  # every question has a near miss, and it differs by the country only
    counterfactual: float = 0.3  # names and answers exchanged
    follow_up: float = 0.7  # more than one question to the context
    max_questions: int = 8  # in a context with follow-ups
    min_docs: int = 1  # documents in the context, at least
    max_docs: int = 5  # and at most
    reword: float = 0.0  # questions in a wording that no question file has
    alike: float = 0.3  # of the distractors, of the same relation; those about or naming the same entity fill up to 0.5
    careless: float = 0.0  # questions as they are typed in a hurry
    bare: float = 0.0  # there is no document at all: the answer to whatever is asked is the abstention
    sentences: int = 0  # documents are cut to one to so many sentences, with what its question needs (0: whole)


class RAGTask(Task):
    """See the module's docstring. `rows` are questions, `documents` a knowledge base by id.

    `retrieved` (question id -> document ids, best first) gives the distractors a retriever would: two fifths of them
    then come from it, the others share the gold document's relation or entity or are random.

    `others` are questions that are asked as follow-ups only, and tell what stands where: with two-hop `rows`, all.

    Where documents carry a "split", none is shown from another split than the gold documents of `rows` have:
    training never sees a passage about an entity that a validation or test question asks for.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        documents: dict[str, dict],
        mix: RAGMix | None = None,
        retrieved: dict[str, list[str]] | None = None,
        seed: int = 0,
        others: Sequence[dict] = (),
    ):
        self.documents, self.mix, self.retrieved, self.seed = documents, mix or RAGMix(), retrieved or {}, seed
        self.rows = judgeable(rows, documents)
        if not self.rows:
            raise UserError("no question has its gold documents in this knowledge base; are they from the same data?")
        splits = {documents[p].get("split") for r in self.rows for p in r["positive_ids"]} - {None}
        self.ids = [i for i, doc in documents.items() if not splits or doc.get("split") in splits]
        self.allowed = set(self.ids)
        self.countries = {doc["country"] for doc in documents.values() if doc.get("country")}
        self.by_doc: dict[str, list[dict]] = {}  # single-hop questions that a document answers, or just doesn't
        self.by_relation: dict[str, list[dict]] = {}
        self.by_country: dict[str, list[str]] = {}
        self.rows_of_country: dict[str, list[dict]] = {}
        for row in [*self.rows, *(r for r in others if self.allowed.issuperset(r["positive_ids"]))]:
            if row["hops"] == 1 and row["positive_ids"]:
                self.by_relation.setdefault(row.get("relation", ""), []).append(row)
                self.rows_of_country.setdefault(row.get("country", ""), []).append(row)
            if row["hops"] == 1:
                for p in row["positive_ids"] or self._about(row):
                    self.by_doc.setdefault(p, []).append(row)
        for i in self.ids:
            self.by_country.setdefault(documents[i].get("country", ""), []).append(i)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        rng, mix, row = random.Random(f"{self.seed}/{self.epoch}/{i}"), self.mix, self.rows[i]
        absent = not row["positive_ids"] or rng.random() < mix.absent
        n_docs = rng.randint(mix.min_docs, mix.max_docs)
        gold = self._gold(row, rng) if row["positive_ids"] else self._about(row)
        gold = gold if row["positive_ids"] or len(gold) <= n_docs else rng.sample(gold, n_docs)
        if absent and row["positive_ids"]:  # of two documents, one may be there
            gold = rng.sample(gold, rng.randrange(len(gold)))
        known = row | {"positive_ids": [*row["positive_ids"], *gold]}
        ids = gold + self._distractors(known, max(0, n_docs - len(gold)), rng)
        rng.shuffle(ids)
        shown = self._show(ids)

        questions = [row]
        if rng.random() < mix.follow_up:
            questions += self._follow_ups(row, shown, rng)
        if mix.sentences:
            n = rng.randint(1, mix.sentences)
            for doc in shown:
                kept = self._needed(doc["id"], row)
                short = doc["content"] if kept is None else shorten(doc["content"], kept, n, rng)
                doc["cut"], doc["content"] = short != doc["content"], short
            # questions to what was cut away are near misses now; most are left out
            lost = lambda q: {*q["positive_ids"]} & {*ids} and not self._answer(q, shown)[1]
            questions = [row] + [q for q in questions[1:] if not lost(q) or rng.random() < mix.absent]
        if len(shown) == 1:  # any number may stand at a document read alone (reader.py)
            shown[0]["number"] = rng.randint(1, 9)
        turns = [(self._wording(q, rng), *self._answer(q, shown)) for q in questions]
        if rng.random() < mix.counterfactual:
            turns = self._counterfactual(questions, shown, turns, rng)
        turns = [(careless(query, rng) if rng.random() < mix.careless else query, *rest) for query, *rest in turns]
        if rng.random() < mix.bare:
            return self._conversation(row, [], [(query, ABSTENTION, []) for query, *_ in turns])
        return self._conversation(row, [(turns[0][0], shown)], turns)

    def _needed(self, id: str, row: dict) -> list[str] | None:
        """What an excerpt of a document must tell where `row` is asked; None: it can't be said, all of it.

        A gold document its answer, or of two documents its part of the way there. Another one the name of what is asked
        about, if it mentions it ("Unlike Chad, Niger has ..."): so a reader learns not to go by the name alone.
        """
        if id not in row["positive_ids"]:
            return [row["country"]] if self._names(id, row) else []
        if row["hops"] == 1:
            return [row["answer"]]
        if "bridge_relation" not in row:  # of handbooks, nobody knows which sentence leads to the other document
            return None
        steps = row.get("relation"), row["bridge_relation"]
        told = [q for q in self.by_doc.get(id, []) if id in q["positive_ids"] and q.get("relation") in steps]
        return [q["answer"] for q in told] or None

    def _names(self, id: str, row: dict) -> bool:
        """Whether a document about something else names what the question is about."""
        doc, name = self.documents[id], row.get("country")
        return bool(name) and name in doc["content"] and name not in doc["title"]

    def _show(self, ids: Sequence[str]) -> list[dict]:
        """Copies of documents, to be numbered: a `number` of the user's own isn't meant."""
        return [{k: v for k, v in self.documents[d].items() if k != "number"} for d in ids]

    def _conversation(self, row: dict, searches: Sequence[tuple[str, list[dict]]], turns: list) -> dict:
        """`searches` are queries and what is shown for them, several being hops; `turns` (question, answer, cited)."""
        messages: list[dict] = []
        n = 0  # documents are numbered through all hops
        for hop, (query, shown) in enumerate(searches, 1):
            docs = [{k: d[k] for k in ("id", "title", "content", "source", "number") if k in d} for d in shown]
            for doc in docs:  # if the context is too long, what no answer needs goes first
                n += 1
                doc["score"] = float(any(doc.get("number", n) in cited for _, _, cited in turns))
            more = {"hop": hop} if len(searches) > 1 else {}
            messages.append({"role": "retrieval", **more, "query": query, "documents": docs})
        for query, answer, cited in turns:
            content = answer if answer == ABSTENTION else f"{answer}. " + "".join(f"[{c}]" for c in cited)
            messages += [{"role": "user", "content": query}, {"role": "assistant", "content": content}]
        return {"messages": messages, "metadata": {"id": row["id"], "positive_ids": row["positive_ids"]}}

    def _wording(self, row: dict, rng: random.Random) -> str:
        query = rng.choice([row["query"], *row["paraphrases"]])
        return reword(query, row.get("country", ""), rng) if rng.random() < self.mix.reword else query

    def _about(self, row: dict) -> list[str]:
        """The documents that a question which nothing answers is about."""
        return [p for p in row.get("about_ids", []) if p in self.allowed]

    def _gold(self, row: dict, rng: random.Random) -> list[str]:
        """All documents of a two-hop question, one of those that answer a single-hop one."""
        return list(row["positive_ids"]) if row["hops"] > 1 else [rng.choice(row["positive_ids"])]

    def _follow_ups(self, row: dict, shown: list[dict], rng: random.Random) -> list[dict]:
        """More questions to the same documents, and near misses that none of them answers.

        Half of the time those that several documents answer, each for its own country. A near miss asks the same about
        another country or something else about the same one. In a `paired` context every question has one that
        differs by the country alone: a model that doesn't compare names can't tell them apart.
        """
        more = [r for doc in shown for r in self.by_doc.get(doc["id"], []) if r is not row]
        asked = Counter(r.get("relation", "") for r in [row, *more])
        alike = [r for r in more if asked[r.get("relation", "")] > 1]
        more = alike if alike and rng.random() < 0.5 else more
        more = rng.sample(more, min(len(more), rng.randint(1, self.mix.max_questions - 1)))
        paired = rng.random() < self.mix.paired
        for question in [row, *more]:
            if paired or rng.random() < self.mix.absent:
                near = self.by_relation if paired or rng.random() < 0.5 else self.rows_of_country
                key = "relation" if near is self.by_relation else "country"
                other = rng.choice(near.get(question.get(key, "")) or self.rows)
                if not any(states_answer(doc, other) for doc in shown if doc["id"] not in other["positive_ids"]):
                    more.append(other)
        rng.shuffle(more)
        return list({r["id"]: r for r in more if r["id"] != row["id"]}.values())[: self.mix.max_questions - 1]

    def _distractors(self, row: dict, n: int, rng: random.Random) -> list[str]:
        """`n` documents that don't answer `row`, most of one kind: retrieved, same relation, same country or naming it,
        random.
        """
        found: list[str] = []
        usual = rng.random()
        hits = [h for h in self.retrieved.get(row["id"], []) if h in self.allowed and h not in row["positive_ids"]]
        alike = self.by_relation.get(row.get("relation", ""))
        nearby = []
        if row.get("country"):
            nearby = [*self.by_country.get(row["country"], ()), *(h for h in hits if self._names(h, row))]
            nearby = [doc for doc in nearby if doc not in row["positive_ids"]]
        for _ in range(20 * n):
            if len(found) == n:
                break
            draw = usual if rng.random() < 0.7 else rng.random()
            if hits and draw < 0.4:
                doc = hits[min(int(rng.expovariate(0.4)), len(hits) - 1)]
            elif draw < 0.4 + self.mix.alike and alike:
                doc = rng.choice(rng.choice(alike)["positive_ids"])
            elif draw < 0.9 and nearby:
                doc = rng.choice(nearby)
            else:
                doc = rng.choice(self.ids)
            if doc not in row["positive_ids"] and doc not in found and not states_answer(self.documents[doc], row):
                found.append(doc)
        return found

    def _answer(self, row: dict, shown: list[dict]) -> tuple[str, list[int]]:
        """The right answer to `row` over the documents shown, and the numbers it cites."""
        numbers = {doc["id"]: doc.get("number", n) for n, doc in enumerate(shown, 1)}
        lacks = lambda d: d.get("cut") and not any(is_supported(a, [d]) for a in row["answers"])
        gone = {d["id"] for d in shown if row["hops"] == 1 and lacks(d)}  # two documents keep what is needed of them
        here = [p for p in row["positive_ids"] if p in numbers and p not in gone]
        if not here or (row["hops"] > 1 and len(here) < len(row["positive_ids"])):
            return ABSTENTION, []
        cited = here if row["hops"] > 1 else here[:1]
        return row["answer"], sorted(numbers[p] for p in cited)

    def _counterfactual(self, questions: list[dict], shown: list[dict], turns: list, rng: random.Random) -> list:
        """Exchange answers and rename countries in documents (in place) and turns alike."""
        turns = [list(t) for t in turns]
        if len(shown) <= 2:  # with few documents an answer's other occurrences are easy to keep consistent
            for q, turn in zip(questions, turns):
                others = [r for r in self.by_relation.get(q.get("relation", ""), []) if r["answer"] != q["answer"]]
                if turn[1] == ABSTENTION or q["hops"] > 1 or not others or not q.get("relation"):
                    continue
                new, old = rng.choice(others)["answer"], turn[1]
                clash = any(t is not turn and (t[1] in old or old in t[1] or t[1] == new) for t in turns)
                if clash or any(whole_word(old).search(t[0]) for t in turns):
                    continue
                for doc in shown:
                    doc["content"] = whole_word(old).sub(lambda _, new=new: new, doc["content"])
                turn[1] = new
        countries = {d.get("country", "") for d in shown}
        countries |= {q.get(key, "") for q in questions for key in ("country", "bridge")}
        taken = set(self.countries)
        for name in sorted(countries - {""}, key=len, reverse=True):
            while (new := invent_name(rng)) in taken:  # "Oman" has been invented
                pass
            taken.add(new)
            pattern = whole_word(name)
            for doc in shown:
                doc["title"], doc["content"] = (pattern.sub(new, doc[k]) for k in ("title", "content"))
            for turn in turns:
                turn[0] = pattern.sub(new, turn[0])
                turn[1] = pattern.sub(new, turn[1])
        return turns


class MultiHopRAGTask(RAGTask):
    """Two-hop questions with a retrieval message a hop: the first query is the question, the second asks for the rest
    about the bridge entity. Sizes in `mix` are those of a hop; follow-ups, cuts and `bare` are RAGTask's alone.

    `rows` are questions of every kind: those of one hop word the second query and tell what can't be a distractor. An
    `absent` document is one of the two. Without the first, the second query is about an entity that the search came
    upon instead: neither the number of hops nor a query tells whether there is an answer.
    """

    def __init__(self, rows: Sequence[dict], documents: dict[str, dict], *args, **options):
        super().__init__(rows, documents, *args, **options)
        self.rows = [r for r in self.rows if r["hops"] == 2 and len(set(r["positive_ids"])) == 2 and r.get("bridge")]
        if not self.rows:
            raise UserError("no question has two hops, two positive_ids and a bridge; docs/formats.md describes them")

    def __getitem__(self, i: int) -> dict:
        rng, mix, row = random.Random(f"{self.seed}/{self.epoch}/{i}"), self.mix, self.rows[i]
        relation, link = row.get("relation", ""), row.get("bridge_relation", "")
        link = link if link != "compare" else relation  # which of two is larger: the same is asked about both
        first, second = self._ask(row.get("country", ""), link), self._ask(row["bridge"], relation)
        told = [p for r in (row, first, second) for p in r["positive_ids"]]
        about_bridge = row | {"country": row["bridge"]}
        told += [d for d in self.by_country.get(row["bridge"], []) if states_answer(self.documents[d], about_bridge)]
        gold = list(row["positive_ids"])
        if rng.random() < mix.absent:
            gold[rng.randrange(2)] = ""
        hops, shown, taken = [row | {"relation": link}, second], [], list(told)
        for k in (0, 1):
            if k and not gold[0]:
                hops[1] = self._astray(row, shown[0], rng)
                gold[1] = rng.choice([p for p in hops[1]["positive_ids"] if p not in taken] or [""])
            ids = [gold[k]] if gold[k] else []
            avoid = row | hops[k] | {"positive_ids": taken + hops[k]["positive_ids"]}
            ids += self._distractors(avoid, rng.randint(mix.min_docs, mix.max_docs) - len(ids), rng)
            taken += ids
            shown.append(self._show(rng.sample(ids, len(ids))))

        everything = shown[0] + shown[1]
        turns: list = [(self._wording(row, rng), *self._answer(row, everything))]
        turns.append((self._wording(hops[1], rng), ABSTENTION, []))  # the second query, to be renamed like a question
        if rng.random() < mix.counterfactual:
            turns = self._counterfactual([row, hops[1]], everything, turns, rng)
        return self._conversation(row, [(turn[0], docs) for turn, docs in zip(turns, shown)], turns[:1])

    def _ask(self, entity: str, relation: str) -> dict:
        """A question for an entity's relation (both names, if no row asks for it) and all documents that answer it."""
        rows = [
            r for r in self.rows_of_country.get(entity, []) if entity and relation and r.get("relation") == relation
        ]
        words = {"query": f"{entity} {relation.replace('_', ' ')}".strip(), "paraphrases": [], "hops": 1}
        return (rows or [words])[0] | {"country": entity, "positive_ids": [p for r in rows for p in r["positive_ids"]]}

    def _astray(self, row: dict, shown: list[dict], rng: random.Random) -> dict:
        """The second hop's question after a first that found none but these documents: about another entity."""
        docs = shown + self._show(rng.sample(self.ids, min(20, len(self.ids))))
        names = dict.fromkeys(doc.get("country") or doc["title"] for doc in docs)
        others = [self._ask(n, row.get("relation", "")) for n in names if n not in (row.get("country"), row["bridge"])]
        return next((r for r in others if r["positive_ids"]), others[0] if others else self._ask("", ""))


def shorten(text: str, answers: Sequence[str], n: int, rng: random.Random) -> str:
    """At most `n` sentences of the text, in order: those that hold one of the answers, then any others."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", text)
    if any(not any(a in s for s in sentences) for a in answers):
        return text  # an answer runs over a boundary, "St. John's" say, or is told in other words
    needed = [i for i, s in enumerate(sentences) if any(a in s for a in answers)]
    others = [i for i in range(len(sentences)) if i not in needed]
    extra = rng.sample(others, min(len(others), max(0, n - len(needed))))
    return " ".join(sentences[i] for i in sorted(needed + extra))


def states_answer(doc: Any, row: dict) -> bool:
    """Whether a document, marked as gold or not, answers the question: it is about its country and holds an answer.

    `doc` is a Document or its JSON form. A question without a country is about any document.
    """
    title = doc["title"] if isinstance(doc, dict) else doc.title
    return row.get("country", "") in title and any(is_supported(answer, [doc]) for answer in row["answers"])


FRAMES = (
    "{np} of {c}?",
    "{c}: {np}?",
    "{c}, {np}",
    "{c}'s {np}",
    "I need the {np} of {c}.",
    "Find {c}'s {np}.",
    "Do you know the {np} of {c}?",
    "Please say what the {np} of {c} is.",
    "What does it say about {c}'s {np}?",
    "Could you show me the {np} of {c}, please?",
    "I wonder about the {np} of {c}.",
    "My question is about {c}. Which {np} does it have?",
    "For {c}, what is stated as the {np}?",
    "As for the {np}, what about {c}?",
    "The {np} of {c}, what is it?",
    "Is the {np} of {c} written anywhere?",
    "Which {np} is named for {c}?",
    "How is the {np} of {c} described?",
    "Somebody asked me for {c}'s {np}.",
    "What can be found on {c}'s {np}?",
    "Say what is known of the {np} of {c}.",
    "What do {src} {verb} as the {np} of {c}?",
    "What do {src} {verb} as {c}'s {np}?",
    "Which {np} do {src} {verb} for {c}?",
    "Do {src} {verb} the {np} of {c}?",
    "Going by {src}, what is the {np} of {c}?",
    "Look in {src} for the {np} of {c}.",
    "I am searching {src} for {c}'s {np}.",
    "In {src}, what is put down as the {np} of {c}?",
)
SOURCES = ("these pages", "the records", "the sources", "your notes", "the passages", "the files", "the articles")
VERBS = ("list", "state", "name", "show", "report", "mention", "record")
BEFORE = (
    "According to the text,",
    "Going by what is written here,",
    "From these passages:",
    "In short:",
    "One more thing:",
    "A quick question.",
    "Excuse me,",
    "Hello!",
    "For my notes:",
    "I have read it twice and still don't see it.",
    "My colleague asks:",
    "If you can,",
    "Let me know:",
    "So,",
)
AFTER = (
    "Thanks.",
    "I can't find it.",
    "Just the answer.",
    "Do you see that?",
    "It is for a quiz.",
    "In a word, if you can.",
)


def reword(query: str, country: str, rng: random.Random) -> str:
    """The question in another frame, if it is about "the X of COUNTRY" or "COUNTRY's X", or with words around it.

    A model that only ever sees the six frames of the question files fails on a seventh.
    """
    name, ask = (
        re.escape(country),
        r"(?:What (?:is|are)|Who is|Give|Tell me(?: who)?|I would like to know|Can you tell me)",
    )
    found = country and re.fullmatch(rf"{ask} (?:the ([^,]+) of {name}(?: is)?|{name}'s ([^,]+))[.?]", query)
    if found:
        np, src, verb = found[1] or found[2], rng.choice(SOURCES), rng.choice(VERBS)
        query = rng.choice(FRAMES).format(np=np, c=country, src=src, verb=verb)
        query = query[0].upper() + query[1:]
    if not found or rng.random() < 0.3:
        around = rng.random()
        query = f"{rng.choice(BEFORE)} {query}" if around < 0.7 else query
        query = f"{query} {rng.choice(AFTER)}" if around >= 0.6 else query
    return query


def careless(query: str, rng: random.Random) -> str:
    """A question as it is typed in a hurry: without capitals, a question mark or a letter; now and then in capitals."""
    how = rng.random()
    if how < 0.1:
        return query.upper()
    if how < 0.4:  # a letter is left out
        words = query.split(" ")
        if long := [n for n, word in enumerate(words) if len(word) > 4 and word.isalpha()]:
            n = rng.choice(long)
            at = rng.randrange(1, len(words[n]))
            words[n] = words[n][:at] + words[n][at + 1 :]
        return " ".join(words)
    return query.lower().rstrip("?.") if how < 0.7 else query.lower()


SYLLABLES = (
    "ba be bo bra ca co cor da del do dra el fa fen fi ga gol gra ha hel il ja ka kel ko la lan le lo lu ma mar \
men mi mo na nar ne no nor o pa pel pi qua ra ran ri ro sa sel si so sta ta tan te ti to tu u va ven vi vo wa wen ya \
yor za zan zi".split()
)


def invent_name(rng: random.Random) -> str:
    """A country that doesn't exist: two to four syllables, sometimes with an ending or a second word."""
    name = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) + rng.choice(["", "", "ia", "land", "stan", "n"])
    second = rng.choice(["", "", "", " Islands", " Republic", " " + rng.choice(SYLLABLES).capitalize() + "ra"])
    return name.capitalize() + second


def reading_eval(
    tokenizer: Tokenizer, task: Task, n: int = 64, max_tokens: int = 32, prefix: str = ""
) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for the training loop: answers to `n` examples of `task`, first question only, greedily decoded.

    Gives exact match and F1 of those with their gold document, how often the others abstain, and as `score` the mean of
    the latter two; `prefix` begins their names.
    """
    task.epoch = 10**6  # draws that training doesn't see even on the same questions
    picked = random.Random(0).sample(range(len(task)), min(n, len(task)))
    conversations = [task[i] for i in picked]
    wanted = [next(m["content"] for m in c["messages"] if m["role"] == "assistant") for c in conversations]
    for c in conversations:
        roles = [m["role"] for m in c["messages"]]
        c["messages"] = c["messages"][: roles.index("assistant")]  # the documents and the first question

    def evaluate(model) -> dict[str, float]:
        engine = Engine(model, tokenizer)
        answers = over_ranks(lambda part: engine.answer_batch(part, max_tokens=max_tokens), conversations)
        f1, em, abstained = [], [], []
        for got, want in zip(answers, wanted):
            if is_abstention(want):
                abstained.append(is_abstention(got))
            else:
                gold = [strip_citations(want)]
                f1.append(answer_f1(strip_citations(got), gold))
                em.append(exact_match(strip_citations(got), gold))
        mean = lambda xs: sum(xs) / max(1, len(xs))
        out = ({"f1": mean(f1), "em": mean(em)} if f1 else {}) | ({"abstains": mean(abstained)} if abstained else {})
        out["score"] = mean([out[name] for name in ("f1", "abstains") if name in out])
        return {prefix + name: value for name, value in out.items()}

    return evaluate
