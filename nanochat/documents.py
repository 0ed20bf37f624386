"""What goes into retrieval: the document, its tokens, and reading documents from files.

read_documents("docs.jsonl")  # a line: {"id": "chad-land", "title": "Chad - land", "content": "...", "source": "..."}
tokenize("São Tomé: 83,871 sq km")  # ["sao", "tome", "83871", "sq", "km"]
"""

import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

import regex  # Unicode scripts and marks, which the standard `re` doesn't know; tiktoken depends on it anyway

from nanochat.common import UserError, read_jsonl


@dataclass
class Document:
    """A passage. `metadata` holds the other fields of its JSON line.

    `score` is set on what a retriever returns, and if it compares sentence vectors, `closest`, the sentences that are
    closest to the query, the very closest first, and `similarity`, that one's cosine with the query.
    """

    id: str
    title: str
    content: str
    source: str = ""
    score: float | None = None
    similarity: float | None = None
    closest: list[str] | None = None
    metadata: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is indexed."""
        return f"{self.title}\n{self.content}"

    def shown(self) -> dict:
        """The document of a retrieval message: what the model, the reader and the user go by."""
        keys = ("id", "title", "content", "score", "similarity", "closest", "source")
        date = {"date": str(self.metadata["date"])} if self.metadata.get("date") else {}
        return {key: getattr(self, key) for key in keys} | date

    def to_dict(self) -> dict:
        """The JSON form: metadata stands beside the other fields; no score, no key."""
        row = {**self.metadata, "id": self.id, "title": self.title, "content": self.content, "source": self.source}
        return row if self.score is None else {**row, "score": self.score}

    @classmethod
    def from_dict(cls, row: dict) -> "Document":
        """The inverse of `to_dict`. Raises UserError on a missing or ill-typed field."""
        if not isinstance(row, dict):
            raise UserError(f"a document is a JSON object, not a {type(row).__name__}")
        given, row, values = row, dict(row), {}
        for name in ("id", "title", "content", "source"):
            value = row.pop(name, "" if name == "source" else None)
            if not isinstance(value, str):
                problem = f"has a {type(value).__name__}, not text, in"
                if value is None:
                    problem = "has null in" if name in given else "has no"
                raise UserError(f"document {values.get('id', '')!r} {problem} field '{name}'")
            values[name] = valid_unicode(value)
        score = row.pop("score", None)
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
            raise UserError(f"document {values['id']!r}: 'score' must be a number, not {score!r}")
        return cls(**values, score=score, metadata=row)


def valid_unicode(text: str) -> str:
    """JSON may spell half a surrogate pair ("\\ud800"), which no file or tokenizer takes: it becomes '?'."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
UNSPACED = regex.compile(f"[{_UNSPACED}]")  # a character of a script without spaces between words
_TOKEN = regex.compile(
    r"\p{Nd}{1,3}(?:,\p{Nd}{3})+(?:\.\p{Nd}+)?(?![\p{L}\p{N}])"  # 83,871 -> 83871
    r"|\p{Nd}+(?:\.\p{Nd}+)+(?![\p{L}\p{N}])"  # 3.5 and 1.2.3 stay whole
    rf"|[{_UNSPACED}]"  # scripts written without spaces: one character, one token
    rf"|(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}])(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}])*"  # words
)
_ACCENTS = regex.compile(r"[\u0300-\u036f]+")


def tokenize(text: str) -> list[str]:
    """Text -> lower-case words and numbers, for every lexical retriever.

    One-character tokens (initials, "C") stay, thousands separators go, Latin accents are folded (São = Sao), and
    scripts without spaces give one token a character. Nothing is stemmed and no word is stopped: idf sees to those.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
        text = unicodedata.normalize("NFC", _ACCENTS.sub("", text))
    return [token.replace(",", "") for token in _TOKEN.findall(text.lower())]


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a .jsonl file. Raises UserError naming the line of a bad one, or if there are none."""
    documents, lines = [], {}
    for n, row in enumerate(read_jsonl(path), 1):
        try:
            doc = Document.from_dict(row)
        except UserError as e:
            raise UserError(f"{path}, row {n}: {e}") from e
        if doc.id in lines:
            raise UserError(
                f"{path}, row {n}: the id {doc.id!r} is already that of row {lines[doc.id]}; ids must be unique"
            )
        lines[doc.id] = n
        documents.append(replace(doc, score=None))
    if not documents:
        raise UserError(f"{path} holds no documents")
    return documents
