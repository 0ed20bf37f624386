"""Find facts that the 2025 World Factbook and its edition of about 2015 tell differently. Called by build.py.

Each row has one question and two passages of the same shape, one for each edition, with and without dates, so that an
evaluation can ask whether a model takes the newer one, and what it does when nothing tells which is newer.
"""

import json
import re
from pathlib import Path

from build_factbook import Country
from build_questions import accepted, golds, wordings
from factbook_cuts import CUTS, Cut
from factbook_fields import RELATIONS
from factbook_text import capitalise, clean, look_up, slug, stable_key

BY_NAME = {r.name: r for r in RELATIONS}
OLD_DATE, NEW_DATE = "2015", "2025"
# Where the older edition keeps the relations that change within ten years.
OLD_PATHS = {
    "chief_of_state": "Government/Executive branch/chief of state",
    "head_of_government": "Government/Executive branch/head of government",
    "us_ambassador": "Government/Diplomatic representation from the US/chief of mission",
    "ambassador_to_us": "Government/Diplomatic representation in the US/chief of mission",
    "population": "People and Society/Population",
    "life_expectancy": "People and Society/Life expectancy at birth/total population",
    "median_age": "People and Society/Median age/total",
    "unemployment": "Economy/Unemployment rate",
    "inflation": "Economy/Inflation rate (consumer prices)",
    "gdp": "Economy/GDP (official exchange rate)",
    "export_partner": "Economy/Exports - partners",
    "import_partner": "Economy/Imports - partners",
    "internet_users": "Communications/Internet users/percent of population",
    "airports": "Transportation/Airports",
}
PER_COUNTRY = 5


def find(countries: list[Country], folder: Path) -> list[dict]:
    """Up to PER_COUNTRY contradicted facts for each country that both editions know."""
    old_files = {p.stem: p for p in folder.glob("*/??.json")}
    rows = []
    for c in countries:
        if c.code not in old_files:
            continue
        old = read_old(json.loads(old_files[c.code].read_text()))
        new = {f.relation: f for f in c.facts if f.relation in old}
        pairs = [r for r in old if r in new and differ(old[r].v, new[r].answer, new[r].variants)]
        kept = sorted(pairs, key=lambda r: stable_key(c.name + r))[:PER_COUNTRY]
        for relation in kept:
            fact = new[relation]
            # Another fact stands beside the one in question, the same one in both passages.
            section = BY_NAME[relation].section
            others = sorted((r for r in pairs if r != relation), key=lambda r: BY_NAME[r].section != section)
            company = sorted([relation, *others[:1]], key=list(OLD_PATHS).index)
            old_said = [say(relation=r, c=c.in_text, cut=old[r]) for r in company]
            new_said = [new[r].said for r in company]
            title = f"{c.name} - {BY_NAME[relation].section}"
            seen, _ = wordings(relation, c.in_text, c.split)
            n = stable_key(c.name + relation) % len(seen)
            rows.append(
                {
                    "id": f"{slug(c.name)}-{relation}-contradiction",
                    "query": seen[n],
                    "country": c.name,
                    "split": c.split,
                    "relation": relation,
                    "old": edition(old[relation].v, old[relation].variants, OLD_DATE, title, old_said),
                    "new": edition(fact.answer, fact.variants, NEW_DATE, title, new_said) | {"doc_ids": golds(c, fact)},
                }
            )
    return rows


def read_old(profile: dict) -> dict[str, Cut]:
    """The relations of one profile of the older edition."""
    found = {}
    for relation, path in OLD_PATHS.items():
        raw = look_up(profile, path)
        text = clean(str(raw).replace(" ++ ", "; ")) if raw else ""
        text = re.sub(r"^(?:chief of state|note)[^;]*;", "", text) if text.startswith("note") else text
        cut = CUTS[BY_NAME[relation].kind](text) if text else None
        if cut:
            found[relation] = cut
    return found


def differ(old: str, new: str, variants: list[str]) -> bool:
    """Really another answer, not another spelling: no shared name word, or figures more than 3 % apart."""
    a, b = (re.search(r"\d[\d,]*(?:\.\d+)?", t) for t in (old, new))
    if a and b and re.match(r"[$\d<>-]", old):
        scale = {"million": 1e6, "billion": 1e9, "trillion": 1e12}
        x, y = (
            float(m.group(0).replace(",", "")) * next((s for w, s in scale.items() if w in t), 1)
            for m, t in ((a, old), (b, new))
        )
        return abs(x - y) > 0.03 * max(x, y)
    old_words, new_words = (set(re.findall(r"[\w']{3,}", t.lower())) for t in (old, " ".join([new, *variants])))
    return not old_words & new_words


def say(relation: str, c: str, cut: Cut) -> str:
    """The relation's sentence with the older answer."""
    return capitalise(BY_NAME[relation].say.format(c=c, v=cut.v, w=cut.w, x=cut.x))


def edition(answer: str, variants: list[str], date: str, title: str, said: list[str]) -> dict:
    """One side of a contradiction: its answer and its passage with and without dates."""
    undated = [re.sub(r"\s*\([^()]*\b(?:19|20)\d\d\b[^()]*\)", "", s) for s in said]
    return {
        "answer": answer,
        "answers": accepted(answer, variants)[:3],
        "date": date,
        "title": title,
        "passage": f"As of the World Factbook of {date}: " + " ".join(said),
        "passage_undated": " ".join(undated),
    }
