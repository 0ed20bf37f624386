"""An invented world: documents of many kinds about things that don't exist, and questions to them.

    python -m tasks.fiction --split test --output DIR
    python -m nanochat.retrieval prepare_kb --documents DIR/documents.jsonl --output DIR/knowledge_base

    world = make_world("train", n_entities=2000, seed=0)
    task = RAGTask(world.queries, world.documents)

Whoever trains on one kind of prose learns to read one kind of prose; here are sixteen. And whatever a model answers
about this world it has read: no pretraining can have told it. Splits share no invented word (its checksum says to which
it belongs), and some wordings are kept for validation and test: a question there is asked, and a document written, in
wordings that training has or in others, and says so (`wording`).

An entity has one or two documents. They leave out some of what could be told, name other entities of the kind, and
often tell something about a second thing, so that neither a name nor a fitting word is enough to find an answer.
The sentences and questions stand in data/fiction; here is the grammar that puts them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from nanochat.common import UserError, print0, write_jsonl
from nanochat.config import run
from nanochat.rag_utils import ABSTENTION
from tasks.fiction_words import (
    KINDS,
    PHRASES,
    RELATIONS,
    SPLITS,
    Entity,
    Names,
    Relation,
    Value,
    Wordings,
    capital,
    fill_in,
    possessive,
    slug,
)

HELD_SHARE = 0.3  # of validation and test questions, and of their documents, are in held-out wordings
LINKED = ("river", "town", "person", "company")  # kinds that others refer to: twice as many of these, and made first
ITS = {"it": "its", "he": "his", "she": "her"}


@dataclass
class World:
    """Documents by id, questions, contradictions, in the formats of docs/formats.md and data/README.md."""

    documents: dict[str, dict]
    queries: list[dict]
    contradictions: list[dict]


def make_world(split: str = "train", n_entities: int = 2000, seed: int = 0) -> World:
    """`n_entities` invented things of a split with their documents and questions; same arguments, same world.

    Raises UserError on a split other than train, val and test, or on less than one entity.
    """
    if split not in SPLITS:
        raise UserError(f"no split '{split}'; choose train, val or test")
    if n_entities < 1:
        raise UserError(f"a world of {n_entities} entities; at least 1")
    make, order = Maker(split, seed), [*KINDS, *LINKED]
    for kind in sorted((order[n % len(order)] for n in range(n_entities)), key=[*LINKED, *KINDS].index):
        make.entities[kind].append(make.entity(KINDS[kind]))
    entities = [e for group in make.entities.values() for e in group]
    for e in entities:
        make.add_documents(e)
    queries = [row for e in entities for row in make.questions(e) + make.two_hops(e)]
    return World(make.documents, queries, [row for e in entities for row in make.contradictions(e)])


class Maker(Names):
    """A world in the making."""

    def __init__(self, split: str, seed: int):
        super().__init__(split, seed)
        self.documents: dict[str, dict] = {}

    def held(self) -> bool:
        """Whether what comes next is in held-out wordings."""
        return self.split != "train" and self.rng.random() < HELD_SHARE

    def wording(self, held: bool) -> dict[str, str]:
        return {} if self.split == "train" else {"wording": "held_out" if held else "seen"}

    def state(self, e: Entity, name: str, held: bool, predicate: bool = False) -> str:
        """A fact as one of its sentences, still with {c}, or as what follows a subject."""
        forms = [f for f in RELATIONS[name].says(held) if not (predicate and "{c" in f.lower())]
        was = {"is": "was", "are": "were"} if e.kind.pronoun == "she" else {"is": "is", "are": "are"}
        return fill_in(self.rng.choice(forms), v=e.facts[name].text, p=ITS[e.pronoun], **was)

    def render(self, form: str, e: Entity, called: Sequence[str] = (), **values: str) -> str:
        """A sentence about `e` by name, or by one of the things that it may be `called` just here."""
        rng, others = self.rng, self.entities[e.kind.name]
        start = rng.choice([e.shown, e.shown, *called]) if "{o}" not in form.lower() else e.shown
        inner = start if start != e.pronoun else e.shown
        other = ""
        if start == e.shown and "{o}" in form.lower():
            other = next((o.shown for o in rng.choices(others, k=9) if o is not e), "") or self.fill(e.kind.names[0])
        whose = possessive(start) if start != e.pronoun else ITS[start]
        values |= {"C": start, "C's": whose, "c": inner, "O": other, "o": other}
        return capital(fill_in(form, **values).rstrip(".")) + "."

    def tell(self, e: Entity, names: Sequence[str], second: Entity | None, held: bool) -> str:
        """A document's text: facts in any order, one or two to a sentence, among sentences that tell nothing."""
        rng, kind, pick = self.rng, e.kind, lambda key: self.rng.choice(PHRASES[key](held))
        facts = rng.sample(names, len(names))
        listed = [facts.pop() for _ in range(3)] if rng.random() < 0.1 else []
        asides = kind.fillers(held) + rng.sample(PHRASES["aside"](held), 2) + rng.sample(kind.fillers.seen, 2)
        asides = list(dict.fromkeys(asides))
        rng.shuffle(asides)
        steps = ["fact"] * len(facts) + ["aside"] * rng.randint(1, 3) + ["second"] * bool(second)
        rng.shuffle(steps)
        said, called = [], []
        if rng.random() < 0.7:
            said, called = [self.render(rng.choice(kind.openers(held)), e)], [*kind.nouns, e.pronoun, e.pronoun]
        while steps or (asides and sum(len(s.split()) for s in said) < 62):
            step = steps.pop() if steps else "aside"
            if step == "second" and second:
                vp = " and ".join(self.state(second, r, held, predicate=True) for r in second.facts)
                who = "who" if kind.pronoun == "she" else "which"
                said.append(self.render(pick("second"), e, np=kind.second.np, s=second.shown, who=who, vp=vp))
                called = []
            elif step == "aside" and asides and sum(map(len, said)) < 620:
                said.append(self.render(asides.pop(), e))
                called = kind.nouns
            elif facts:
                form = self.state(e, facts.pop(), held)
                if "{c" not in form.lower():
                    more = self.state(e, facts[-1], held, predicate=True) if facts and rng.random() < 0.35 else " and "
                    if " and " not in form + more and form.split()[:2] != more.split()[:2]:
                        form, _ = f"{form} and {more}", facts.pop()
                    form = fill_in(pick("say") if sum(map(len, said)) < 700 else "{C} {vp}.", vp=form)
                said.append(self.render(form, e, called))
                called = [*kind.nouns, e.pronoun, e.pronoun] if "{o}" not in form.lower() else kind.nouns
        if listed:
            points = "; ".join(f"{RELATIONS[r].np} {e.facts[r].text}" for r in listed)
            said.append(fill_in(pick("brief"), points=points))
        return " ".join(said)

    def add_documents(self, e: Entity) -> None:
        """Facts for `e`, all but some of its kind's, and the one or two documents that tell them."""
        rng, kind = self.rng, e.kind
        self.give_facts(e, rng.sample(list(kind.relations), len(kind.relations) - rng.randint(1, 2)))
        names = list(e.facts)
        if rng.random() < 0.75:
            parts = [names[: rng.randint(6, 9)]]
            e.facts = {r: e.facts[r] for r in parts[0]}
        else:  # some facts stand in both
            parts = [names[:6], names[-6:]]
        if rng.random() < 0.6:
            e.second = self.entity(kind)
            self.give_facts(e.second, rng.sample(list(kind.relations), 2), [v.text for v in e.facts.values()])
        for n, told, title in zip(count(1), parts, rng.sample(PHRASES["title"].seen, 2)):
            held, second = self.held(), e.second if n == 1 else None
            for _ in range(20):
                text = self.tell(e, told, second, held)
                if 60 <= len(text.split()) <= 160:
                    break
            doc = {"id": f"{slug(e.name)}-{n}", "title": fill_in(title, n=e.name, k=kind.name)}
            doc |= {"content": text, "source": "fiction", "entity": e.name}
            doc |= {"country": e.name, "section": kind.name, "split": self.split} | self.wording(held)
            self.documents[doc["id"]] = doc
            for r in told:
                e.docs.setdefault(r, []).append(doc["id"])
            if second:
                second.docs = {r: [doc["id"]] for r in second.facts}

    def ask(self, id: str, relation: Relation, c: str, answer: Value | None, docs: Sequence[str] = (), **more) -> dict:
        """A question row about what is called `c`; without an answer the right one is to abstain."""
        rng, held = self.rng, self.held()
        seen = relation.asks.seen + (relation.asks.more if self.split == "train" else [])
        kept = relation.asks.held if held else []
        if "bridge" in more:  # "the founder of the Palune's birthplace" would be read otherwise
            seen, kept = ([q for q in asks if "{c}'s" not in q] for asks in (seen, kept))
        order = [*rng.sample(kept, bool(kept)), *dict.fromkeys(rng.sample(seen, len(seen)))][:4]
        picks = [capital(q.replace("{c}'s", possessive(c)).replace("{c}", c)) for q in order]
        row = {"id": id, "query": picks[0], "paraphrases": picks[1 : 3 if self.split == "train" else 2]}
        row |= self.wording(bool(kept))
        row |= (
            {"answer": answer.text, "answers": answer.answers}
            if answer
            else {"answer": ABSTENTION, "answers": [ABSTENTION]}
        )
        row |= {"positive_ids": list(docs), "hops": 1, "type": "single" if answer else "unanswerable"}
        return row | more | {"relation": relation.name}

    def questions(self, e: Entity) -> list[dict]:
        """All that is told about an entity and the second thing in its document, and some of what isn't."""
        rng, kind, rows = self.rng, e.kind, []
        for x in (e, e.second) if e.second else (e,):
            about = {"country": x.name}
            for r, docs in x.docs.items():
                rows.append(self.ask(f"{slug(x.name)}-{r}", RELATIONS[r], x.shown, x.facts[r], docs, **about))
            if x is e or rng.random() < 0.5:
                r = rng.choice([r for r in kind.relations if r not in x.facts])
                told = list(dict.fromkeys(id for docs in x.docs.values() for id in docs))
                about |= {"reason": "missing_field", "about_ids": told}
                rows.append(self.ask(f"{slug(x.name)}-no-{r}", RELATIONS[r], x.shown, None, **about))
        if e.second:
            other, docs = e.second, next(iter(e.second.docs.values()))
            answer = Value(other.shown, [other.name, *([other.name.split()[-1]] if kind.pronoun == "she" else [])])
            rows.append(self.ask(f"{slug(e.name)}-second", kind.second, e.shown, answer, docs, country=e.name))
        if rng.random() < 0.3:
            nobody, r = self.entity(kind), rng.choice(list(kind.relations))
            about = {"country": nobody.name, "reason": "invented_entity", "about_ids": []}
            rows.append(self.ask(f"{slug(nobody.name)}-{r}", RELATIONS[r], nobody.shown, None, **about))
        return rows

    def two_hops(self, e: Entity) -> list[dict]:
        """Questions about the entities that its documents name as facts, and a comparison with another."""
        rng, rows, two = self.rng, [], {"hops": 2, "type": "two_hop", "country": e.name}
        for link, other in [(r, v.entity) for r, v in e.facts.items() if v.entity]:
            r = rng.choice(list(other.docs))
            called, answer = RELATIONS[link].bridge.replace("{c}", e.shown), other.facts[r]
            if answer.text not in called and e.name not in answer.text:
                more = two | {"bridge_relation": link, "bridge": other.name}
                docs = [e.docs[link][0], other.docs[r][0]]
                rows.append(self.ask(f"{slug(e.name)}-{link}-{r}", RELATIONS[r], called, answer, docs, **more))
        other = rng.choice(self.entities[e.kind.name])
        both = [
            r for r in e.docs if RELATIONS[r].compare and r in other.docs and e.facts[r].size != other.facts[r].size
        ]
        if other is not e and both:
            r, (a, b) = rng.choice(both), rng.sample([e, other], 2)
            wins, asks = RELATIONS[r].compare[0], RELATIONS[r].compare[2:]
            best = a if (a.facts[r].size > b.facts[r].size) == (wins == ">") else b
            relation = replace(RELATIONS[r], asks=Wordings.read(fill_in(asks, a=a.shown, b=b.shown)))
            more = two | {"bridge_relation": "compare", "bridge": other.name}
            docs, found = [e.docs[r][0], other.docs[r][0]], Value(best.shown, [best.name])
            rows.append(self.ask(f"{slug(e.name)}-or-{slug(other.name)}-{r}", relation, "", found, docs, **more))
        return rows

    def contradictions(self, e: Entity) -> list[dict]:
        """A fact that an older passage tells otherwise; passages with and without their years."""
        rng, changing = self.rng, [r for r in e.docs if RELATIONS[r].changes]
        if not changing:
            return []
        name = rng.choice(changing)
        relation, old = RELATIONS[name], replace(e, facts={r: v for r, v in e.facts.items() if r != name})
        self.give_facts(old, [name], [e.facts[name].text])
        if name not in old.facts:
            return []
        beside = self.state(e, rng.choice([r for r in e.docs if r != name]), False, predicate=True)
        form = rng.choice([f for f in relation.says.seen if "{c" not in f.lower()])
        dated, sides = rng.choice(PHRASES["dated"].seen), []
        for x, date in ((old, str(rng.randint(2005, 2014))), (e, str(rng.randint(2016, 2025)))):
            fact = fill_in(form, v=x.facts[name].text, p=ITS[e.pronoun])
            passage = f"{capital(e.shown)} {beside}. {capital(e.shown)} {fact}."
            side = {"answer": x.facts[name].text, "answers": x.facts[name].answers, "date": date, "title": e.name}
            side |= {"passage": f"{fill_in(dated, d=date)} {passage}", "passage_undated": passage}
            sides.append(side)
        row = {"id": f"{slug(e.name)}-{name}-contradiction", "query": self.ask("", relation, e.shown, None)["query"]}
        row |= {"country": e.name, "split": self.split, "relation": name}
        return [row | {"old": sides[0], "new": sides[1] | {"doc_ids": e.docs[name]}}]


@dataclass
class Config:
    """The world to write."""

    split: str = "test"  # train, val or test: whose names and wordings
    output: str = ""  # the folder to write documents.jsonl and queries/ into
    n_entities: int = 2000  # how many things there are
    seed: int = 0  # another number, another world


def main(config: Config) -> None:
    if not config.output:
        raise UserError("give --output, the folder to write")
    world, output = make_world(config.split, config.n_entities, config.seed), Path(config.output)
    write_jsonl(output / "documents.jsonl", world.documents.values())
    write_jsonl(output / "queries" / f"{config.split}.jsonl", world.queries)
    write_jsonl(output / "queries" / "contradictions.jsonl", world.contradictions)
    print0(f"{output}: {len(world.documents)} documents, {len(world.queries)} questions")


if __name__ == "__main__":
    run(main, Config)
