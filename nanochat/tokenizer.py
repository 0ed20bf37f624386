"""Byte-level BPE: trained by rustbpe, run by tiktoken, stored as JSON; and the one renderer of conversations.

    tokenizer = Tokenizer.train(texts, vocab_size=8192); tokenizer.save(folder); Tokenizer.load(folder)
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=1024)

Special tokens are atomic and can't be written: text that spells one is encoded as plain text. The conversation
format is the one of docs/formats.md:

    <|bos|><|system_start|>…<|system_end|>
    <|retrieval_start|>query<|doc_start|>[1] Title⏎Content<|doc_end|>…<|retrieval_end|>
    <|user_start|>Question?<|user_end|><|assistant_start|>Answer. [1]<|assistant_end|>

Every piece of text in it is encoded after one space (sentencepiece's "dummy prefix"): a word then has the same token
at the start of an answer as in the middle of a passage, which is what a small model that copies needs.
"""

import base64
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from nanochat.common import UserError, read_json, write_json

# GPT-4's split pattern but with at most two digits a piece: with 8k tokens, three-digit numbers would eat the table.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
PAIRS = ("system", "user", "assistant", "retrieval", "doc", "search", "evidence")
SPECIAL_TOKENS = (
    ["<|bos|>"]
    + [f"<|{name}_{end}|>" for name in PAIRS for end in ("start", "end")]
    + ["<|mem|>", "<|sep|>"]
    + [f"<|spare_{i}|>" for i in range(8)]
)
FORMAT_VERSION = 1


class Tokenizer:
    """A tiktoken encoding plus our special tokens. Ids 0…n-1 are byte pairs by rank, the special tokens follow."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN):
        self.ranks, self.pattern = ranks, pattern
        self.special_ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._enc = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
        self.bos = self.special_ids["<|bos|>"]
        self.assistant_end = self.special_ids["<|assistant_end|>"]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn byte pairs from `texts`. `vocab_size` counts the special tokens too."""
        import rustbpe

        n_pairs = vocab_size - len(SPECIAL_TOKENS)
        if n_pairs < 256:
            raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes + {len(SPECIAL_TOKENS)} special tokens")
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(texts), n_pairs, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        if len(ranks) < n_pairs:
            raise UserError(f"the text yields only {len(ranks)} byte pairs; give more text or a smaller vocab_size")
        return cls(ranks)

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json."""
        tokens = [base64.b64encode(t).decode() for t in sorted(self.ranks, key=self.ranks.__getitem__)]
        obj = {"version": FORMAT_VERSION, "pattern": self.pattern, "special_tokens": SPECIAL_TOKENS, "tokens": tokens}
        write_json(Path(folder) / "tokenizer.json", obj)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read `folder`/tokenizer.json. Raises UserError if it isn't a tokenizer of ours."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"no tokenizer at {path}; train one with python -m scripts.tok_train")
        obj = read_json(path)
        try:
            if obj["version"] != FORMAT_VERSION or obj["special_tokens"] != SPECIAL_TOKENS:
                raise UserError(f"{path} was written by another version; train again with python -m scripts.tok_train")
            ranks = {base64.b64decode(t, validate=True): rank for rank, t in enumerate(obj["tokens"])}
            return cls(ranks, obj["pattern"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path} is not a tokenizer file: {type(e).__name__} {e}") from e

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def token_bytes(self) -> list[int]:
        """Length in bytes of each token, 0 for special tokens (they stand for no text)."""
        return [len(t) for t in sorted(self.ranks, key=self.ranks.__getitem__)] + [0] * len(SPECIAL_TOKENS)

    def encode(self, text: str | bytes) -> list[int]:
        """Text -> ids, never a special token. Bytes that aren't UTF-8 and lone surrogates survive, too."""
        if isinstance(text, str):
            try:
                text.encode("utf-8")  # tiktoken would turn half a surrogate pair into U+FFFD without a word
                return self._enc.encode_ordinary(text)
            except UnicodeEncodeError:
                text = text.encode("utf-8", "surrogatepass")
        try:
            return self._enc.encode_ordinary(text.decode("utf-8"))
        except UnicodeDecodeError:
            return self._enc._encode_bytes(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        """Like `encode`, for many texts at once; half surrogate pairs become U+FFFD."""
        return self._enc.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Ids -> the bytes they stand for (special tokens as spelled)."""
        return self._enc.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text; byte sequences that aren't UTF-8 become U+FFFD."""
        return self._enc.decode(ids, errors="replace")

    # ------------------------------------------------------------------------------------------------------------------
    # Conversations

    def render_conversation(
        self, conversation: dict, max_tokens: int = 0, completion: bool = False
    ) -> tuple[list[int], list[int]]:
        """Conversation -> (ids, mask), both of one length; the mask is 1 on what the assistant says, its end included.

        With `completion`, the rendering ends in <|assistant_start|>, ready for the model to answer. With `max_tokens`,
        a conversation that is too long loses its lowest-scored documents first, then the tails of the rest, never a
        message; raises UserError if the messages alone don't fit. Documents keep their numbers when others go.
        """
        parts = self._parts(conversation)
        if completion:
            parts.append((None, [self.special_ids["<|assistant_start|>"]], 0))
        if max_tokens:
            self._fit(parts, max_tokens)
        ids = [i for _, piece, _ in parts for i in piece]
        mask = [m for _, piece, m in parts for _ in piece]
        return ids, mask

    def _parts(self, conversation: dict) -> list[tuple[float | None, list[int], int]]:
        """The conversation as (document score or None, ids, mask) pieces."""
        special = self.special_ids
        parts: list[tuple[float | None, list[int], int]] = [(None, [self.bos], 0)]
        number = 0  # documents are numbered through all hops, unless they bring a number
        for message in check_conversation(conversation)["messages"]:
            role = message["role"]
            start, end = special[f"<|{role}_start|>"], special[f"<|{role}_end|>"]
            if role == "retrieval":
                parts.append((None, [start] + self.encode_text(message.get("query") or ""), 0))
                for doc in message["documents"]:
                    doc = doc if isinstance(doc, dict) else vars(doc)
                    number = doc.get("number") or number + 1
                    head = self.encode_text(f"[{number}] {doc.get('title', '')}\n")
                    content = " ".join(doc["content"].split())  # line ends of a page are nobody's words
                    ids = [special["<|doc_start|>"], *head, *self.encode_text(content), special["<|doc_end|>"]]
                    score = doc.get("score")
                    parts.append((float("-inf") if score is None else float(score), ids, 0))
                parts.append((None, [end], 0))
            elif role == "assistant":
                parts += [(None, [start], 0), (None, self.encode_text(message["content"]) + [end], 1)]
            else:
                parts.append((None, [start, *self.encode_text(message["content"]), end], 0))
        return parts

    def _fit(self, parts: list, max_tokens: int) -> None:
        """Shrink document pieces in place until everything fits."""
        excess = sum(len(ids) for _, ids, _ in parts) - max_tokens
        docs = [i for i, (score, _, _) in enumerate(parts) if score is not None]
        fixed = sum(len(ids) for score, ids, _ in parts if score is None)
        if fixed > max_tokens:
            raise UserError(
                f"the messages take {fixed} tokens without any document; the model reads at most {max_tokens}: "
                "shorten the question"
            )
        # the later of two equals goes first; the last one left is truncated rather than dropped
        for i in sorted(docs, key=lambda i: (parts[i][0], -i))[:-1]:
            if excess <= 0:
                return
            excess -= len(parts[i][1])
            parts[i] = (None, [], 0)
        if excess > 0 and docs:
            i = max(docs, key=lambda i: (parts[i][0] is not None, len(parts[i][1])))
            ids = parts[i][1]
            keep = len(ids) - excess - 1
            parts[i] = (None, ids[:keep] + ids[-1:] if keep > 1 else [], 0)

    def encode_text(self, text: str) -> list[int]:
        """Encode a piece of a conversation: after one space (see the module's docstring)."""
        return self.encode(" " + text) if text else []

    def decode_text(self, ids: Sequence[int]) -> str:
        """The inverse of `encode_text`."""
        return self.decode(ids).removeprefix(" ")


def check_conversation(conversation: dict) -> dict:
    """Return the conversation if it has the format of docs/formats.md, else raise UserError saying what is wrong."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message')
    for n, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant", "retrieval"):
            raise UserError(f"message {n}: role must be system, user, assistant or retrieval, not {role!r}")
        if role == "retrieval":
            docs = message.get("documents")
            get = lambda d: d.get("content") if isinstance(d, dict) else getattr(d, "content", None)
            if not isinstance(docs, list) or not all(isinstance(get(d), str) for d in docs):
                raise UserError(f"message {n}: a retrieval message needs 'documents', each with a text 'content'")
            numbers = [d["number"] for d in docs if isinstance(d, dict) and d.get("number") is not None]
            if not all(type(number) is int and number > 0 for number in numbers):
                raise UserError(f"message {n}: a document's 'number' must be a whole number from 1")
            alike = [d.get("similarity") for d in docs if isinstance(d, dict)]
            if not all(x is None or type(x) in (int, float) for x in alike):
                raise UserError(f"message {n}: a document's 'similarity' must be a number")
            close = [d.get("closest") or [] for d in docs if isinstance(d, dict)]
            if not all(isinstance(told, list) and all(isinstance(s, str) for s in told) for told in close):
                raise UserError(f"message {n}: a document's 'closest' must be a list of sentences")
        elif not isinstance(message.get("content"), str):
            raise UserError(f"message {n}: a {role} message needs a text 'content'")
    return conversation


def without_answer(conversation: dict) -> dict:
    """A copy of the conversation up to and without its last assistant message: what the model is asked."""
    messages = copy.deepcopy(conversation["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**conversation, "messages": messages}
