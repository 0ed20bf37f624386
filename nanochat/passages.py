"""Passages from files: what a knowledge base is built from.

    documents, stats = read_passages("manuals")  # a folder of .txt .md .html .pdf .jsonl, or one such file

A file becomes text, the text sections (by its headings), a section passages: whole sentences, together at most
`chunk_tokens` of `documents.tokenize`'s tokens. Lines of .jsonl files are documents already and stay as they are.
"""

import hashlib
import os
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import regex
from tqdm import tqdm

from nanochat.common import UserError, is_main
from nanochat.documents import Document, read_documents, tokenize, valid_unicode

SUFFIXES = (".txt", ".md", ".html", ".htm", ".pdf", ".jsonl")

# ----------------------------------------------------------------------------------------------------------------------
# Text -> spans

_CHARS = 16  # count as a token where there are no words: rules, emoji, one endless word
_CLOSING = r"[\p{Pe}\p{Pf}\"'*_`]*+"
_NO_END = r"\b(?:\p{Lu}|Mr|Mrs|Ms|Dr|Prof|Gen|Sen|St|Mt|Fig|No|vs|e\.g|i\.e|cf|ca)|^[ \t]{0,8}\d{1,3}"  # J. S. Bach; 1.
# Text is cut behind matches of the first of these that makes the pieces small enough.
_CUTS = (
    regex.compile(
        rf"[。！？｡]+{_CLOSING}\s*+|(?<!{_NO_END})\.{_CLOSING}\s++(?!\p{{Ll}})|[\p{{STerm}}…--.]{_CLOSING}\s++|\n\s*\n",
        regex.MULTILINE | regex.V1,
    ),
    regex.compile(r"\n+"),
    regex.compile(r"\s+"),
    regex.compile(r".{1,8}[\p{M}\p{Cf}]{0,8}", regex.DOTALL),  # no spaces: anywhere, but not before an accent
)


def split(text: str, chunk_tokens: int = 128, overlap: int = 24) -> list[tuple[int, int]]:
    """Text -> the (start, end) of its passages, in order, which cover everything but white space.

    Passages are whole sentences of together at most `chunk_tokens` tokens. A sentence that is longer is cut at line
    ends, else at spaces, else (CJK, an endless word) anywhere. Each passage begins with the last sentences of the one
    before it, as many as hold at most `overlap` tokens together.
    """
    pieces = list(_pieces(text, 0, len(text), chunk_tokens))
    groups, first, tokens = [], 0, 0
    for n, (_, _, count) in enumerate(pieces):
        if n > first and tokens + count > chunk_tokens:
            groups.append(pieces[first:n])
            room, oldest, first, tokens = min(overlap, chunk_tokens - count), first + 1, n, 0
            while first > oldest and tokens + pieces[first - 1][2] <= room:
                first -= 1
                tokens += pieces[first][2]
        tokens += count
    groups.append(pieces[first:])
    spans = [(group[0][0], group[-1][1]) for group in groups if group]
    tight: list[tuple[int, int]] = []
    for a, b in spans:
        a, b = b - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())
        if a < b and (not tight or b > tight[-1][1]):  # else white space was all that it had to add
            if tight and a == tight[-1][0]:
                tight.pop()
            tight.append((a, b))
    return tight


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, in order, without the space around them."""
    found = (text[a:b].strip() for a, b in sentence_spans(text))
    return (sentence for sentence in found if sentence)


def sentence_spans(text: str, limit: int = 64) -> Iterator[tuple[int, int]]:
    """Where the sentences of a text, which they cover, begin and end; more than `limit` tokens come in pieces."""
    return ((a, b) for a, b, _ in _pieces(text, 0, len(text), limit))


def _pieces(text: str, start: int, end: int, limit: int, level: int = 0) -> Iterator[tuple[int, int, int]]:
    """Cut text[start:end] into (start, end, tokens) of at most `limit` tokens, as coarsely as that allows."""
    for a, b in pairwise([start, *(match.end() for match in _CUTS[level].finditer(text, start, end)), end]):
        tokens = -((a - b) // _CHARS)
        if tokens <= limit:  # else there is no need to count
            tokens = max(tokens, len(tokenize(text[a:b])))
        if tokens > limit and level + 1 < len(_CUTS):
            yield from _pieces(text, a, b, limit, level + 1)
        elif a < b:
            yield a, b, tokens


# ----------------------------------------------------------------------------------------------------------------------
# Files -> passages


def read_passages(
    path: str | Path, chunk_tokens: int = 128, overlap: int = 24, chunk: bool = False
) -> tuple[list[Document], dict]:
    """The passages of a file, or of all files below a folder with one of `SUFFIXES`, in the order of their paths.

    Hidden files are left out, links to folders not followed. `chunk` also splits documents of .jsonl files.

    A passage is titled "Title - Heading"; `source` is the path below the folder. Its metadata are `start` and `end`
    (content == extract(file).text[start:end]), `heading` if there is one, and a PDF's `page`, from 1, where it starts.
    Its id is made of the path and a hash of heading and content, so that it outlives changes elsewhere in the file.
    One that has the heading and content of an earlier one, but for case and white space, is dropped.

    The dict: `files` read, `passages`, `duplicates` dropped, `skipped` and `warnings` ({path: reason}), `ignored`
    ({suffix: files}). Raises UserError if nothing can be read.
    """
    if chunk_tokens < 8 or not 0 <= overlap < chunk_tokens:
        raise UserError(f"chunk_tokens {chunk_tokens}, overlap {overlap}: take at least 8, and an overlap below it")
    path, documents, hashes, owners = Path(path), [], set(), {}
    stats: dict = {"files": 0, "passages": 0, "duplicates": 0, "skipped": {}, "warnings": {}, "ignored": Counter()}
    files = _find(path, stats) if os.path.isdir(path) else [path]
    for file in tqdm(files, desc="reading", unit="file", leave=False, disable=len(files) < 2 or not is_main()):
        name = valid_unicode(file.name if file == path else file.relative_to(path).as_posix())
        try:
            if file.suffix.lower() == ".jsonl":
                found = list(_of_documents(file, chunk_tokens, overlap, chunk))
            else:
                found = list(_of_text(file, name, chunk_tokens, overlap, stats["warnings"]))
            new: dict[str, Document] = {}
            for key, doc in found:
                if key not in hashes:
                    new.setdefault(key, doc)
            ids = Counter(doc.id for doc in new.values())
            if clash := next((i for i in ids if ids[i] > 1 or i in owners), None):
                raise UserError(f"its document {clash!r} has the id of another one in {owners.get(clash, name)}")
        except UserError as e:
            if file == path:
                raise UserError(str(e) if str(path) in str(e) else f"{path}: {e}") from e
            stats["skipped"][name] = str(e)
            continue
        hashes |= new.keys()
        owners |= dict.fromkeys(ids, name)
        documents += new.values()
        stats["files"] += 1
        stats["duplicates"] += len(found) - len(new)
    if not documents:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in [*stats["skipped"].items()][:3])
        raise UserError(f"{path} holds nothing to read ({reasons or 'no ' + ', '.join(SUFFIXES)})")
    return documents, {**stats, "passages": len(documents), "ignored": dict(stats["ignored"])}


def _find(folder: Path, stats: dict) -> list[Path]:
    """The files below a folder, sorted. No recursion: folders may be a thousand deep."""
    found, todo = [], [folder]
    for here in todo:  # which grows meanwhile
        try:
            inside = [path for path in here.iterdir() if not path.name.startswith(".")]
            todo += [path for path in inside if path.is_dir() and not path.is_symlink()]
            files = [path for path in inside if path.is_file()]
        except OSError as e:
            stats["skipped"][valid_unicode(here.relative_to(folder).as_posix())] = f"cannot be read: {e.strerror}"
            continue
        found += [path for path in files if path.suffix.lower() in SUFFIXES]
        stats["ignored"].update(path.suffix.lower() for path in files if path.suffix.lower() not in SUFFIXES)
    return sorted(found)


def _of_text(file: Path, name: str, chunk_tokens: int, overlap: int, notes: dict) -> Iterator[tuple[str, Document]]:
    """Yield the passages of a file of text, each behind its hash."""
    from nanochat.extract import extract  # its parsers take a while to import, and a chat needs none of them

    found = extract(file)
    if found.warning:
        notes[name] = found.warning
    slug = regex.sub(r"[^\p{L}\p{M}\p{N}]+", "-", unicodedata.normalize("NFC", name).lower())[-60:].strip("-")
    for top, bottom, heading in found.sections:
        for a, b in split(found.text[top:bottom], chunk_tokens, overlap):
            content = found.text[top + a : top + b]
            metadata = {"page": bisect_right(found.pages, top + a)} if found.pages else {}
            metadata |= {"heading": heading} if heading else {}
            title, key = f"{found.title} - {heading}" if heading else found.title, _hash(heading, content)
            metadata |= {"start": top + a, "end": top + b}
            yield key, Document(f"{slug}-{key[:12]}", title, content, name, metadata=metadata)


def _of_documents(file: Path, chunk_tokens: int, overlap: int, chunk: bool) -> Iterator[tuple[str, Document]]:
    """Yield the documents of a .jsonl file, each behind its hash; with `chunk`, long ones in parts."""
    for doc in read_documents(file):
        spans = split(doc.content, chunk_tokens, overlap) if chunk else []
        if len(spans) < 2:
            yield _hash(doc.title, doc.content), doc
            continue
        for a, b in spans:
            key = _hash(doc.title, doc.content[a:b])
            metadata = {**doc.metadata, "document": doc.id, "start": a, "end": b}
            yield key, replace(doc, id=f"{doc.id}-{key[:12]}", content=doc.content[a:b], metadata=metadata)


def _hash(heading: str, content: str) -> str:
    """Of what makes two passages the same. The same words under another heading say something else."""
    same = "\n".join(" ".join(text.split()).casefold() for text in (heading, content))
    return hashlib.sha256(same.encode()).hexdigest()
