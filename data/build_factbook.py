"""Turn World Factbook JSON into short passages, and remember which fact stands in which passage.

Called by build.py; alone it prints the passages of one country:

    python data/build_factbook.py FACTBOOK_JSON_FOLDER France

Each relation of factbook_fields.py becomes one sentence ("The capital of France is Paris."), each prose field one or
more; the sentences of a section are packed into passages of about 70 words. A `Fact` keeps the answer exactly as its
sentence has it, so that a small model can copy it.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from factbook_cuts import CUTS
from factbook_fields import PROSE, RELATIONS
from factbook_text import ARTICLE, NAMES, SKIPPED, capitalise, clean, find_acronyms, fix_caps, look_up, slug, stable_key

PASSAGE_WORDS = 70
SPLIT_SIZES = {"val": 36, "test": 36}  # countries; the rest trains
SECTIONS = (
    "introduction location land people demographics health education environment government leaders parliament "
    "symbols economy trade energy communications transport military space"
).split()
SOURCE = "World Factbook 2025"


@dataclass
class Fact:
    """One answerable fact: `answer` stands word for word in the passage `doc_id`."""

    relation: str
    answer: str
    variants: list[str] = field(default_factory=list)
    doc_id: str = ""
    ask: bool = True
    said: str = ""  # the sentence that holds it


@dataclass
class Country:
    """A country with its passages and facts."""

    code: str
    name: str
    region: str
    data: dict
    split: str = ""
    documents: list[dict] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # relations whose field is absent from the source

    @property
    def in_text(self) -> str:
        """The name as it reads inside a sentence."""
        needs = self.name in ARTICLE or self.name.endswith("Islands")
        return f"the {self.name}" if needs else self.name


@dataclass
class Sentence:
    """One sentence of a passage and the facts it holds."""

    text: str
    facts: list[Fact] = field(default_factory=list)


# -- reading ---------------------------------------------------------------------------------------------------------


def load_countries(folder: Path) -> list[Country]:
    """All country profiles under a folder of REGION/CODE.json, with splits, passages and facts."""
    profiles = {p: json.loads(p.read_text()) for p in sorted(folder.glob("*/??.json")) if p.stem not in SKIPPED}
    acronyms = find_acronyms(list(profiles.values()))
    countries = []
    for path, profile in profiles.items():
        name = NAMES.get(path.stem)
        if name is None:
            name = clean(look_up(profile, "Government/Country name/conventional short form") or "")
            name = re.split(r" \(|[;,]", name)[0]
        countries.append(Country(path.stem, name, path.parent.name, profile))
    assign_splits(countries)
    for country in countries:
        write_passages(country, acronyms)
    return countries


def assign_splits(countries: list[Country]) -> None:
    """36 validation and 36 test countries, spread over the regions by size; the order inside one is a hash's."""
    regions: dict[str, list[Country]] = {}
    for c in countries:
        regions.setdefault(c.region, []).append(c)
    quota = {r: len(members) / len(countries) for r, members in regions.items()}
    for split, size in SPLIT_SIZES.items():
        seats = {r: int(q * size) for r, q in quota.items()}
        for r in sorted(quota, key=lambda r: quota[r] * size - seats[r], reverse=True)[: size - sum(seats.values())]:
            seats[r] += 1
        for r, members in regions.items():
            free = sorted((c for c in members if not c.split), key=lambda c: stable_key(c.name))
            for c in free[: seats[r]]:
                c.split = split
    for c in countries:
        c.split = c.split or "train"


# -- writing passages ------------------------------------------------------------------------------------------------


def write_passages(country: Country, acronyms: set[str]) -> None:
    """Fill `documents`, `facts` and `missing` of a country."""
    sentences: dict[str, list[Sentence]] = {s: [] for s in SECTIONS}
    by_path: dict[str, Sentence] = {}
    for rel in RELATIONS:
        raw = look_up(country.data, rel.path)
        if raw is None:
            country.missing.append(rel.name)
            continue
        text = clean(raw)
        if rel.kind not in {"person", "since", "people", "city"}:  # these cut names out by their capitals
            text = fix_caps(text, acronyms)
        cut = CUTS[rel.kind](text) if text else None
        if cut is None:
            continue
        fact = Fact(rel.name, cut.v, [v for v in dict.fromkeys(cut.variants) if v and v != cut.v], ask=cut.ask)
        if rel.say:
            said = rel.say.format(c=country.in_text, v=cut.v, w=cut.w, x=cut.x)
            by_path[rel.path] = Sentence(capitalise(said.replace("..", ".")))
            sentences[rel.section].append(by_path[rel.path])
        elif rel.path not in by_path:
            continue
        if fact.answer == country.name and rel.name in {"former_name", "local_name"}:
            continue  # "What is Qatar called locally?" - "Qatar" asks for nothing
        if fact.answer in by_path[rel.path].text:
            fact.said = by_path[rel.path].text
            by_path[rel.path].facts.append(fact)
            country.facts.append(fact)
    for section, path, lead, limit in PROSE:
        raw = look_up(country.data, path)
        text = fix_caps(clean(raw), acronyms) if raw else ""
        if len(text.split()) >= 3:
            sentences[section] += [Sentence(s) for s in prose(lead.format(c=country.in_text), text, limit)]
    for section in SECTIONS:
        for i, group in enumerate(pack(sentences[section]), 1):
            doc_id = f"{slug(country.name)}-{section}-{i}"
            for sentence in group:
                for fact in sentence.facts:
                    fact.doc_id = doc_id
            country.documents.append(
                {
                    "id": doc_id,
                    "title": f"{country.name} - {section}",
                    "content": " ".join(s.text for s in group),
                    "source": SOURCE,
                    "country": country.name,
                    "section": section,
                    "region": country.region,
                    "split": country.split,
                }
            )


def prose(lead: str, text: str, limit: int) -> list[str]:
    """Whole sentences (or clauses) of a prose field, up to `limit` words, each no longer than a passage."""
    parts = re.split(r"(?<=[.!?])\s*;?\s+(?=[A-Z\"])|(?<=;)\s+", text)
    kept: list[str] = []
    words = 0
    for part in parts:
        n = len(part.split())
        if kept and words + n > limit:
            break
        if n > PASSAGE_WORDS + 20:  # an endless sentence: cut at a comma
            part = ", ".join(part.split(", ")[: max(1, part.count(", ") // 2)])
            part = " ".join(part.split()[: PASSAGE_WORDS + 20])
        kept.append(part.strip())
        words += n
    kept[0] = lead + kept[0] if lead else capitalise(kept[0])
    merged: list[str] = []
    for part in kept:  # clauses that a semicolon joins stay together while they are short
        if merged and merged[-1].endswith(";") and len(merged[-1].split()) + len(part.split()) < 60:
            merged[-1] += " " + part
        else:
            merged.append(capitalise(part))
    return [re.sub(r"[;,:]$", "", m).rstrip(".") + ("" if m[-1] in '!?"' else ".") for m in merged]


def pack(sentences: list[Sentence]) -> list[list[Sentence]]:
    """Sentences in order, in groups of about PASSAGE_WORDS words of nearly equal size."""
    sizes = [len(s.text.split()) for s in sentences]
    n = max(1, round(sum(sizes) / PASSAGE_WORDS))
    target = sum(sizes) / n
    groups: list[list[Sentence]] = [[]]
    filled = 0.0
    for sentence, size in zip(sentences, sizes, strict=True):
        if groups[-1] and filled + size / 2 > target * len(groups):
            groups.append([])
        groups[-1].append(sentence)
        filled += size
    return [g for g in groups if g]


if __name__ == "__main__":
    for found in load_countries(Path(sys.argv[1])):
        if found.name == sys.argv[2]:
            for document in found.documents:
                print(f"[{document['id']}] {document['content']}\n")
