"""The text of a file, with its title, sections and pages.

found = extract(Path("manuals/pump.pdf"))  # or .txt .md .html .htm
found.text, found.title, found.sections, found.pages
"""

import codecs
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import pypdf
import regex
from bs4 import BeautifulSoup
from bs4.dammit import EncodingDetector
from bs4.element import CData, NavigableString, Tag

from nanochat.common import UserError
from nanochat.documents import tokenize, valid_unicode

MAX_BYTES = 200_000_000
MAX_HTML = 20_000_000  # a parsed page takes a hundred times its size in memory
MAX_TITLE = 120  # characters; a longer heading is text like any other


@dataclass
class Extracted:
    """A file's text. `sections` are (start, end, heading), `pages` the offset at which each page of a PDF starts."""

    text: str
    title: str = ""
    sections: list[tuple[int, int, str]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    warning: str = ""


def extract(path: Path) -> Extracted:
    """Read a .md, .html, .htm or .pdf file, any other as plain text. Raises UserError if there is no text in it."""
    suffix = path.suffix.lower()
    limit = MAX_HTML if suffix.startswith(".htm") else MAX_BYTES
    try:
        if path.stat().st_size > limit:
            raise UserError(f"larger than {limit // 10**6} MB; split it first")
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}") from e
    if suffix == ".pdf":
        found = _pdf(data)
    else:
        text, warning = _decode(data, html=suffix.startswith(".htm"))
        found = Extracted(*_html(text) if suffix.startswith(".htm") else (text,), warning=warning)
    if not found.text.strip():
        raise UserError("no text in it" + ("; scanned pages need OCR first" if suffix == ".pdf" else ""))
    headings = list(_headings(found.text)) if suffix in (".md", ".htm", ".html") else []
    if front := regex.match(r"---\n(?:(?!---).*\n){0,40}?title:[ \t]*(\S.*)", found.text):  # of a Markdown file
        found.title = front[1].strip("\"' ")
    name = " ".join(regex.split(r"[\s_-]+", valid_unicode(path.stem))).strip()
    found.title = " ".join(found.title.split())[:MAX_TITLE] or (headings[0][3] if headings else name)
    found.sections = list(_sections(found.text, found.title, headings))
    return found


_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # after UTF-32, whose mark begins alike


def _decode(data: bytes, html: bool) -> tuple[str, str]:
    """Bytes -> (text with \\n as line end, a warning or ""): UTF-8 unless the bytes or a page say otherwise."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "")
    if not encoding and b"\0" in data[:8192]:
        raise UserError("holds binary data, not text")
    encoding, warning = encoding or "utf-8", ""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        declared = EncodingDetector.find_declared_encoding(data, is_html=True) if html else None
        try:
            encoding = codecs.lookup(declared).name if declared and not declared.startswith("utf") else encoding
            encoding = "cp1252" if encoding == "iso8859-1" else encoding  # as browsers do
            text = data.decode(encoding, "replace")
        except (LookupError, UnicodeError):  # there is no such encoding
            text = data.decode("utf-8", "replace")
        if (lost := text.count("\ufffd")) > len(text) / 5:
            raise UserError("not text in UTF-8; convert it first") from None
        warning = f"{lost} characters could not be decoded and were replaced" if lost else ""
    return valid_unicode(text).replace("\r\n", "\n").replace("\r", "\n"), warning


_SPACE = regex.compile(r"[^\S\v]+")
_HEADS = {f"h{level}": "#" * level for level in range(1, 7)}
_DROPPED = {"script", "style", "template", "noscript", "nav", "title", "svg", "iframe", "select", "textarea"}
_BLOCKS = (
    "p div section article main header footer aside h1 h2 h3 h4 h5 h6 ul ol dl table blockquote figure form fieldset"
    " caption details summary".split()
)
_AROUND = dict.fromkeys(_BLOCKS, ("\n\n", "\n\n")) | dict.fromkeys(["dt", "dd"], ("\n", ""))
_AROUND |= {"li": ("\n- ", ""), "tr": ("\n", "|"), "td": ("| ", " "), "th": ("| ", " "), "hr": ("\n\n", "")}


def _html(markup: str) -> tuple[str, str]:
    """A page -> its text in a simple Markdown (headings, lists, tables, <pre> fenced) and its title or ""."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "this looks like a file name", "this looks like XML"
            soup = BeautifulSoup(markup, "html.parser")
    except Exception as e:  # whatever a parser may do when a page is broken enough
        raise UserError(f"cannot be parsed as HTML ({type(e).__name__})") from e
    title = soup.title.get_text() if soup.title else ""
    parts, todo = [""], [soup]  # a stack, not recursion: forgotten end tags nest thousands of elements
    while todo:
        node, piece = todo.pop(), ""
        if isinstance(node, Tag):
            if words := _heading(node) if node.name in _HEADS else "":
                piece = f"\n\n{_HEADS[node.name]} {words}\n\n"
            elif node.name == "br":
                piece = "\v"  # which a page can't hold, and which no white space swallows
            elif node.name == "pre":
                for tag in node("br"):
                    tag.append("\n")
                piece = f"\n\n```\n{node.get_text().strip(chr(10))}\n```\n\n"
            elif node.name not in _DROPPED:
                piece, after = _AROUND.get(node.name, ("", ""))
                todo += [after, *reversed(node.contents)]
        elif type(node) is str:
            piece = node
        elif type(node) in (NavigableString, CData):  # not comments
            piece = _SPACE.sub(" ", node)
            piece = piece.lstrip() if parts[-1][-1:].isspace() else piece
        if piece:
            parts.append(piece)
    text = "".join(parts).replace("\v", "\n").strip()
    return regex.sub(r"\n{3,}", "\n\n", text), title


def _heading(tag: Tag) -> str:
    """The words of a heading; "" if it is empty, or holds so much that its end tag must be missing."""
    words, todo = "", [tag]
    for _ in range(50):  # tags and strings
        node = todo.pop()
        if isinstance(node, Tag):
            todo += reversed(node.contents)
            words += " " if node.name in _AROUND or node.name == "br" else ""
        elif type(node) is NavigableString:
            words += node
        if not todo:
            words = " ".join(words.split())
            return words if len(words) <= MAX_TITLE else ""
    return ""


def _pdf(data: bytes) -> Extracted:
    """The text of a PDF's pages with one line feed between them, so that sentences run on over page ends."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of what it mends and raises what it can't
    texts, bad = [], 0
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        title = str((reader.metadata or {}).get("/Title") or "")
        pages = list(reader.pages)
    except Exception as e:  # a damaged file raises anything from KeyError to RecursionError
        raise UserError(f"damaged, or encrypted with a password ({type(e).__name__})") from e
    for page in pages:
        try:
            text = valid_unicode(page.extract_text().replace("\0", " ")).rstrip()
        except Exception:
            text, bad = "", bad + 1
        texts.append(regex.sub(r"(?<=\p{Ll})-\n(?=\p{Ll})", "", text))  # nearly always a divided word
    starts = list(accumulate((len(text) + 1 for text in texts[:-1]), initial=0))
    warning = f"{bad} of {len(pages)} pages could not be read" if bad else ""
    return Extracted("\n".join(texts), valid_unicode(title), pages=starts, warning=warning)


_HEADING = regex.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})[^`\n]*\n[\s\S]*?(?:^ {0,3}(?P=fence)|\Z)"  # code, where # is no heading
    rf"|^ {{0,3}}(?P<mark>#{{1,6}})[ \t]+(?P<words>\S.{{0,{MAX_TITLE - 1}}}?)[ \t]*+#*+[ \t]*+$"
    rf"|(?<=\A|\n\n)(?P<words>[\w*`\[].{{0,{MAX_TITLE - 1}}})\n(?P<mark>=+|--+)[ \t]*+$",
    regex.MULTILINE,
)


def _headings(text: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield the headings of Markdown: (start, end, level, words)."""
    for match in _HEADING.finditer(text):
        if mark := match["mark"]:
            yield *match.span(), {"=": 1, "-": 2}.get(mark[0], len(mark)), match["words"].strip()


def _sections(text: str, title: str, headings: list[tuple[int, int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, heading); to a heading belong those above it, but none that the title says already.

    A heading is no content of its section, unless nothing else is.
    """
    path: list[tuple[int, str]] = []
    said = f" {' '.join(tokenize(title))} "
    top, bottom = (0, 0, 0, ""), (len(text), len(text), 0, "")
    for (start, end, level, words), (stop, _, next_level, _) in pairwise([top, *headings, bottom]):
        path = [above for above in path if above[0] < level] + [(level, words)]
        if text[end:stop].strip():
            start = end
        elif next_level > level:
            continue
        new = [words for _, words in path if words and f" {' '.join(tokenize(words))} " not in said]
        yield start, stop, " - ".join(new)
