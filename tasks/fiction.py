"""An invented world: documents of many kinds about things that don't exist, and questions to them.

    python -m tasks.fiction --split test --output DIR
    python -m nanochat.retrieval prepare_kb --documents DIR/documents.jsonl --output DIR/knowledge_base

    world = make_world("train", n_entities=2000, seed=0)
    task = RAGTask(world.queries, world.documents)

Whoever trains on one kind of prose learns to read one kind of prose; here are sixteen. And whatever a model answers
about this world it has read: no pretraining can have told it. Splits share no names (a name's checksum says to which
it belongs), and some wordings are kept for validation and test: a question there is asked, and a document written, in
wordings that training has or in others, and says so (`wording`).

An entity has one or two documents. They leave out some of what could be told, name other entities of the kind, and
often tell something about a second thing, so that neither a name nor a fitting word is enough to find an answer.
The sentences and questions stand in data/fiction; here is the grammar that puts them together.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

from nanochat.common import DATA, UserError, print0, write_jsonl
from nanochat.config import run
from nanochat.documents import Document
from nanochat.rag_utils import ABSTENTION

# ----------------------------------------------------------------------------------------------------------------------
# Wordings that every relation shares: (for all splits, held out)

ASK = (
    "What is the {np} of {c}?|What is {c}'s {np}?|Tell me the {np} of {c}.|Please give me {c}'s {np}.|"
    "I'd like to know the {np} of {c}.|Find out the {np} of {c}.".split("|"),
    "Could you check the {np} of {c} for me?|Remind me of {c}'s {np}.".split("|"),
)
ASK_WHO = (
    "Who is the {np} of {c}?|Who is {c}'s {np}?|Tell me the name of {c}'s {np}.|Please name the {np} of {c}.".split("|"),
    "By what name is the {np} of {c} known?|I forgot who the {np} of {c} is.".split("|"),
)
SAY = (
    ["{C} {vp}.", "{C} {vp}.", "{C} {vp}.", "Unlike {o}, {c} {vp}.", "According to the records, {c} {vp}.",
     "As many people know, {c} {vp}.", "{C}, not to be confused with {o}, {vp}."],
    ["{C} {vp}.", "{C} {vp}.", "In contrast to {o}, {c} {vp}.", "It is said that {c} {vp}."],
)  # fmt: skip
ASIDES = (
    ["Some compare {c} with {o}.", "There is more to read about {o} elsewhere.", "Opinions on this differ.",
     "Those who want to know more should ask around.", "Not everybody is happy about that.",
     "Much has been said about it since.", "Visitors often ask about {o} instead.", "The details are easy to check.",
     "That was not always so.", "A longer account is in preparation."],
    ["{C} and {o} are often named in one breath.", "Nobody remembers who decided that.",
     "This page is looked over now and then."],
)  # fmt: skip
TITLES = ["{n}", "{n}", "{n} - {k}", "About {n}", "Notes on {n}", "{n}: an overview"]
COMPARE = {  # (question, other wording, whether the larger value wins)
    "founded": ("Which was founded earlier, {a} or {b}?", "Which is older, {a} or {b}?", False),
    "population": ("Where do more people live, in {a} or in {b}?", "Which has more inhabitants, {a} or {b}?", True),
    "length": ("Which is longer, {a} or {b}?", "Which has the greater length, {a} or {b}?", True),
    "height": ("Which is higher, {a} or {b}?", "Which is taller, {a} or {b}?", True),
    "weight": ("Which is heavier, {a} or {b}?", "Which weighs more, {a} or {b}?", True),
    "appeared": ("Which appeared first, {a} or {b}?", "Which has been around longer, {a} or {b}?", False),
    "launched": ("Which was launched earlier, {a} or {b}?", "Which is the older ship, {a} or {b}?", False),
    "born": ("Who was born earlier, {a} or {b}?", "Who is older, {a} or {b}?", False),
}
SECOND = (
    ["{C's} {np}, {s}, {vp}.", "{C's} {np} is {s}, {who} {vp}.", "As for {c}, the {np} is {s}, {who} {vp}."],
    ["Then there is the {np} of {c}: {s} {vp}."],
)
DATED = ["As of {}:", "In the edition of {}:", "Last checked in {}."]
ITS = {"it": "its", "he": "his", "she": "her"}
HELD_SHARE = 0.3  # of validation and test questions, and documents, in held-out wordings

# ----------------------------------------------------------------------------------------------------------------------
# Names and values

HEADS = "B Br D Dr F Fl G Gr H J K Kl Kr L M N P Pl R S Sk St T Tr V W Y Z Th".split()
VOWELS = "a e i o u a e o ei au".split()
HEARTS = "rv nd lm sk rn vr ld mb nt zk lt rsk lv nz rt ld dr sp gl nk".split()
TAILS = {
    "x": "a en ia o is um ara eth une ell ys ane il or essa ovar".split(),
    "s": "ek osh ardi eling quist ova emar ellin asz erby ano ovic estrand ersen uyt".split(),
    "T": "by holm wick stad mouth vale ford ham ton field burg haven".split(),
}
FEMALE = "Clara Nora Edith Irene Marta Judith Helen Sonja Ruth Ada Vera Lucy Paula Greta Agnes Dora Miriam Olive".split()
MALE = "Oscar Hugo Felix Martin Victor Simon Edgar Leo Albert Jonas Bruno Walter Peter Anton Ralph Emil Noah Stefan".split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
UNITS = {"km": "kilometers", "m": "meters", "kg": "kilograms", "cm": "centimeters"}
SPLITS = {"train": range(0, 8), "val": range(8, 9), "test": range(9, 10)}  # checksum of an invented word, modulo 10


@dataclass
class Relation:
    """A kind of fact: what its values are, and how it is told and asked, in wordings (seen, held out)."""

    name: str
    values: str
    np: str
    bridge: str
    says: tuple[list[str], list[str]]
    asks: tuple[list[str], list[str]]
    changes: bool
    plural: bool


@dataclass
class Kind:
    """A kind of entity. `relations` maps names of relations to what their values are for this kind."""

    name: str
    nouns: list[str]
    pronoun: str
    names: list[str]
    relations: dict[str, str]
    second: str
    openers: tuple[list[str], list[str]]
    fillers: tuple[list[str], list[str]]


@dataclass
class Value:
    """A fact's value: the answer as documents spell it, other spellings, and the entity it is, if it is one."""

    text: str
    variants: list[str] = field(default_factory=list)
    entity: "Entity | None" = None
    size: float = 0.0


@dataclass
class Entity:
    """A thing of the world. `docs` says for each fact which documents state it."""

    name: str
    shown: str  # the name with its article
    kind: Kind
    pronoun: str
    facts: dict[str, Value] = field(default_factory=dict)
    docs: dict[str, list[str]] = field(default_factory=dict)
    second: "Entity | None" = None


@dataclass
class World:
    """What `make_world` makes, in the formats of docs/formats.md and data/README.md."""

    documents: dict[str, dict]
    queries: list[dict]
    contradictions: list[dict]


def _records(name: str) -> list[list[str]]:
    lines = (DATA / "fiction" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [[part.strip() for part in line.split(";")] for line in lines if line and not line.startswith("#")]


def _wordings(text: str) -> tuple[list[str], list[str]]:
    seen, _, held = text.partition(" # ")
    return seen.split(" / "), held.split(" / ") if held else []


def _read_relation(name: str, values: str, np: str, says: str, asks: str) -> Relation:
    np, _, bridge = np.partition(" > ")
    seen, held = _wordings(asks)
    who = values.endswith("person")
    frames = ASK_WHO if who else ASK
    verb, np, plural = "are" if np[0] == "*" else "is", np.lstrip("*"), np[0] == "*"
    frames = tuple([q.replace("{np}", np).replace("What is", f"What {verb}") for q in part] for part in frames)
    told, held_told = _wordings(says)
    return Relation(
        name.rstrip("~"), values, np, bridge or f"the {np} of {{c}}", (told + [f"{{C's}} {np} {verb} {{v}}"], held_told),
        (seen + seen + frames[0], held + held + frames[1]), name[-1] == "~", plural,
    )  # fmt: skip


def _read_kind(name: str, nouns: str, pronoun: str, names: str, relations: str, second: str, *texts: str) -> Kind:
    found = re.findall(r"(\w+)(?:\[(.+?)\])?", relations)
    own = {r: values or RELATIONS[r].values for r, values in found}
    nouns = [n for n in nouns.split("|") if n]
    return Kind(name, nouns, pronoun, names.split("|"), own, second, _wordings(texts[0]), _wordings(texts[1]))


RELATIONS = {r.name: r for r in (_read_relation(*record) for record in _records("relations"))}
KINDS = {k.name: k for k in (_read_kind(*record) for record in _records("kinds"))}
LINKED = ("town", "person", "company", "river")  # kinds that other entities refer to: there are more of these


SECONDS = {  # "What is the sister ship of the Palune?"
    k.name: _read_relation(
        k.second.replace(" ", "_"), "person" if k.name == "person" else "", k.second, "", f"Name the {k.second} of {{c}}."
    )
    for k in KINDS.values()
}


class Maker:
    """One world in the making: its random generator, the names that are taken, its entities by kind."""

    def __init__(self, split: str, seed: int):
        self.split, self.rng = split, random.Random(f"fiction/{split}/{seed}")
        self.taken: set[str] = set()
        self.entities: dict[str, list[Entity]] = {kind: [] for kind in KINDS}
        self.documents: dict[str, dict] = {}

    # -- names ---------------------------------------------------------------------------------------------------------

    def word(self, style: str) -> str:
        """An invented word of this split: "x" for anything, "s" a surname, "T" a town."""
        while True:
            start = "".join(self.rng.choice(part) for part in (HEADS, VOWELS, HEARTS))
            word = start + self.rng.choice(TAILS[style])
            if crc32(word.encode()) % 10 in SPLITS[self.split]:
                return word

    def fill(self, pattern: str) -> str:
        """A name of a pattern such as "{x} Foods"; {t} is a town that exists, {p} a person, {n} a number."""
        towns = self.entities["town"]
        first = self.rng.choice(self.rng.choice([FEMALE, MALE]))
        values = {style: self.word(style) for style in TAILS}
        values |= {"t": self.rng.choice(towns).name if towns else values["T"], "p": f"{first} {values['s']}"}
        return pattern.format(**values, n=self.rng.randint(2, 90))

    def entity(self, kind: Kind) -> Entity:
        """A new entity without facts."""
        while True:
            shown = self.fill(self.rng.choice(kind.names))
            name = shown.removeprefix("the ")
            if slug(name) not in self.taken:
                self.taken.add(slug(name))
                pronoun = kind.pronoun if kind.pronoun == "it" else "he" if shown.split()[0] in MALE else "she"
                return Entity(name, shown, kind, pronoun)

    # -- values --------------------------------------------------------------------------------------------------------

    def value(self, values: str) -> Value:
        """A value of what a table calls "1872-1915", "@town", "red|blue" and so on."""
        rng, (how, _, rest) = self.rng, values.partition(" ")
        if how[0] == "@":
            others = self.entities[how[1:]]
            if others and (how != "@person" or rng.random() < 0.7):
                other = rng.choice(others)
                return Value(other.shown, [other.name, *self.short(other.name, how)], other)
            new = self.fill(rng.choice(KINDS[how[1:]].names))
            return Value(new, self.short(new, how))
        if how in ("person", "name"):
            text = self.fill("{p}" if how == "person" else rng.choice(rest.split("|")))
            return Value(text, [text.removeprefix("the "), *self.short(text, how)])
        if how == "list":
            items = rng.sample(rest.split("|"), 3)
            return Value(f"{items[0]}, {items[1]} and {items[2]}", [f"{items[0]}, {items[1]}, and {items[2]}"])
        if how == "year":
            year = rng.randint(*map(int, rest.split("-")))
            return Value(str(year), [f"in {year}"], size=year)
        if how == "date":
            day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(*map(int, rest.split("-")))
            name, size = MONTHS[month - 1], 372 * year + 31 * month + day
            spellings = [f"{day} {name} {year}", f"{name} {day}, {year}"]
            rng.shuffle(spellings)
            return Value(*spellings[:1], [spellings[1], f"{year}-{month:02}-{day:02}"], size=size)
        if how == "word":
            n = rng.randint(*map(int, rest.split("-")))
            return Value(WORDS[n], [str(n)], size=n)
        if how == "money":
            return self.number(rest, rng.choice(["${}", "€{}", "{} crowns", "{} dollars"]))
        if how == "phone":
            return Value(f"0{rng.randint(20, 99)} {rng.randint(100, 999)} {rng.randint(10, 99)} {rng.randint(10, 99)}")
        if how == "email":
            return Value(f"{rng.choice(['info', 'desk', 'hello', 'office', 'help'])}@{self.word('x').lower()}.example")
        if how == "code":
            return Value(f"{rng.choice('ABCDEFGHKLMNPRTVX')}{rng.choice(['', '-', ' '])}{rng.randint(10, 999)}")
        if how == "version":
            return Value(f"{rng.randint(1, 12)}.{rng.randint(0, 19)}")
        if how[0].isdigit():
            return self.number(values, "{}")
        return Value(" ".join(rng.choice(part.split("|")) for part in values.split(" + ")))

    def short(self, name: str, how: str) -> list[str]:
        """A person may be called by surname."""
        return [name.split()[-1]] if how.endswith("person") else []

    def number(self, values: str, money: str) -> Value:
        """A number between two, small ones more often, with its unit or currency in one of their spellings."""
        span, _, unit = values.partition(" ")
        low, high = map(float, span.split("-"))
        x = low * (high / low) ** self.rng.random()
        plain = f"{x:.1f}" if "." in span and x < 100 else str(round(x))
        text = f"{round(x):,}" if "." not in plain else plain
        long = UNITS.get(unit, unit)
        if money != "{}":
            scaled = f"{text} {unit}".strip()
            named = f"{scaled} dollars" if "$" in money else f"{scaled} euros" if "€" in money else ""
            return Value(money.format(scaled), [scaled, named] if named else [scaled], size=x)
        text, *variants = [f"{n} {u}".strip() for u in self.rng.sample([unit, long], 2) for n in (text, plain)] + [text, plain]
        return Value(text, variants, size=x)

    def give_facts(self, e: Entity, relations: Sequence[str], told: Sequence[str] = ()) -> None:
        """A value for each relation, none of which holds another or stands in `told` (what else the document says)."""
        for name in relations:
            for _ in range(50):
                value = self.value(e.kind.relations[name])
                others = [*told, e.name, *(v.text for v in e.facts.values())]
                if not any(value.text in o or o in value.text for o in others) and value.entity is not e:
                    e.facts[name] = value
                    break

    # -- documents -----------------------------------------------------------------------------------------------------

    def held(self) -> bool:
        """Whether the next question or document is in held-out wordings."""
        return self.split != "train" and self.rng.random() < HELD_SHARE

    def render(self, form: str, e: Entity, near: bool = False, **values: str) -> str:
        """A sentence about `e`; `near` if the one before was about nothing else, so that a pronoun is understood."""
        rng, alone = self.rng, "{o}" not in form
        name = rng.choice([e.shown, e.shown, *e.kind.nouns]) if alone else e.shown
        start = rng.choice([name, e.pronoun]) if near and alone else name
        whose = ITS[e.pronoun] if start == e.pronoun else possessive(start)
        values |= {"C": capital(start), "C's": capital(whose), "c": name, "p": ITS[e.pronoun]}
        return capital(form.format(**values, o="" if alone else self.other(e))).rstrip(".") + "."

    def other(self, e: Entity) -> str:
        """The name of another entity of the kind."""
        others = self.entities[e.kind.name]
        found = self.rng.choice(others).shown if others else e.shown
        return found if found != e.shown else self.fill(e.kind.names[0])

    def state(self, e: Entity, name: str, held: bool, verb_only: bool = False) -> str:
        """A fact as one of its sentences, still with {c}, or as a verb phrase; "" if it has none."""
        forms = [f for f in part(RELATIONS[name].says, held) if not (verb_only and "{c" in f.lower())]
        return self.rng.choice(forms).replace("{v}", e.facts[name].text).replace("{p}", ITS[e.pronoun]) if forms else ""

    def tell(self, e: Entity, names: Sequence[str], second: Entity | None, held: bool) -> str:
        """A document's text: facts in any order, alone or two to a sentence, among sentences that say nothing."""
        rng, kind, said, near = self.rng, e.kind, [], False
        shuffled = lambda texts: rng.sample(texts, len(texts))
        facts = shuffled(list(names))
        listed = [facts.pop() for _ in range(3)] if rng.random() < 0.1 else []
        asides = shuffled([*part(kind.fillers, held), *rng.sample(part(ASIDES, held), 2)])
        steps = shuffled(["fact"] * len(facts) + ["aside"] * rng.randint(1, 3) + ["second"] * (second is not None))
        if rng.random() < 0.7:
            said, near = [self.render(rng.choice(part(kind.openers, held)), e)], True
        while steps or (asides and sum(len(s.split()) for s in said) < 62):
            step = steps.pop() if steps else "aside"
            if step == "second" and second:
                text = " and ".join(filter(None, (self.state(second, r, held, verb_only=True) for r in second.facts)))
                form = rng.choice(part(SECOND, held)).replace("{s}", second.shown).replace("{vp}", text)
                who = "who" if kind.name == "person" else "which"
                said.append(self.render(form.replace("{np}", kind.second).replace("{who}", who), e))
            elif step == "aside" and asides:
                said.append(self.render(asides.pop(), e))
            elif step == "fact" and facts:
                text = self.state(e, name := facts.pop(), held)
                if "{c" not in text.lower():
                    more = facts and " and " not in text and rng.random() < 0.35
                    more = more and self.state(e, facts[-1], held, verb_only=True)
                    if more and " and " not in more:
                        text, _ = f"{text} and {more}", facts.pop()
                    text = rng.choice(part(SAY, held)).replace("{vp}", text)
                said.append(self.render(text, e, near))
            near = step == "fact" and "{o}" not in text
        if listed:
            points = "; ".join(f"{RELATIONS[r].np} {e.facts[r].text}" for r in listed)
            said.append(f"{'At a glance' if held else 'In brief'}: {points}.")
        return " ".join(said)

    def add_documents(self, e: Entity) -> None:
        """Facts for `e`, all but some of its kind's, and the one or two documents that tell them."""
        rng, kind = self.rng, e.kind
        own = rng.sample(list(kind.relations), len(kind.relations) - rng.randint(1, 2))
        if rng.random() < 0.75:
            own = own[: rng.randint(6, min(len(own), 9))]
            parts = [own]
        else:  # two documents, some facts in both
            parts = [own[: max(6, len(own) // 2)], own[min(len(own) - 6, len(own) // 2) :]]
        self.give_facts(e, own)
        if rng.random() < 0.6:
            e.second = self.entity(kind)
            self.give_facts(e.second, rng.sample(list(kind.relations), 2), [v.text for v in e.facts.values()])
        titles = rng.sample(TITLES[1:], len(parts))
        for n, (names, title) in enumerate(zip(parts, titles), 1):
            held, second = self.held(), e.second if n == 1 else None
            text = self.tell(e, [r for r in names if r in e.facts], second, held)
            doc = {"id": f"{slug(e.name)}-{n}", "title": title.format(n=e.name, k=kind.name), "content": text,
                   "source": "fiction", "entity": e.name, "country": e.name, "section": kind.name,
                   "split": self.split}  # fmt: skip
            self.documents[doc["id"]] = doc | self.wording(held)
            for told, whose in ((names, e), (list(second.facts) if second else [], second)):
                for r in told:
                    if whose and r in whose.facts:
                        whose.docs.setdefault(r, []).append(doc["id"])

    def wording(self, held: bool) -> dict[str, str]:
        return {} if self.split == "train" else {"wording": "held_out" if held else "seen"}

    # -- questions -----------------------------------------------------------------------------------------------------

    def ask(self, qid: str, relation: Relation, c: str, answer: Value | None, docs: list[str], **more) -> dict:
        """A question about what is called `c`; without an answer the right one is to abstain."""
        rng, held = self.rng, self.held()
        plain = lambda asks: [q for q in asks if "bridge" not in more or "{c}'s" not in q]
        fill = lambda q: capital(q.replace("{c}'s", possessive(c)).replace("{c}", c))
        asks = plain(relation.asks[0])
        picks = list(dict.fromkeys(map(fill, rng.sample(asks, len(asks)))))
        if held:
            picks.insert(0, fill(rng.choice(plain(relation.asks[1]))))
        row = {"id": qid, "query": picks[0], "paraphrases": picks[1 : 3 if self.split == "train" else 2]}
        row |= self.wording(held)
        text = answer.text if answer else ABSTENTION
        row |= {"answer": text, "answers": list(dict.fromkeys([text, *(answer.variants if answer else [])]))}
        row |= {"positive_ids": docs, "hops": 1, "type": "single" if answer else "unanswerable"} | more
        return row | {"relation": relation.name}

    def questions(self, e: Entity) -> list[dict]:
        """Every fact of the entity and of the second thing in its document, and what nothing tells about them."""
        rng, rows = self.rng, []
        for x in filter(None, (e, e.second)):
            for name, docs in x.docs.items():
                rows.append(self.ask(f"{slug(x.name)}-{name}", RELATIONS[name], x.shown, x.facts[name], docs, country=x.name))
            missing = [r for r in e.kind.relations if r not in x.facts]
            for name in rng.sample(missing, 1) if x is e or rng.random() < 0.5 else []:
                more = {"reason": "missing_field", "country": x.name}
                rows.append(self.ask(f"{slug(x.name)}-no-{name}", RELATIONS[name], x.shown, None, [], **more))
        if e.second:
            relation, found = SECONDS[e.kind.name], Value(e.second.shown, [e.second.name])
            docs = next(iter(e.second.docs.values()))
            rows.append(self.ask(f"{slug(e.name)}-{relation.name}", relation, e.shown, found, docs[:1], country=e.name))
        if rng.random() < 0.3:
            name, nobody = rng.choice(list(e.kind.relations)), self.entity(e.kind)
            more = {"reason": "invented_entity", "country": nobody.name}
            rows.append(self.ask(f"{slug(nobody.name)}-{name}", RELATIONS[name], nobody.shown, None, [], **more))
        return rows

    def two_hops(self, e: Entity) -> list[dict]:
        """Questions about an entity that another's document names, and a comparison."""
        rng, rows, two = self.rng, [], {"hops": 2, "type": "two_hop"}
        for link, value in e.facts.items():
            other = value.entity
            if not other or not other.docs:
                continue
            name = rng.choice(list(other.docs))
            called, answer = RELATIONS[link].bridge.format(c=e.shown), other.facts[name]
            docs = [e.docs[link][0], other.docs[name][0]]
            if answer.text not in called and e.name not in answer.text:
                more = two | {"bridge_relation": link, "bridge": other.name, "country": e.name}
                rows.append(self.ask(f"{slug(e.name)}-{link}-{name}", RELATIONS[name], called, answer, docs, **more))
        other = rng.choice(self.entities[e.kind.name])
        for name in [r for r in COMPARE if r in e.docs and r in other.docs and other is not e][:1]:
            *asks, larger = COMPARE[name]
            pair = rng.sample([e, other], 2)
            x, y = (z.facts[name].size for z in pair)
            if abs(x - y) < (0.1 * max(x, y) if larger else 1):
                continue
            best = pair[0] if (x > y) == larger else pair[1]
            relation = replace(RELATIONS[name], asks=([q.format(a=pair[0].shown, b=pair[1].shown) for q in asks],) * 2)
            more = two | {"bridge_relation": "compare", "bridge": other.name, "country": e.name}
            docs, found = [e.docs[name][0], other.docs[name][0]], Value(best.shown, [best.name])
            rows.append(self.ask(f"{slug(e.name)}-or-{slug(other.name)}-{name}", relation, "", found, docs, **more))
        return rows

    def contradictions(self, e: Entity) -> list[dict]:
        """A fact that an older passage tells otherwise, with and without the years of the passages."""
        rng = self.rng
        names = [r for r in e.docs if RELATIONS[r].changes]
        if len(e.docs) < 2 or not names:
            return []
        name = rng.choice(names)
        old = replace(e, facts=dict(e.facts), docs={})
        del old.facts[name]
        self.give_facts(old, [name])
        if name not in old.facts or old.facts[name].text == e.facts[name].text:
            return []
        relation, beside, prefix = RELATIONS[name], rng.choice([r for r in e.docs if r != name]), rng.choice(DATED)
        form = rng.choice([f for f in relation.says[0] if "{c" not in f.lower()])
        company = self.render("{C} {vp}.", e, vp=self.state(e, beside, False, verb_only=True))
        sides = []
        for x, date in ((old, rng.randint(2005, 2014)), (e, rng.randint(2016, 2025))):
            fact = form.replace("{v}", x.facts[name].text).replace("{p}", ITS[e.pronoun])
            passage = f"{company} {capital(e.shown)} {fact}."
            value = x.facts[name]
            sides.append({"answer": value.text, "answers": list(dict.fromkeys([value.text, *value.variants])),
                          "date": str(date), "title": e.name, "passage": f"{prefix.format(date)} {passage}",
                          "passage_undated": passage})  # fmt: skip
        query = self.ask("", relation, e.shown, None, [])["query"]
        row = {"id": f"{slug(e.name)}-{name}-contradiction", "query": query, "country": e.name, "split": self.split}
        return [row | {"relation": name, "old": sides[0], "new": sides[1] | {"doc_ids": e.docs[name]}}]


def part(texts: tuple[list[str], list[str]], held: bool) -> list[str]:
    return texts[1] if held else texts[0]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def possessive(text: str) -> str:
    return text + ("'" if text.endswith("s") else "'s")


def make_world(split: str = "train", n_entities: int = 2000, seed: int = 0) -> World:
    """`n_entities` invented things of a split with their documents and questions; the same for the same arguments.

    Raises UserError on a split other than train, val and test, or on less than one entity.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose train, val or test")
    if n_entities < 1:
        raise UserError(f"a world of {n_entities} entities; at least 1")
    make = Maker(split, seed)
    kinds = [*LINKED, *KINDS]
    for kind in LINKED + tuple(k for k in KINDS if k not in LINKED):  # towns first: others have their names
        for _ in range(kinds.count(kind) * n_entities // len(kinds) + (kinds.index(kind) < n_entities % len(kinds))):
            make.entities[kind].append(make.entity(KINDS[kind]))
    entities = [e for group in make.entities.values() for e in group]
    for e in entities:
        make.add_documents(e)
    queries = [row for e in entities for row in make.questions(e) + make.two_hops(e)]
    contradictions = [row for e in entities for row in make.contradictions(e)]
    return World(make.documents, queries, contradictions)


def documents_of(world: World) -> list[Document]:
    """The documents as retrieval takes them (build_kb, SimpleRetriever)."""
    return [Document.from_dict(doc) for doc in world.documents.values()]


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
