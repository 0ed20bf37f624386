"""What the invented world is made of: the tables of data/fiction, names that nobody has, values of facts.

The tables hold every sentence and question, kinds of entity and kinds of fact; their first lines say how they are read.
Where a table has wordings, those of all splits stand before a #, those that training never sees behind it, and behind
a second one those that only training sees: what a reader met in few wordings it doesn't know in another.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from nanochat.common import DATA

SPLITS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}  # checksum of an invented word, modulo 10
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
UNITS = {"km": "kilometers", "m": "meters", "kg": "kilograms", "cm": "centimeters"}


@dataclass
class Wordings:
    """Ways to say one thing: those of all splits, those that training never sees, and those that only training sees."""

    seen: list[str]
    held: list[str]
    more: list[str]

    @classmethod
    def read(cls, text: str) -> "Wordings":
        return cls(*([w for w in part.split(" / ") if w] for part in (text + " #  # ").split(" # ")[:3]))

    def __call__(self, held: bool) -> list[str]:
        return self.held if held else self.seen


@dataclass
class Relation:
    """A kind of fact: what its values are, how it is told, asked, compared."""

    name: str
    values: str
    np: str
    says: Wordings
    asks: Wordings
    bridge: str  # what a thing is called that is the fact's value
    changes: bool = False
    compare: str = ""

    @classmethod
    def read(cls, name: str, values: str, np: str, says: str, asks: str, compare: str = "") -> "Relation":
        np, _, bridge = np.partition(" > ")
        are, np = ("are", np[1:]) if np[0] == "*" else ("is", np)
        own, told = Wordings.read(asks), Wordings.read(says)
        frames = PHRASES["who" if values.endswith("person") else "ask"]
        filled = [
            [q.replace("{np}", np).replace("What is", f"What {are}") for q in qs] for qs in (frames.seen, frames.held)
        ]
        told.seen = told.seen * 2 + [f"{{C's}} {np} {{{are}}} {{v}}"]
        asks = Wordings(own.seen * 3 + filled[0], own.held * 3 + filled[1], own.more * 3)
        return cls(name.rstrip("~"), values, np, told, asks, bridge or f"the {np} of {{c}}", name[-1] == "~", compare)


@dataclass
class Kind:
    """A kind of entity: its names, what it is called later on, relations and their values, sentences without facts."""

    name: str
    nouns: list[str]
    pronoun: str
    names: list[str]
    relations: dict[str, str]
    second: Relation
    openers: Wordings
    fillers: Wordings

    @classmethod
    def read(cls, name: str, nouns: str, pronoun: str, names: str, relations: str, second: str, *more: str) -> "Kind":
        own = {r: values or RELATIONS[r].values for r, values in re.findall(r"(\w+)(?:\[(.+?)\])?", relations)}
        who = "person" if pronoun == "she" else ""
        related = Relation.read(second.replace(" ", "_"), who, second, "", f"Name the {second} of {{c}}.")
        calls = [n for n in nouns.split("|") if n]
        return cls(name, calls, pronoun, names.split("|"), own, related, *map(Wordings.read, more))


def table(name: str) -> list[list[str]]:
    """The records of a table, one a line, fields between semicolons."""
    lines = (DATA / "fiction" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [[part.strip() for part in line.split(";")] for line in lines if line and line[0] != "#"]


PHRASES = {name: Wordings.read(text) for name, text in table("phrases")}
RELATIONS = {r.name: r for r in (Relation.read(*record) for record in table("relations"))}
KINDS = {k.name: k for k in (Kind.read(*record) for record in table("kinds"))}
PARTS = {name: wordings.seen[0].split() for name, wordings in PHRASES.items()}  # what names are made of


@dataclass
class Value:
    """A fact's value: the answer as documents spell it, other spellings, the entity it is, if it is one, its size."""

    text: str
    variants: list[str] = field(default_factory=list)
    entity: "Entity | None" = None
    size: float = 0.0

    @property
    def answers(self) -> list[str]:
        return list(dict.fromkeys([self.text, *self.variants]))


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


class Names:
    """Invents names and values for one split: its random generator, the names that are taken, the entities by kind."""

    def __init__(self, split: str, seed: int):
        self.split, self.rng = split, random.Random(f"fiction/{split}/{seed}")
        self.taken: set[str] = set()
        self.entities: dict[str, list[Entity]] = {kind: [] for kind in KINDS}

    def word(self, style: str) -> str:
        """An invented word of this split: "x" for anything, "s" a surname, "T" a town."""
        while True:
            word = "".join(self.rng.choice(PARTS[p]) for p in ("heads", "vowels", "hearts", f"tails {style}"))
            if crc32(word.encode()) % 10 in SPLITS[self.split] and word not in PARTS["real"]:
                return word

    def fill(self, pattern: str) -> str:
        """A name such as "{x} Foods"; {t} is a town that exists, {p} a person, {n} a number."""
        rng, towns = self.rng, self.entities["town"]
        pattern = pattern.replace("{p}", f"{rng.choice(PARTS[rng.choice(['female', 'male'])])} {{s}}")
        if "{t}" in pattern:
            pattern = pattern.replace("{t}", rng.choice(towns).name if towns else "{T}")
        pattern = pattern.replace("{n}", str(rng.randint(2, 90)))
        return re.sub(r"\{([xsT])\}", lambda m: self.word(m[1]), pattern)

    def entity(self, kind: Kind) -> Entity:
        """A new entity without facts."""
        while True:
            shown = self.fill(self.rng.choice(kind.names))
            if slug(name := shown.removeprefix("the ")) not in self.taken:
                self.taken.add(slug(name))
                man = kind.pronoun == "she" and shown.split()[0] in PARTS["male"]
                return Entity(name, shown, kind, "he" if man else kind.pronoun)

    def value(self, values: str) -> Value:
        """A value of what a table calls "12-480 m", "@town", "red|blue" and so on."""
        rng, (how, _, rest) = self.rng, values.partition(" ")
        between = lambda: rng.randint(*map(int, rest.split("-")))
        surname = lambda name: [name.split()[-1]] if how.endswith("person") else []
        if how[0] == "@":
            others = self.entities[how[1:]]
            if others and rng.random() < 0.8:
                other = rng.choice(others)
                return Value(other.shown, [other.name, *surname(other.name)], other)
            return Value(new := self.fill(rng.choice(KINDS[how[1:]].names)), [new.removeprefix("the "), *surname(new)])
        if how in ("person", "name"):
            new = self.fill("{p}" if how == "person" else rng.choice(rest.split("|")))
            return Value(new, [new.removeprefix("the "), *surname(new)])
        if how == "list":
            *items, last = rng.sample(rest.split("|"), 3)
            return Value(f"{', '.join(items)} and {last}", [f"{', '.join(items)}, and {last}"])
        if how in ("plain", "word"):
            return Value(str(n := between()) if how == "plain" else NUMBERS[n := between()], [str(n)], size=n)
        if how == "date":
            day, month, year = rng.randint(1, 28), rng.randint(1, 12), between()
            texts = [f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
            rng.shuffle(texts)
            return Value(texts[0], [texts[1], f"{year}-{month:02}-{day:02}"], size=372 * year + 31 * month + day)
        if how == "phone":
            return Value(f"0{rng.randint(20, 99)} {rng.randint(100, 999)} {rng.randint(10, 99)} {rng.randint(10, 99)}")
        if how == "email":
            return Value(f"{rng.choice(['info', 'desk', 'hello', 'office', 'help'])}@{self.word('x').lower()}.example")
        if how == "code":
            return Value(f"{rng.choice('ABCDEFGHKLMNPRTVX')}{rng.choice(['', '-'])}{rng.randint(10, 999)}")
        if how == "version":
            return Value(f"{rng.randint(1, 12)}.{rng.randint(0, 19)}")
        if how == "money" or how[0].isdigit():
            return self.number(rest if how == "money" else values, how == "money")
        return Value(" ".join(rng.choice(part.split("|")) for part in values.split(" + ")))

    def number(self, values: str, money: bool) -> Value:
        """A number between two, small ones more often, with unit or currency in one of their spellings."""
        span, _, unit = values.partition(" ")
        low, high = map(float, span.split("-"))
        x = low * (high / low) ** self.rng.random()
        text = f"{x:.1f}" if "." in span and x < 100 else f"{x:,.0f}"
        plain, size = text.replace(",", ""), float(text.replace(",", ""))
        if money:
            scaled, pattern = f"{text} {unit}".strip(), self.rng.choice(["${}", "€{}", "{} crowns", "{} dollars"])
            named = [scaled + {"$": " dollars", "€": " euros"}[pattern[0]]] if pattern[0] in "$€" else []
            return Value(pattern.format(scaled), [scaled, *named], size=size)
        units = self.rng.sample([unit, UNITS.get(unit, unit)], 2)
        spelled = [f"{n} {u}".strip() for u in units for n in (text, plain)]
        return Value(spelled[0], [*spelled, text, plain], size=size)

    def give_facts(self, e: Entity, relations: Sequence[str], told: Sequence[str] = ()) -> None:
        """A value for each relation; none holds another or stands in `told`, what else the document says."""
        for name in relations:
            others = [*told, e.name, *(v.text for v in e.facts.values())]
            for _ in range(50):
                value = self.value(e.kind.relations[name])
                if value.entity is not e and not any(value.text in o or o in value.text for o in others):
                    e.facts[name] = value
                    break


def fill_in(form: str, **values: str) -> str:
    """`form` with these places filled; any others stay."""
    return re.sub(r"\{([^{}]+)\}", lambda m: values.get(m[1], m[0]), form)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def possessive(text: str) -> str:
    return text + ("'" if text.endswith("s") else "'s")
