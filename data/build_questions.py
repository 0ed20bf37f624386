"""Write the questions to the factbook passages: single-hop, two-hop, unanswerable.

Called by build.py with the countries of build_factbook.py; nothing runs here by itself. All choices hang on a hash of
the question's id, so the same sources give the same files. A question only joins countries of one split.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable

from build_factbook import Country, Fact
from factbook_asks import MORE
from factbook_fields import FRAMES, HELD_FRAMES, RELATIONS, WHO_FRAMES
from factbook_text import ARTICLE, SPELLINGS, capitalise, slug, stable_key

ABSTENTION = "I don't know based on the provided documents."
BY_NAME = {r.name: r for r in RELATIONS}
HELD_OUT_SINGLE = 2000
HELD_SHARE = 0.3  # share of validation and test questions asked in a wording that training never uses
PARAPHRASES = {"train": 2, "val": 1, "test": 1}

# A country can be named by one of its facts when no other country shares the value.
BRIDGES = {
    "capital": "the country whose capital is {v}",
    "highest_point": "the country whose highest point is {v}",
    "internet_code": "the country with the internet code {v}",
    "chief_of_state": "the country whose chief of state is {v}",
    "head_of_government": "the country whose head of government is {v}",
    "largest_city": "the country whose largest city is {v}",
    "anthem": 'the country whose national anthem is "{v}"',
    "long_name": "the country officially called {v}",
}
BRIDGE_CHOICES = 13  # two-hop questions of this kind for each country
# A country can also be named as the neighbour or partner of another.
LINKS = {
    "longest_border": "the country that shares the longest land border with {c}",
    "neighbours": "the only country that borders {c}",
    "export_partner": "the country that is the main export partner of {c}",
    "import_partner": "the country that is the main import partner of {c}",
}
LINK_CHOICES = 6
SECOND_HOPS = (
    "capital currency official_language highest_point population area anthem chief_of_state head_of_government "
    "legislature largest_city internet_code independence life_expectancy median_age government_type colors symbol "
    "export_partner import_partner export_goods literacy unemployment gdp airports coastline longest_border climate "
    "time_zone long_name holiday_date largest_religion largest_ethnic_group nationality inflation railways"
).split()
COMPARE = {
    "area": ("Which has the larger total area, {a} or {b}?", "Which is bigger by total area, {a} or {b}?"),
    "population": ("Which has the larger population, {a} or {b}?", "Where do more people live, in {a} or in {b}?"),
    "median_age": ("Which has the higher median age, {a} or {b}?", "Where is the median age higher, in {a} or in {b}?"),
    "life_expectancy": (
        "Which has the higher life expectancy, {a} or {b}?",
        "Where do people live longer on average, in {a} or in {b}?",
    ),
    "airports": ("Which has more airports, {a} or {b}?", "Where are there more airports, in {a} or in {b}?"),
    "coastline": ("Which has the longer coastline, {a} or {b}?", "Whose coastline is longer, that of {a} or {b}?"),
    "unemployment": (
        "Which has the higher unemployment rate, {a} or {b}?",
        "Where is unemployment higher, in {a} or {b}?",
    ),
}
# What the passages never tell about any country.
NEVER = [
    "What is the most popular dish in {c}?", "Who is the most famous singer from {c}?",
    "What is the tallest building in {c}?", "Which football club has won most titles in {c}?",
    "What is the emergency phone number in {c}?", "On which side of the road do people drive in {c}?",
    "Who is the minister of education of {c}?", "What does a loaf of bread cost in {c}?",
    "What is the speed limit on motorways in {c}?", "Which is the oldest university in {c}?",
    "What is the most watched television show in {c}?", "Which author from {c} sells most books?",
    "How many Olympic medals has {c} won?", "What is the name of the largest bank in {c}?",
    "What is the average monthly rent in {c}?", "Which plug type do sockets in {c} have?",
    "What is the most common surname in {c}?", "How many cinemas are there in {c}?",
    "What is the record temperature measured in {c}?", "Which newspaper sells most copies in {c}?",
]  # fmt: skip
INVENTED_ASKS = (
    "capital population area currency official_language highest_point chief_of_state head_of_government anthem gdp "
    "life_expectancy neighbours independence internet_code export_partner largest_city literacy climate"
).split()
SYLLABLES = ("ba bel bor cal dar del dor el fal far gal gor hal ib ka kel kor lan lor mal mar mor nal nor or pel quen "
             "ran ros sal sel tar tor ul val var vel vor wes yar zan zel").split()  # fmt: skip
ENDINGS = "ania aria esia ovia istan land mark ora una ella oth avia una ique".split()


def own_asks(relation: str, split: str) -> list[str]:
    """Wordings made for the relation; training has more of them."""
    return BY_NAME[relation].ask + (MORE.get(relation, []) if split == "train" else [])


def wordings(relation: str, c: str, split: str) -> tuple[list[str], list[str]]:
    """(wordings as in training, held-out wordings) of a relation, filled with the country: its own, then frames."""
    rel = BY_NAME[relation]
    seen = own_asks(relation, split) + ((WHO_FRAMES if rel.kind == "person" else FRAMES) if rel.np else [])
    return filled(seen, relation, c), filled([*rel.held, *(HELD_FRAMES if rel.np else [])], relation, c)


def filled(templates: list[str], relation: str, c: str) -> list[str]:
    """The wordings that read well with this country, filled with it, each once."""
    if " " in c and c.startswith("the country"):  # "the country whose capital is X's area" reads badly
        templates = [t for t in templates if "{c}'s" not in t]
    if c.startswith("the ") and c.endswith("s"):
        templates = [t.replace("{c}'s", "{c}'") for t in templates]  # "the Bahamas' capital"
    return list(dict.fromkeys(capitalise(t.format(c=c, np=BY_NAME[relation].np)) for t in templates))


def question(qid: str, split: str, relation: str, c: str, **rest) -> dict:
    """A question row: one wording as `query`, others as `paraphrases`."""
    rng = random.Random(stable_key(qid))
    seen, held = wordings(relation, c, split)
    own = filled(own_asks(relation, split), relation, c)
    picks = rng.sample(seen, k=min(len(seen), 1 + PARAPHRASES[split]))
    if own and not set(own) & set(picks):
        picks[0] = rng.choice(own)
    rng.shuffle(picks)
    row = {"id": qid, "query": picks[0], "paraphrases": picks[1:]}
    if split != "train":
        row["wording"] = "seen"
        if held and rng.random() < HELD_SHARE:
            row |= {"query": rng.choice(held), "paraphrases": picks[: PARAPHRASES[split]], "wording": "held_out"}
    if split == "train":  # other spellings matter where answers are judged; here they only cost space
        rest["answers"] = rest["answers"][:2]
    return row | rest | {"relation": relation}


def accepted(answer: str, variants: Iterable[str]) -> list[str]:
    """The answer and its other spellings, country names included, without repeats."""
    out = [answer, *variants]
    for long, names in ALIASES.items():
        if answer == long:
            out += names
    if answer in ARTICLE:
        out.append(f"the {answer}")
    return list(dict.fromkeys(out))


ALIASES: dict[str, list[str]] = defaultdict(list)
for _short, _long in SPELLINGS.items():
    ALIASES[_long].append(_short)
ALIASES["United States"] += ["U.S.", "United States of America"]
ALIASES["United Kingdom"] += ["U.K.", "Great Britain"]


# Facts that other passages of the country may repeat, and what such a sentence says.
REPEATED = {
    "capital": re.compile(r"\bcapital\b", re.I),
    "chief_of_state": re.compile(r"^The chief of state"),
    "head_of_government": re.compile(r"^The head of government"),
}


def golds(country: Country, fact: Fact) -> list[str]:
    """The fact's own passage, then others of the country in which a sentence says the same."""
    found = [fact.doc_id]
    says = REPEATED.get(fact.relation)
    for doc in country.documents if says else []:
        sentences = re.split(r"(?<=[.;]) ", doc["content"])
        if doc["id"] not in found and any(fact.answer in s and says.search(s) for s in sentences):
            found.append(doc["id"])
    return found


# -- the kinds of question -------------------------------------------------------------------------------------------


def single_hop(countries: list[Country]) -> list[dict]:
    """One question for every fact that may be asked."""
    rows = []
    for c in countries:
        for f in c.facts:
            if f.ask:
                rest = {"answer": f.answer, "answers": accepted(f.answer, f.variants), "positive_ids": golds(c, f),
                        "hops": 1, "type": "single", "country": c.name}  # fmt: skip
                rows.append(question(f"{slug(c.name)}-{f.relation}", c.split, f.relation, c.in_text, **rest))
    return rows


def sample_single(rows: list[dict]) -> list[dict]:
    """At most HELD_OUT_SINGLE single-hop questions of a held-out split, chosen by hash; all others stay."""
    single = sorted((r for r in rows if r["type"] == "single"), key=lambda r: stable_key(r["id"]))
    kept = {r["id"] for r in single[:HELD_OUT_SINGLE]}
    return [r for r in rows if r["type"] != "single" or r["id"] in kept]


def two_hop(countries: list[Country]) -> list[dict]:
    """Questions whose country has to be found in a first passage, and comparisons of two countries."""
    facts = {c.name: {f.relation: f for f in c.facts if f.ask} for c in countries}
    by_name = {c.name: c for c in countries}
    holders = defaultdict(set)
    for c in countries:
        for f in c.facts:
            holders[f.relation, f.answer].add(c.name)
    rows = []
    for c in countries:
        rng = random.Random(stable_key("two-hop " + c.name))
        own = facts[c.name]
        chains = []  # (bridge relation, phrase, country asked about, its first gold, target relation)
        for bridge, phrase in BRIDGES.items():
            if bridge in own and holders[bridge, own[bridge].answer] == {c.name}:
                named = phrase.format(v=own[bridge].answer)
                for target in SECOND_HOPS:
                    apart = target in own and own[target].doc_id != own[bridge].doc_id
                    if apart and own[target].answer not in named:
                        chains.append((bridge, named, c, own[bridge], target))
        chains = rng.sample(chains, min(BRIDGE_CHOICES, len(chains)))
        links = []
        for link, phrase in LINKS.items():
            other = by_name.get(own[link].answer) if link in own else None
            if other and other.split == c.split:
                for target in SECOND_HOPS:
                    if target in facts[other.name] and facts[other.name][target].answer not in (c.name, other.name):
                        links.append((link, phrase.format(c=c.in_text), other, own[link], target))
        for bridge, phrase, asked, first, target in chains + rng.sample(links, min(LINK_CHOICES, len(links))):
            fact = facts[asked.name][target]
            rest = {"answer": fact.answer, "answers": accepted(fact.answer, fact.variants),
                    "positive_ids": [first.doc_id, fact.doc_id], "hops": 2, "type": "two_hop",
                    "bridge_relation": bridge, "bridge": asked.name, "country": c.name}  # fmt: skip
            rows.append(question(f"{slug(c.name)}-{bridge}-{target}", c.split, target, phrase, **rest))
        rows += comparisons(c, countries, facts, rng)
    return rows


def figure(text: str) -> float:
    """'$1.2 billion' -> 1.2e9, '22.3 years' -> 22.3."""
    m = re.search(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not m:
        return 0.0
    number = float(m.group(0).replace(",", ""))
    scale = {"million": 1e6, "billion": 1e9, "trillion": 1e12}
    return number * next((s for word, s in scale.items() if word in text), 1)


def comparisons(c: Country, countries: list[Country], facts: dict, rng: random.Random) -> list[dict]:
    """Three comparisons of a country with others of its split; the figures differ by at least a tenth."""
    rows = []
    others = [o for o in countries if o.split == c.split and o.name != c.name]
    for relation in rng.sample(sorted(COMPARE), len(COMPARE)):
        if len(rows) == 3 or relation not in facts[c.name]:
            continue
        other = next((o for o in rng.sample(others, len(others)) if relation in facts[o.name]), None)
        if other is None:
            continue
        mine, theirs = facts[c.name][relation], facts[other.name][relation]
        x, y = figure(mine.answer), figure(theirs.answer)
        if abs(x - y) <= 0.1 * max(abs(x), abs(y)):  # two of 0 are equal
            continue
        pair = rng.sample([c.in_text, other.in_text], 2)
        asks = [t.format(a=pair[0], b=pair[1]) for t in COMPARE[relation]]
        best = c if x > y else other
        rows.append(
            {"id": f"{slug(c.name)}-or-{slug(other.name)}-{relation}", "query": asks[0], "paraphrases": asks[1:]}
            | ({} if c.split == "train" else {"wording": "seen"})
            | {"answer": best.name, "answers": accepted(best.name, [best.in_text]),
               "positive_ids": [mine.doc_id, theirs.doc_id], "hops": 2, "type": "two_hop",
               "bridge_relation": "compare", "bridge": other.name, "country": c.name, "relation": relation}
        )  # fmt: skip
    return rows


def unanswerable(countries: list[Country]) -> list[dict]:
    """Questions the passages cannot answer: a field the country lacks, a topic never covered, a country that isn't."""
    rows = []

    def add(qid: str, split: str, query: str, others: list[str], reason: str, relation: str, country: str) -> None:
        row = {"id": qid, "query": query, "paraphrases": others}
        row |= {} if split == "train" else {"wording": "seen"}
        row |= {"answer": ABSTENTION, "answers": [ABSTENTION], "positive_ids": [], "hops": 1, "type": "unanswerable"}
        rows.append(row | {"reason": reason, "country": country, "relation": relation, "split": split})

    real = {c.name.lower() for c in countries}
    for c in countries:
        rng = random.Random(stable_key("unanswerable " + c.name))
        said = " ".join(d["content"] for d in c.documents).lower()
        gaps = [m for m in c.missing if BY_NAME[m].ask and not hinted(m, said)]
        if c.name == "United States":  # it has no ambassador to itself
            gaps = [m for m in gaps if m not in {"us_ambassador", "ambassador_to_us"}]
        for relation in rng.sample(gaps, min(3, len(gaps))):
            picks = rng.sample(wordings(relation, c.in_text, c.split)[0], 2)
            add(f"{slug(c.name)}-no-{relation}", c.split, picks[0], picks[1:], "missing_field", relation, c.name)
        for i in rng.sample(range(len(NEVER)), 2):
            ask = capitalise(NEVER[i].format(c=c.in_text))
            add(f"{slug(c.name)}-never-{i}", c.split, ask, [], "never_covered", "", c.name)
        for relation in rng.sample(INVENTED_ASKS, 2):
            name = capitalise("".join(rng.sample(SYLLABLES, 2)) + rng.choice(ENDINGS))
            if name.lower() not in real:
                picks = rng.sample(wordings(relation, name, c.split)[0], 2)
                add(f"{slug(name)}-{relation}", c.split, picks[0], picks[1:], "invented_country", relation, name)
    return list({row["id"]: row for row in rows}.values())


def hinted(relation: str, said: str) -> bool:
    """Whether the country's other passages may hold the answer after all."""
    head = {"chief_of_state": "president", "largest_religion": "religion", "largest_ethnic_group": "ethnic",
            "official_language": "language", "largest_city": "capital", "currency": "per us dollar",
            "independence": "independen", "independence_from": "independen", "railways": "railway",
            "former_name": "", "dependency": "", "capital": "capital", "neighbours": "",
            "longest_border": "", "border_length": "", "legislature": "chamber", "refugees": "refugee",
            "space_agency": "space", "forces": "army", "personnel": "personnel", "population": "inhabit",
            "anthem": "anthem", "highest_court": "court", "lower_chamber": "bicameral", "upper_chamber": "bicameral",
            "lower_seats": "bicameral", "seats": "seats", "term": "serve", "women": "women hold",
            "local_name": "local"}.get(relation)  # fmt: skip
    return head is not None and head in said
