"""Answers in the words of their documents: which tokens may come next.

    quoting = Quoting(tokenizer, prompt)       # the documents in a rendered prompt
    quoting.allows(said + [token])             # may an answer begin like this?
    quoting.allows(said, done=True)            # may it end here?

A small model copies names with a wrong piece in the middle ("Ilir Duguffi"). Where answers stand in the documents word
for word, as those of the questions it was trained on do, decoding can hold it to words that are there: a passage of one
document, then "." and at least one citation of a document that is in the prompt; or the sentence that it abstains with.
"""

import re
from collections.abc import Sequence

from nanochat.documents import UNSPACED
from nanochat.rag_utils import ABSTENTION
from nanochat.tokenizer import Tokenizer

OPEN = set("a an the of in on at to for from by with and or per as than is was".split())  # no answer ends with these
_HEAD = re.compile(r"\[(\d+)\] ?([^\n]*)\n ?")


class Quoting:
    """What may be said over the documents of a prompt; false if it has none. With `abstain`, the abstention, too."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], abstain: bool = True):
        self.tokenizer, self.abstain = tokenizer, abstain
        self.texts, self.numbers = [], set()
        start, end = (tokenizer.special_ids[name] for name in ("<|doc_start|>", "<|doc_end|>"))
        for at in (i for i, token in enumerate(prompt) if token == start):
            shown = tokenizer.decode_text(prompt[at + 1 : prompt.index(end, at)])
            if head := _HEAD.match(shown):
                self.numbers.add(head[1])
                self.texts += [head[2], shown[head.end() :]]

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def allows(self, said: Sequence[int], done: bool = False) -> bool:
        """Whether an answer may begin with these tokens (`done`: may be them)."""
        raw = self.tokenizer.decode_bytes(said).removeprefix(b" ")
        words = raw.decode("utf-8", "ignore")  # half a character at the end is left out here, and looked up below
        half = raw.removeprefix(words.encode())
        if self.abstain and not half and (words == ABSTENTION if done else ABSTENTION.startswith(words)):
            return True
        if half and (done or len(half) > 3):
            return False
        return any(is_quote(words, text, self.numbers, done, half) for text in self.texts)


def is_quote(said: str, text: str, numbers: set[str], done: bool = False, half: bytes = b"") -> bool:
    """Whether an answer may begin with `said` and half a character (`done`: may be it): whole words of `text`, "." and
    citations of `numbers`.

    is_quote("Antan", "Antananarivo is the capital.", {"1"})  # True
    is_quote("Antananarivo. [1", "Antananarivo is the capital.", {"1"})  # True
    """
    if done and not said.rstrip().endswith("]"):
        return False
    if not said and not half:
        return True
    if not done and _stands(said, text, False, half):
        return True
    if half:
        return False
    words, cites, tail = said.rpartition(". [")
    if cites:
        *before, last = tail.split("][")  # each number once
        left = numbers - set(before)
        fits = last[:-1] in left if last.endswith("]") else not done and any(n.startswith(last) for n in left)
        return fits and len(left) == len(numbers) - len(before) and _stands(words, text, True)
    said = said.rstrip()
    return said.endswith(".") and _stands(said[:-1], text, True)


def _stands(said: str, text: str, whole: bool, half: bytes = b"") -> bool:
    """Whether `said` and half a character stand in `text` from where a word begins (`whole`: to where one ends)."""
    if said[:1].isspace() or (whole and _unfinished(said)):
        return False
    at = text.find(said)
    while at >= 0:
        end = at + len(said)
        fits = text[end : end + 1].encode().startswith(half) if half else not whole or not _inside(text, end)
        if fits and at < len(text) and not _inside(text, at):
            return True
        at = text.find(said, at + 1)
    return False


def _unfinished(said: str) -> bool:
    """Whether something is missing at the end: "32 kilometres per", "the Ark (1911"."""
    if said.rpartition(" ")[2] in OPEN or (len(said) > 1 and said.lower() in OPEN):  # but "hepatitis A", and "A" alone
        return True
    return said[-1:] in ",;:" or said.count("(") != said.count(")") or not any(map(str.isalnum, said))


def _inside(text: str, at: int) -> bool:
    """Whether a cut before text[at] would go through a word or a number: Ant|an, 12|,000, 3.|5, -|5."""
    before, after = text[max(0, at - 2) : at], text[at : at + 2]
    if not before or not after:
        return False
    a, b = before[-1], after[0]
    if a.isdigit() and re.fullmatch(r"[.,]\d", after):
        return True
    if b.isdigit() and re.fullmatch(r"\d[.,]|\W?[-−]", before):
        return True
    return (a.isalnum() or a == "_") and (b.isalnum() or b == "_") and not UNSPACED.search(a + b)
