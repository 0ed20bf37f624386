"""How the answer is cut out of a cleaned factbook field: one small function per `kind` of factbook_fields.py.

Every function takes the cleaned text and returns a `Cut`, or None when the field has no short, copyable answer. The
answer `v` must stand in the sentence as it is; other accepted spellings go to `variants`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from factbook_text import DATED, NOTHING, ROLES, SMALL_WORDS, SPELLINGS, TITLES, UPPER, join_names, name_case

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?(?: (?:million|billion|trillion))?"


@dataclass
class Cut:
    """What a kind of field yields: the answer and the parts around it in its sentence."""

    v: str
    w: str = ""  # date or other tail, with its leading space
    x: str = ""  # second value, such as a height or a title
    variants: list[str] = field(default_factory=list)
    ask: bool = True


def place(name: str) -> str:
    """One spelling for each country name inside a field: 'Congo, Republic of the' -> 'Republic of the Congo'."""
    name = re.sub(r"\s*\([^)]*\)", "", name).strip(" ,;")
    return SPELLINGS.get(name, name)


def split_date(text: str) -> tuple[str, str]:
    """'91% (2023 est.)' -> ('91%', ' (2023 est.)'); bracketed remarks that hold a date go too."""
    dates = [m.group(1) for m in DATED.finditer(text)]
    date = next((d for d in dates if re.fullmatch(r"(?:FY ?)?[\d/ \-]+(?: est\.)?", d)), "")
    return DATED.sub("", text).strip(), f" ({date})" if date else ""


def number_variants(text: str) -> list[str]:
    """Other ways to write a figure: '83,871 sq km' -> '83,871', '83871', '83871 sq km', '83,871 square kilometers'."""
    m = re.match(rf"({NUMBER})(.*)", text)
    if not m:
        return []
    figure, unit = m.group(1), m.group(2).strip()
    bare = figure.replace(",", "")
    out = [figure, bare, f"{bare} {unit}".strip()]
    if "$" in figure:
        plain = figure.replace("$", "")
        out += [plain, f"{plain} dollars", f"{plain} US dollars", f"USD {plain}"]
    if unit == "sq km":
        out += [f"{figure} square kilometers", f"{figure} km2"]
    elif unit == "km":
        out += [f"{figure} kilometers"]
    elif unit == "m":
        out += [f"{figure} meters"]
    elif unit.startswith("%"):
        out += [f"{figure} percent", f"{figure} per cent"]
    return [v for v in dict.fromkeys(out) if v != text]


def value(text: str) -> Cut | None:
    """Everything up to the first bracket or semicolon."""
    rest, date = split_date(re.sub(r"\(s\)(?=/)", "s", text.replace("(s)", "(s)" if "/" in text else "")))
    v = re.split(r"\s*(?:;| note\b|\()", rest)[0].rstrip(" ,.")
    if v.lower() in NOTHING or len(v.split()) > 14:
        return None
    tail = ""
    bracket = re.match(r"^[^;(]*(\([^()]*\))", rest)
    if bracket and not re.match(NUMBER, v) and not date:
        tail = " " + bracket.group(1)
    variants = number_variants(v)
    if (
        tail
        and len(tail.split()) < 6
        and not re.search(r"\d|aka|born|singular|plural|men|citizens|nationals|colloquial", tail)
    ):
        variants += [tail.strip(" ()"), v + tail]
    return Cut(v, date or tail, variants=variants)


def length(text: str) -> Cut | None:
    """A value in figures: where a field goes island by island, none."""
    cut = value(text)
    return cut if cut and re.match(NUMBER, cut.v) else None


def pct(text: str) -> Cut | None:
    """The first percentage."""
    rest, date = split_date(text)
    m = re.search(r"[<>]?-?\d[\d,]*(?:\.\d+)?%", rest)
    return Cut(m.group(0), date, variants=number_variants(m.group(0))) if m else None


def num(text: str) -> Cut | None:
    """The first whole number."""
    m = re.match(r"\d[\d,]*", text)
    return Cut(m.group(0), variants=number_variants(m.group(0))) if m and m.group(0) != "0" else None


def clause(text: str) -> Cut | None:
    """Up to the first semicolon; a long one is said but not asked for."""
    rest, _ = split_date(text)
    v = re.split(r";| - note| is the former", rest)[0].strip(" .")
    if v.lower() in NOTHING or len(v.split()) > 50:
        return None
    return Cut(v, ask=len(v.split()) <= 14)


def items(text: str) -> list[str]:
    """Split a list at commas and semicolons outside brackets; brackets are dropped."""
    rest, _ = split_date(text)
    flat = re.sub(r"\s*\((?:[^()]|\([^()]*\))*\)", "", rest)
    return [i.strip(" .") for i in re.split(r"[,;]", flat) if i.strip(" .")]


def short_list(text: str) -> Cut | None:
    """The first five items of a list."""
    parts = [re.sub(r"\s+<?\d[\d.]*%$", "", i) for i in items(text)]
    parts = [re.sub(r"^and ", "", p) for p in parts]
    stop = next((i for i, p in enumerate(parts) if ":" in p or " - " in p or "note" in p or len(p.split()) > 6), 99)
    parts = parts[: min(5, stop)]
    if not parts or parts[0].lower() in NOTHING:
        return None
    return Cut(join_names(parts), variants=[", ".join(parts)] if len(parts) > 1 else [])


def borders(text: str) -> list[tuple[str, float, str]]:
    """(neighbour, km, km as written) for every land border."""
    flat = re.sub(r"\s*\((?:[^()]|\([^()]*\))*\)", "", text)
    found = re.findall(rf"([{UPPER}][^;,\d]*?)\s+([\d,]+(?:\.\d+)?) km", flat)
    return [(place(n), float(k.replace(",", "")), f"{k} km") for n, k in found]


def neighbours(text: str) -> Cut | None:
    """All neighbours without the lengths; more than eight are said but not asked for."""
    names = list(dict.fromkeys(n for n, _, _ in borders(text)))  # Morocco meets Spain twice
    if not names:
        return None
    return Cut(join_names(names), variants=[", ".join(names)] if len(names) > 1 else [], ask=len(names) <= 8)


def longest_border(text: str) -> Cut | None:
    """The neighbour with the longest border, when there is a choice."""
    rows = borders(text)
    if len(rows) < 2:
        return None
    name, _, length = max(rows, key=lambda r: r[1])
    return Cut(name, x=length)


def peak(text: str) -> Cut | None:
    """'Mont Blanc 4,810 m' -> Mont Blanc, with its height in x."""
    flat = re.sub(r"\s*\([^)]*\)", "", text)
    m = re.match(r"^(.+?),? (-?[\d,.]+) m\b", flat)
    if (
        not m
        or re.match(r"(?:unnamed|highest|lowest|\d)|.* (?:was|is)$", m.group(1).lower())
        or len(m.group(1).split()) > 9
    ):
        return None
    other = re.search(r"\((?:aka )?([A-Z][\w' ]+)\)", text)
    name = re.sub(r",? (?:more than|approximately|about)$", "", m.group(1).strip())
    return Cut(name, x=f"{m.group(2)} m", variants=[other.group(1)] if other else [])


def peak_height(text: str) -> Cut | None:
    """The height out of the same field."""
    cut = peak(text)
    return Cut(cut.x, variants=number_variants(cut.x)) if cut else None


def river(text: str) -> Cut | None:
    """The longest river of the list."""
    rows = []
    for item in text.split(";"):
        m = re.match(r"^\s*([A-Z][^(\d]*?)(?: \(.*\))* - ([\d,]+) km", item)
        if m:
            name = re.sub(r",? river(?: (?:source|mouth)(?: and (?:source|mouth))?)?$", "", m.group(1).strip())
            rows.append((float(m.group(2).replace(",", "")), name, m.group(2)))
    if not rows:
        return None
    _, name, length = max(rows)
    return Cut(name, x=f"{length} km", variants=[f"{name} River"])


def shares(text: str) -> list[tuple[str, float, str]]:
    """(name, share, share as written) for 'Fang 23.5%, Shira 20.6%'."""
    rest, _ = split_date(text)
    flat = re.sub(r"\s*\((?:[^()]|\([^()]*\))*\)", "", rest)
    rows = re.findall(r"[,;]?\s*([^%;]+?) (?:about |approximately )?<?(\d+(?:\.\d+)?)(?:-\d+(?:\.\d+)?)?%", flat)
    return [(n.strip(" ,"), float(p), f"{p}%") for n, p in rows]


def first_share(text: str) -> Cut | None:
    """The largest group, when the list has shares and starts with it."""
    rows = shares(text)
    if not rows or rows[0][1] < max(r[1] for r in rows) or len(rows[0][0].split()) > 6:
        return None
    name = rows[0][0]
    if (
        re.search(r"\d| than$| about$", name)
        or re.match(r"(?:other|unspecified|none|no religion|no answer|unaffiliated|atheist|non)", name.lower())
        or ":" in name
    ):
        return None
    return Cut(name, x=rows[0][2])


def partner(text: str) -> Cut | None:
    """The trade partner with the largest share."""
    rows = shares(text)
    if not rows:
        return None
    name, _, share = max(rows, key=lambda r: r[1])
    return Cut(place(name), x=share)


def official(text: str) -> Cut | None:
    """The languages marked as official."""
    text = re.sub(r" \((?!official)[^()]*\)", "", text)
    found = re.findall(r"(?:^|[,;(] ?)(?:and |includes )?([^,;()%]+?)(?: [\d.]+%)? \(official\b[^)]*\)", text)
    names = [f.strip().removesuffix(" only") for f in found if f.strip() and f[0].isupper() and len(f.split()) <= 4]
    if not names or len(names) > 4:
        return None
    return Cut(join_names(names), variants=[", ".join(names)] if len(names) > 1 else [])


def city(text: str) -> Cut | None:
    """The city with most people."""
    rest, date = split_date(text)
    rows = re.findall(r"([\d,.]+(?: million)?) ([^\d,;(]+?)(?: \([^)]*\))?(?:,|;|$)", rest)
    rows = [(float(n.split()[0].replace(",", "")) * (1e6 if "million" in n else 1), n, c.strip()) for n, c in rows]
    if not rows:
        return None
    _, people, name = max(rows)
    name = " ".join(
        name_case(w)
        if w.isupper() and len(w) > 2
        else w.capitalize()
        if w in {"LA", "EL"}
        else w.lower()
        if w == "ES"
        else w
        for w in name.split()
    )
    return Cut(name, date, x=people)


def capital(text: str) -> Cut | None:
    """The capital; with several, the first is the answer and the others are accepted."""
    text = re.sub(r"Washington, (D\.?C)\b", r"Washington \1", text)
    if not text[0].isupper() or text.lower().startswith("no official"):
        return None
    cities = [re.split(r" \(| in [A-Z]| is the| - |,", part)[0].strip() for part in text.split(";")]
    cities += re.findall(r"\(aka (\w+)", text) + re.findall(r", (\w[\w ]+) \(\w+ capital\)", text)
    cities += [n for group in re.findall(r"^\w+ \(([A-Z][^()]*)\)$", text) for n in re.split(r"[,/] ?", group)]
    cities = [c for c in dict.fromkeys(cities) if c and c[0].isupper() and len(c.split()) <= 4 and c != "Note"]
    first = cities[0]
    tail = text[len(first) :].rstrip(".") if len(text.split()) < 40 else ""
    return Cut(first, tail, variants=cities[1:])


def independence(text: str) -> Cut | None:
    """'11 August 1960 (from France)' -> the date, with 'from France' in x."""
    m = re.match(r"^((?:\d{1,2} )?(?:[A-Z][a-z]+ )?\d{3,4})\s\((from [^();]+)", text)
    return Cut(m.group(1), x=m.group(2).strip()) if m else None


def independence_from(text: str) -> Cut | None:
    """The former power out of the same field."""
    cut = independence(text)
    if not cut or len(cut.x.split()) > 8:
        return None
    v = cut.x.removeprefix("from ")
    return Cut(v, variants=[v.removeprefix("the "), SPELLINGS.get(v.removeprefix("the "), v)])


def holiday(text: str) -> Cut | None:
    """'Bastille Day, 14 July (1789)' -> the name, with the day in x."""
    m = re.match(r"^([^,;(\d]+?)(?: \([^)]*\))?, (\d{1,2}(?:-\d{1,2})? [A-Z][a-z]+)", text)
    return Cut(m.group(1), x=m.group(2)) if m else None


def holiday_date(text: str) -> Cut | None:
    """The day out of the same field."""
    cut = holiday(text)
    if not cut:
        return None
    day, _, month = cut.x.partition(" ")
    return Cut(cut.x, variants=[f"{month} {day}"])


def person(text: str) -> Cut | None:
    """'President Javier MILEI (since ...)' -> the name, its title in x, the date in w."""
    if "vacant" in text.split(";")[0]:
        return None
    text = re.sub(r"\s*\((?!since)[^()]*\)", "", text)
    words = re.split(r" \(|[;,:]", text)[0].split()
    n = max((i + 1 for i, w in enumerate(words) if w.lower() in ROLES), default=0)
    while n < len(words) and words[n].lower() in TITLES:
        n += 1
    name = cased(words[n:])
    if not 1 <= len(name) <= 7 or not name[0][0].isupper() or any(c.isdigit() for c in " ".join(name)):
        return None
    full = " ".join(name)
    title = " ".join(w if w in {"and", "of", "the", "de"} else w[:1].upper() + w[1:] for w in words[:n])
    since = re.search(r"\(since ([^);]+)", text)
    variants = [f"{title} {full}"] if title else []
    plain = [w for w in name if "." not in w]
    if 2 <= len(plain) < len(name):
        variants.append(" ".join(plain))
    surname = [
        w for w, raw in zip(name, words[n:], strict=True) if len(raw) > 1 and raw == raw.upper() and "." not in w
    ]
    if surname and len(surname) < len(name):
        variants.append(" ".join(surname))
    tail = f" (since {since.group(1)})" if since else ""
    return Cut(
        full, tail, x=f"{title} " if title else "", variants=[v for v in variants if not re.fullmatch("[IVX]+", v)]
    )


def cased(words: list[str]) -> list[str]:
    """The words of a name with ordinary capitals: MA Ying-jeou -> Ma Ying-jeou, Rebelo DE SOUSA -> Rebelo de Sousa."""
    out = []
    for i, w in enumerate(words):
        caps = len(w) > 1 and w == w.upper() and "." not in w
        if re.fullmatch(rf"(?:Mc|Mac|De|Le)[{UPPER}]{{2,}}", w):  # McCLELLAND
            prefix = re.match("[A-Z][a-z]+", w).group(0)
            out.append(prefix + w[len(prefix) :].capitalize())
        elif "-" in w and not caps:  # SASSOU-Nguesso, al-SUDANI
            out.append("-".join(name_case(p) if len(p) > 1 and p == p.upper() else p for p in w.split("-")))
        elif caps and len(w) == 2 and (i == 0 or w in {"LI", "XI", "LE"}):
            out.append(w.capitalize())
        else:
            out.append(name_case(w) if caps and (i or w not in SMALL_WORDS) else w.capitalize() if caps else w)
    return out


def since(text: str) -> Cut | None:
    """The date of taking office out of the same field."""
    cut = person(text)
    m = re.search(r"\(since ([^);]+)\)", cut.w) if cut else None
    if not m:
        return None
    parts = m.group(1).split()
    return Cut(m.group(1), variants=[f"{parts[1]} {parts[0]}, {parts[2]}"] if len(parts) == 3 else [])


def people(text: str) -> Cut | None:
    """'Gulnazar KELDI/Sulaimon YUDAKOV' -> both names."""
    first = re.sub(r"\s*\([^)]*\)", "", text).split(";")[0]
    if "unknown" in first.lower() or len(first.split()) > 9 or not first[:1].isupper() or '"' in first:
        return None
    names = [" ".join(name_case(w) if len(w) > 1 and w.upper() == w and "." not in w else w for w in p.split())
             for p in first.split("/")]  # fmt: skip
    return Cut(join_names([n for n in names if n]))


def quoted(text: str) -> Cut | None:
    """The first quoted title, with its translation in w."""
    m = re.match(r'^(?:none; )?"([^"]+)"(?: \(([^()]+)\))?', text)
    if not m:
        return None
    v, other = m.group(1), m.group(2)
    return Cut(v, f" ({other})" if other else "", variants=[other] if other else [])


def currency(text: str) -> Cut | None:
    """'Libyan dinars (LYD) per US dollar -' -> Libyan dinars, with ' (LYD)' in w."""
    m = re.match(r"^([^()\d]+?)(?: \(([A-Z]{3})\))?,? per US dollar", text.replace("the US dollar is used", ""))
    if not m:
        return None
    v, code = m.group(1).strip(), m.group(2)
    single = v[:-1] if v.endswith("s") else v
    variants = [single, single.split()[-1], v.split()[-1]] + ([code, f"{v} ({code})"] if code else [])
    return Cut(v, f" ({code})" if code else "", variants=[s for s in dict.fromkeys(variants) if s != v])


def before_colon(text: str) -> Cut | None:
    """The name before a colon, without brackets."""
    v = re.sub(r"\s*\((?:[^()]|\([^()]*\))*\)", "", split_date(text)[0])
    v = re.split(r"[:;]", v)[0].strip()
    return Cut(v) if 1 < len(v.split()) <= 10 and v.lower() not in NOTHING and not v.startswith("no ") else None


CUTS: dict[str, Callable[[str], Cut | None]] = {
    f.__name__: f
    for f in (value, length, pct, num, clause, neighbours, longest_border, peak, peak_height, river, first_share,
              partner, official, city, capital, independence, independence_from, holiday, holiday_date, person, since,
              people, quoted, currency, before_colon)
}  # fmt: skip
CUTS["list"] = short_list
