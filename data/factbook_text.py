"""Text of the World Factbook made clean: names, titles, capitals, HTML. Used by build_factbook.py only."""

import hashlib
import html
import json
import re
import unicodedata

# Profiles that are no country or hold next to nothing.
SKIPPED = {"xx", "ee", "ip", "bq", "pf", "cr", "bv"}
# Short names the source lacks, gives as "none", abbreviates or writes with a comment.
NAMES = {
    "cf": "Republic of the Congo", "cg": "Democratic Republic of the Congo", "sv": "Svalbard", "vt": "Vatican City",
    "um": "United States Pacific Island Wildlife Refuges", "gz": "Gaza Strip", "fk": "Falkland Islands",
    "dr": "Dominican Republic", "vq": "United States Virgin Islands", "ck": "Cocos Islands", "ga": "Gambia",
    "bf": "Bahamas", "fm": "Micronesia", "ct": "Central African Republic", "ae": "United Arab Emirates",
    "io": "British Indian Ocean Territory", "sh": "Saint Helena", "iv": "Ivory Coast",
}  # fmt: skip
# Names that take an article inside a sentence; any name that ends in "Islands" takes one too.
ARTICLE = {
    "Republic of the Congo", "Democratic Republic of the Congo", "United States Pacific Island Wildlife Refuges",
    "Gaza Strip", "Dominican Republic", "Gambia", "Bahamas", "Central African Republic", "United Arab Emirates",
    "British Indian Ocean Territory", "United States", "United Kingdom", "Netherlands", "Philippines", "Maldives",
    "Seychelles", "Comoros", "Isle of Man", "West Bank", "French Southern and Antarctic Lands",
}  # fmt: skip
# Other spellings of country names as they stand inside fields.
SPELLINGS = {
    "US": "United States", "USA": "United States", "UK": "United Kingdom", "UAE": "United Arab Emirates",
    "S. Korea": "South Korea", "N. Korea": "North Korea", "Congo, Republic of the": "Republic of the Congo",
    "Congo, Democratic Republic of the": "Democratic Republic of the Congo", "Korea, South": "South Korea",
    "Korea, North": "North Korea", "Bahamas, The": "Bahamas", "The Bahamas": "Bahamas", "The Gambia": "Gambia",
    "Gambia, The": "Gambia", "Cote d'Ivoire": "Ivory Coast", "C\u00f4te d'Ivoire": "Ivory Coast",
    "Micronesia, Federated States of": "Micronesia", "DRC": "Democratic Republic of the Congo",
    "Congo": "Republic of the Congo", "Czech Republic": "Czechia", "T\u00fcrkiye": "Turkey",
    "Turkey (Turkiye)": "Turkey", "Antigua & Barbuda": "Antigua and Barbuda",
    "Holy See": "Vatican City", "Congo (Brazzaville)": "Republic of the Congo",
}  # fmt: skip
TITLES = set(
    "president prime minister king queen emperor sultan amir emir premier chancellor governor governor-general "
    "co-prince supreme leader sovereign grand duke prince pope captain regent chairman chairperson chair acting "
    "interim transitional transition taoiseach general gen. gen col. col colonel lt. maj. capt. brig. dr. sir dame "
    "crown deputy and of the foreign minister ambassador charge d'affaires administrator commissioner lieutenant "
    "presidency council member mayor first chief executive ulu-o-tokelau head state counsellor consul adm. "
    "government federal sheikh shaykh territorial assembly bailiff maj.-gen. sgt. master ruler minister-chief "
    "defense interior finance affairs (ret.) high field marshal kanto national vice for mission authority princess "
    "majesty his her excellency cabinet secretary caretaker de facto minister, representative paramount "
    "confederation swiss french polynesia china spain political ministers island air vice-marshal sr. judicial yang "
    "di-pertuan agong presidential senate speaker".split()
)
# The last of these words ends a title, however long: "National Council ... President Gen. Abdourahamane TIANI".
ROLES = set(
    "president minister premier king chairperson chairman chancellor gen. dr. vice-marshal col. general "
    "governor".split()
)
SMALL_WORDS = {"BIN", "BINT", "AL", "DE", "DA", "DOS", "VAN", "DER", "VON", "IBN", "DEL", "LA", "DI"}
ROMAN = re.compile(r"^[IVX]+$")
UPPER = "A-Z\u00c0-\u00d6\u00d8-\u00de"
CAPS = re.compile(rf"(?<![\w.])(Mc|Mac|M')?[{UPPER}][{UPPER}'\-]+(?![\w])")
DATED = re.compile(r"\s*\(((?:[^()]|\([^()]*\))*\b(?:19|20)\d\d\b[^()]*)\)")
NOTHING = {"", "na", "n/a", "none", "not available", "nan", "-", "0", "unknown"}


def slug(name: str) -> str:
    """'Saint Barthelemy' -> 'saint-barthelemy'."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def stable_key(text: str) -> int:
    """A number that depends on the text alone, for splits and choices that never move between runs."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def capitalise(text: str) -> str:
    """First letter upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def join_names(names: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# -- cleaning --------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Source HTML to one line of plain text; line breaks become semicolons."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"(?:\s*<(?:br|/p|/li)\s*/?>\s*)+", "; ", text)
    text = re.sub(r"<[^>]*>", "", text).replace("\u00a0", " ")
    for fancy, plain in {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-"}.items():
        text = text.replace(fancy, plain)
    text = re.sub(r"\b(?:description|meaning|history): ", "", text)
    text = re.sub(r"[;,]?\s*note(?: \d)?:\s*", "; note: ", text)
    text = re.sub(r",? as shown in this population distribution map", "", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([.:;,])\s*;", r"\1", text)
    return re.sub(r"\s+([;,.])(?=\s|$)", r"\1", text).strip(" ;")


def find_acronyms(profiles: list[dict]) -> set[str]:
    """Words in capitals that are no surnames: alone in brackets, after 'or' or 'aka', or names of organizations."""
    text = " ".join(clean(json.dumps(p, ensure_ascii=False)) for p in profiles)
    found = set(re.findall(rf"[(\"/]([{UPPER}][{UPPER}\-]+)[)\"/;,]", text))
    found |= set(re.findall(rf"\b(?:or|aka|the|an?|under|by) ([{UPPER}]{{2,6}})\b", text))
    for profile in profiles:
        members = look_up(profile, "Government/International organization participation") or ""
        found |= set(re.findall(rf"\b[{UPPER}]{{2,}}\b", members))
    return found


def fix_caps(text: str, acronyms: set[str]) -> str:
    """Write surnames as names: 'Ali BONGO Ondimba' -> 'Ali Bongo Ondimba'; acronyms stay."""

    def one(match: re.Match) -> str:
        word = match.group(0)
        if len(word.strip("'-")) < 3 or ROMAN.match(word) or (len(word) > 2 and word in acronyms):
            return word
        before = re.search(r"([\w.'\-]+)[ ,]\s?$", text[: match.start()])
        after = re.match(r"\s([\w.'\-]+)", text[match.end() :])
        near = [m.group(1) for m in (before, after) if m]
        if not any(n[:1].isupper() and (n[1:2].islower() or n[1:2] in ".'" or len(n) > 3) for n in near):
            return word
        if not re.search(r"[AEIOUY\u00c0-\u00d6\u00d8-\u00de]", word):
            return word
        return name_case(word)

    return CAPS.sub(one, text)


def name_case(word: str) -> str:
    """'OLIGUI' -> 'Oligui', 'AL-SISI' -> 'al-Sisi', "M'BA" -> "M'Ba", 'McDONALD' -> 'McDonald'."""
    if ROMAN.match(word):
        return word
    if word in SMALL_WORDS:
        return word.lower()
    if word[:2] == "Mc":
        return "Mc" + word[2:].capitalize()
    if word.startswith("MC") and len(word) > 4:
        return "Mc" + word[2:].capitalize()
    parts = re.split(r"(['\-])", word)
    out = []
    for i, part in enumerate(parts):
        before = parts[i - 1] if i else ""
        small = before == "'" and len(parts[i - 2]) > 1  # Nuku'alofa, but M'Ba and O'Brien
        if small or (before == "-" and part in {"OF", "AU", "SUR", "LES"}):  # Port-of-Spain
            out.append(part.lower())
        elif ROMAN.match(part) and len(part) > 1 and part not in {"LI", "XI"}:
            out.append(part)
        else:
            out.append(part.lower() if i == 0 and part == "AL" and len(parts) > 1 else part.capitalize())
    return "".join(out)


def look_up(profile: dict, path: str) -> str | None:
    """The raw text at a path of fields.py, or None when the source has no such field."""
    node = profile
    keys = path.split("/")
    for i, key in enumerate(keys):
        if not isinstance(node, dict):
            return None
        if key not in node and "/" not in key:  # keys may hold a slash themselves
            joined = "/".join(keys[i:])
            if joined in node:
                node = node[joined]
                break
        if key == "*":
            dated = [(m.group(1), k) for k in node if (m := re.search(r"(\d{4})$", k))]
            node = node[max(dated)[1]] if dated else node.get("Languages", node)
        elif key in node:
            node = node[key]
        else:
            return None
    return node.get("text") if isinstance(node, dict) else node
