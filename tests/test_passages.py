"""Passages: cutting text, reading each kind of file, and what becomes of files that can't be read."""

import html
import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfWriter

from nanochat import extract as extract_module
from nanochat.common import UserError, read_jsonl, write_jsonl
from nanochat.documents import tokenize
from nanochat.extract import extract
from nanochat.passages import read_passages, split


def pdf(pages: list[str], title: str = "") -> bytes:
    """The smallest PDF with these pages; a line feed in a page starts a line."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for page in pages:
        kids.append(b"%d 0 R" % (len(objects) + 1))
        lines = b" ".join(b"(%s) Tj T*" % line.encode() for line in page.split("\n"))
        stream = b"BT /F1 12 Tf 72 720 Td 14 TL " + lines + b" ET"
        resources = b"/Resources<</Font<</F1 3 0 R>>>>/MediaBox[0 0 612 792]"
        objects.append(b"<</Type/Page/Parent 2 0 R%s/Contents %d 0 R>>" % (resources, len(objects) + 2))
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    objects[1] = b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(pages), b" ".join(kids))
    objects.append(b"<</Title(%s)>>" % title.encode())
    body, offsets = b"%PDF-1.4\n", []
    for n, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (n, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    trailer = b"trailer<</Size %d/Root 1 0 R/Info %d 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (size, size - 1, len(body))
    return body + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + trailer


def read(tmp_path, name: str, content: bytes | str, **options):
    """The passages of one file with this content."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_passages(path, **options)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Cutting

PARTS = st.sampled_from(
    [
        "Word",
        " ",
        "\n",
        "\n\n",
        ". ",
        "! ",
        "。",
        "東京は首都",
        "x" * 300,
        "-" * 300,
        "🙂",
        "مرحبا؟ ",
        "e\u0301",
        "3.5 ",
    ]
    + ["Dr. ", "1. ", " and so on", "\t", "'", "a-" * 40, "ภาษาไทย"]
)
TEXTS = st.one_of(st.lists(PARTS, max_size=60).map("".join), st.text(max_size=300))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(8, 40), st.data())
def test_passages_cover_the_text_in_order_and_stay_small(text, chunk_tokens, data):
    overlap = data.draw(st.integers(0, chunk_tokens - 1))
    spans = split(text, chunk_tokens, overlap)
    covered = {i for start, end in spans for i in range(start, end)}
    assert all(char.isspace() for i, char in enumerate(text) if i not in covered)
    for start, end in spans:
        content = text[start:end]
        assert content and content == content.strip()
        assert len(tokenize(content)) <= chunk_tokens and len(content) <= 16 * chunk_tokens
    for (start, end), (next_start, next_end) in pairwise(spans):
        assert start < next_start and end < next_end
        assert len(tokenize(text[next_start:end])) <= overlap


def test_passages_are_whole_sentences_and_share_whole_sentences():
    sentences = [f"Sentence number {n} has six words." for n in range(40)]
    text = " ".join(sentences)
    spans = split(text, 32, 15)
    assert [text[start:end].count(".") for start, end in spans[:-1]] == [5] * (len(spans) - 1)
    for start, end in spans:
        assert text[start:end].startswith("Sentence") and text[start:end].endswith(".")
    for (_, end), (start, _) in pairwise(spans):
        assert len(tokenize(text[start:end])) == 12  # two sentences are 12 tokens


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            "J. S. Bach met Dr. No on 3.5 m of U.S. soil. Then he left.",
            ["J. S. Bach met Dr. No on 3.5 m of U.S. soil."],
        ),
        ("1. Fill the tank with water.\n2. Start the pump and wait a while.", ["1. Fill the tank with water."]),
        (
            "He said (truly, he did): “go now, please.” And they all went.",
            ["He said (truly, he did): “go now, please.”"],
        ),
        ("東京は首都です。「大阪は違う。」次", ["東京は首都です。", "「大阪は違う。」次"]),
        ("यह पहला वाक्य यहाँ समाप्त होता है। दूसरा वाक्य यहाँ है", ["यह पहला वाक्य यहाँ समाप्त होता है।"]),
        ("a title with no stop at the end\n\nand its first paragraph here", ["a title with no stop at the end"]),
        ("one of the lines here\nanother of the lines here", ["one of the lines here", "another of the lines here"]),
    ],
)
def test_where_text_is_cut(text, want):
    size = max(8, len(tokenize(want[0])))
    assert [text[start:end] for start, end in split(text, size, 0)][: len(want)] == want


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of files

PAGE = """<!doctype html><html><head><meta charset=utf-8><title>Peru &amp; more</title><script>evil()</script>
<style>p { color: red }</style><body><nav><a href=x>Home</a></nav><!-- secret -->
<h1>Peru</h1><p>Lima is the   capital&nbsp;of
<b>Per</b>u.</p><table><tr><th>City</th><th>People</th></tr><tr><td>Lima</td><td>10,000,000</td></tr></table>
<h2>Land <small>area</small></h2><ul><li>Andes<li>Amazon</ul><pre>  # code
    indented</pre>x &lt; y &#x6771;<br>z</body></html>"""


def test_html_gives_its_words_tables_lists_code_and_headings(tmp_path):
    first, second = read(tmp_path, "page.html", PAGE)
    assert first.title == "Peru & more" and "heading" not in first.metadata  # the title says "Peru" already
    assert first.content == "Lima is the capital of Peru.\n\n| City | People |\n| Lima | 10,000,000 |"
    assert second.title == "Peru & more - Land area" and second.metadata["heading"] == "Land area"
    assert second.content == "- Andes\n- Amazon\n\n```\n  # code\n    indented\n```\n\nx < y 東\nz"


def test_broken_html_is_read_as_far_as_it_goes(tmp_path):
    assert read(tmp_path, "a.html", "<div>" * 3000 + "deep")[0].content == "deep"
    assert read(tmp_path, "a.html", "<h1>Top<h2>Sub<p>text <b>bo</b>ld")[0].title == "Top Sub text bold"
    assert read(tmp_path, "a.html", "<h1>" + "word " * 100 + "<p>end")[0].title == "a"  # no heading is that long
    assert read(tmp_path, "a.html", b"<meta charset=latin-1><p>caf\xe9 \x93x\x94")[0].content == "café “x”"
    assert read(tmp_path, "a.html", b"<meta charset=unicode_escape><title>\\ud800</title>a \xe9")[0].title == "?"
    for encoding in (b"rot13", b"idna", b"no-such"):
        assert read(tmp_path, "a.html", b"<meta charset=%s><p>a caf\xe9" % encoding)[0].content == "a caf\ufffd"


GUIDE = """---
title: "My Guide"
---

Intro.

# Install

```bash
# not a heading
```

## Linux ##

On Linux.

Windows
-------

On Windows.

## Nothing here

# Use

### Deeper

Text.
"""


def test_markdown_sections_carry_the_headings_above_them(tmp_path):
    found = read(tmp_path, "guide.md", GUIDE)
    assert [(doc.title, doc.content) for doc in found] == [
        ("My Guide", '---\ntitle: "My Guide"\n---\n\nIntro.'),
        ("My Guide - Install", "```bash\n# not a heading\n```"),
        ("My Guide - Install - Linux", "On Linux."),
        ("My Guide - Install - Windows", "On Windows."),
        ("My Guide - Install - Nothing here", "## Nothing here"),
        ("My Guide - Use - Deeper", "Text."),
    ]
    assert read(tmp_path, "b.md", "# A first heading\n\nText.")[0].title == "A first heading"
    assert read(tmp_path, "a_plain-name.txt", "# Text.")[0].title == "a plain name"


def test_pdf_passages_know_their_page_and_run_on_over_page_ends(tmp_path):
    pages = ["The pump moves infor-\nmation and", "much water. Page two it is.", "Page three ends it."]
    found = read(tmp_path, "pump.pdf", pdf(pages, "Pump Manual"), chunk_tokens=8, overlap=0)
    assert [(doc.content, doc.metadata["page"]) for doc in found] == [
        ("The pump moves information and\nmuch water.", 1),
        ("Page two it is.\nPage three ends it.", 2),
    ]
    assert {doc.title for doc in found} == {"Pump Manual"}


def test_a_pdf_page_that_cannot_be_read_is_left_out_and_told(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf(["One.", "Two.", "Three."]))
    real = extract_module.pypdf.PageObject.extract_text

    def broken(page):
        if "Two" in real(page):
            raise KeyError("/Font")
        return real(page)

    monkeypatch.setattr(extract_module.pypdf.PageObject, "extract_text", broken)
    documents, stats = read_passages(tmp_path)
    assert documents[0].content == "One.\n\nThree." and stats["warnings"] == {"a.pdf": "1 of 3 pages could not be read"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_and_line_ends_of_windows(tmp_path, encoding):
    assert read(tmp_path, "a.txt", "Grüße aus\r\n東京\r🙂.".encode(encoding))[0].content == "Grüße aus\n東京\n🙂."


def test_other_encodings_lose_letters_and_say_so(tmp_path):
    (tmp_path / "a.txt").write_bytes("Le café est fermé.".encode("latin-1"))
    documents, stats = read_passages(tmp_path)
    assert documents[0].content == "Le caf\ufffd est ferm\ufffd."
    assert stats["warnings"] == {"a.txt": "2 characters could not be decoded and were replaced"}


WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)
LINES = st.one_of(
    WORDS,
    st.sampled_from(
        ["# One", "## Two", "### In one", "```", "~~~", "---", "===", "", "Words here. More!", "| a | b |"]
    ),
    st.tuples(st.sampled_from(["# ", "## ", "#### "]), WORDS).map("".join),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=20), st.sampled_from(["a.txt", "a.md", "a.html"]), st.integers(8, 30))
def test_no_word_is_lost_offsets_point_at_contents_and_ids_are_stable(tmp_path_factory, lines, name, chunk_tokens):
    folder = tmp_path_factory.getbasetemp()
    text = "\n".join(lines)
    if name == "a.html":
        tags = {"# ": "h1", "##": "h2"}
        text = "".join(f"<{(tag := tags.get(line[:2], 'p'))}>{html.escape(line)}</{tag}>" for line in lines)
    (folder / name).write_text(text, encoding="utf-8", newline="")
    if not "".join(lines).strip():
        with pytest.raises(UserError, match="no text"):
            read_passages(folder / name)
        return
    found, stats = read_passages(folder / name, chunk_tokens, chunk_tokens // 4)
    whole = extract(folder / name).text
    assert all(whole[doc.metadata["start"] : doc.metadata["end"]] == doc.content for doc in found)
    assert {*tokenize("\n".join(lines))} <= {token for doc in found for token in tokenize(doc.text)}
    assert len({doc.id for doc in found}) == len(found) == stats["passages"]
    assert all(len(tokenize(doc.content)) <= chunk_tokens for doc in found)
    assert read_passages(folder / name, chunk_tokens, chunk_tokens // 4) == (found, stats)


# ----------------------------------------------------------------------------------------------------------------------
# Lines of JSON

ROWS = [
    {
        "id": "a",
        "title": "T",
        "content": "One sentence of six words here. " * 3 + "The end.",
        "source": "s",
        "country": "C",
    },
    {"id": "b", "title": "T", "content": "Short."},
]


def test_documents_of_jsonl_stay_whole_unless_asked(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    whole, _ = read_passages(tmp_path / "a.jsonl", chunk_tokens=12, overlap=0)
    assert [doc.to_dict() for doc in whole] == [ROWS[0], {**ROWS[1], "source": ""}]
    *parts, short = read_passages(tmp_path / "a.jsonl", chunk_tokens=12, overlap=0, chunk=True)[0]
    assert short == whole[1] and len(parts) == 2
    for part in parts:
        assert part.metadata["document"] == "a" and part.metadata["country"] == "C" and part.source == "s"
        assert ROWS[0]["content"][part.metadata["start"] : part.metadata["end"]] == part.content


def test_jsonl_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\n{"x": 2}\n')
    assert [row["x"] for row in read_jsonl(tmp_path / "a.jsonl")] == [1, 2]


def test_a_document_whose_id_another_file_has_is_not_taken_for_it(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", [{**ROWS[1], "content": "Other."}])
    write_jsonl(tmp_path / "c.jsonl", ROWS[1:])  # the same document again
    documents, stats = read_passages(tmp_path)
    assert [doc.id for doc in documents] == ["a", "b"] and stats["duplicates"] == 1
    assert stats["skipped"] == {"b.jsonl": "its document 'b' has the id of another one in a.jsonl"}


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_read_in_order_and_what_is_not_read_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(extract_module, "MAX_BYTES", 5000)
    writer = PdfWriter(clone_from=_saved(tmp_path, "z.pdf", pdf(["Last."])))
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    files = {
        "sub/deep/a.TXT": b"First.",
        "b.md": b"# Second\n\nText.",
        "empty.txt": b"",
        "blank.md": b" \n\n",
        "binary.txt": bytes(range(256)),
        "cyrillic.txt": "Это русский текст".encode("cp1251"),
        "damaged.pdf": b"%PDF-1.4\n1 0 obj",
        "scan.pdf": pdf([""]),
        "script.html": b"<script>x()</script>",
        "bad.jsonl": b'{"id": "a"}\n{',
        "large.txt": b"x" * 5001,
        "c.docx": b"x",
        ".hidden.txt": b"x",
        ".git/c.md": b"x",
    }
    for name, content in files.items():
        _saved(tmp_path, name, content)
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink("self.txt", tmp_path / "self.txt")
    os.symlink("nowhere", tmp_path / "gone.md")
    documents, stats = read_passages(tmp_path)
    assert [doc.source for doc in documents] == ["b.md", "sub/deep/a.TXT", "z.pdf"]
    assert (stats["files"], stats["passages"], stats["duplicates"], stats["ignored"]) == (3, 3, 0, {".docx": 1})
    reasons = {
        "empty.txt": "no text",
        "blank.md": "no text",
        "binary.txt": "binary",
        "cyrillic.txt": "not text in UTF-8",
        "damaged.pdf": "damaged",
        "locked.pdf": "encrypted",
        "scan.pdf": "OCR",
        "script.html": "no text",
        "bad.jsonl": "row 1: document 'a' has no field 'title'",
        "large.txt": "larger than",
    }
    assert stats["skipped"].keys() == reasons.keys()
    assert all(reason in stats["skipped"][name] for name, reason in reasons.items())


def _saved(folder, name: str, content: bytes):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_same_words_count_once_unless_under_another_heading(tmp_path):
    _saved(tmp_path, "a.txt", b"Same words here.")
    _saved(tmp_path, "copy of a.txt", b"same  WORDS\nhere.\n")
    _saved(tmp_path, "b.md", b"# Chad\n\nSame.\n\n# Peru\n\nSame.\n\n# Peru\n\nSame.")
    documents, stats = read_passages(tmp_path)
    assert [doc.title for doc in documents] == ["a", "Chad", "Chad - Peru"]
    assert stats["duplicates"] == 2


def test_ids_outlive_changes_elsewhere_in_the_file(tmp_path):
    old = read(tmp_path, "a.md", "# A\n\nOne.\n\n# B\n\nTwo.\n\n# C\n\nThree.")
    new = read(tmp_path, "a.md", "# A\n\nOne, and more.\n\n# B\n\nTwo.\n\n# C\n\nThree.")
    assert [doc.id for doc in new[1:]] == [doc.id for doc in old[1:]] and new[0].id != old[0].id
    assert new[0].id.startswith("a-md-")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "a.txt: no text in it"),
        ("a.pdf", b"hello", "a.pdf: damaged"),
        ("a.docx", b"PK\x03\x04\x00", "a.docx: holds binary data"),
        ("a.jsonl", b"{}", "a.jsonl, row 1: document"),
        ("folder/a.docx", b"x", r"nothing to read \(no .txt, .md"),
        ("folder/a.txt", b"", r"nothing to read \(a.txt: no text"),
        ("missing/../no.txt", None, "no.txt: cannot be read: No such file"),
    ],
)
def test_where_nothing_can_be_read_the_error_says_why(tmp_path, name, content, says):
    if content is not None:
        _saved(tmp_path, name, content)
    with pytest.raises(UserError, match=says):
        read_passages(tmp_path / name.partition("/")[0] if "folder" in name else tmp_path / name)


@pytest.mark.parametrize(("chunk_tokens", "overlap"), [(7, 0), (128, 128), (128, -1)])
def test_sizes_that_make_no_sense_are_refused(tmp_path, chunk_tokens, overlap):
    with pytest.raises(UserError, match="at least 8"):
        read(tmp_path, "a.txt", "x", chunk_tokens=chunk_tokens, overlap=overlap)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("one <br>two", "one \ntwo"),
        ("<p>12 High St <br> London</p>", "12 High St \nLondon"),
        ("a<br><br>b", "a\n\nb"),
        ("<pre>x<br>y</pre>", "```\nx\ny\n```"),
        ("<h1>A<br>B</h1>c", "# A B\n\nc"),
    ],
)
def test_a_line_break_in_html_is_one(markup, text):
    assert extract_module._html(markup)[0] == text
