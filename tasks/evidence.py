"""Questions over documents as targets for the evidence reader (nanochat/evidence.py): which word pieces answer.

stream = PointerStream(RAGTask(...), seed=1)     # of any task whose conversations are documents and questions
loader = PairLoader(stream, batch_size=32, sequence_len=128)
ids, targets, kinds = next(loader)               # (B, T), (B, 2), (B, T)
"""

import copy
import random
import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from nanochat.common import UserError, over_ranks
from nanochat.documents import tokenize
from nanochat.evidence import EvidenceReader, Window, read_pair, shown_text, stack
from nanochat.rag_utils import ABSTENTION, answer_f1, extract_citations, strip_citations
from tasks.common import MixStream, Task, whole_word

POOL = 512  # pairs that are sorted by length at a time
Pair = tuple[Window, tuple[int, int]]  # and the places of the answer's first and last piece, 0 and 0 for none


class PointerStream:
    """sample(i) -> a Pair from conversation i: one of its questions, more often the first, with all its documents.

    An answer that no document has in these words can't be pointed at: the next conversation takes its place.
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task, self.seed = task, seed
        self.order = (-1, np.arange(0))  # epoch and the order of its conversations

    def sample(self, i: int) -> Pair:
        for k in range(i, i + len(self.task)):
            epoch, at = divmod(k, len(self.task))
            if epoch != self.order[0]:
                self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.task))
            self.task.epoch = epoch
            if pair := draw_pair(self.task[int(self.order[1][at])], random.Random(f"{self.seed}/{k}")):
                return pair
        raise UserError("no question has its answer in its documents, word for word: nothing to point at")


def draw_pair(conversation: dict, rng: random.Random) -> Pair | None:
    """One question of the conversation, over its documents, and where the answer stands; None if it doesn't."""
    messages = conversation["messages"]
    docs = [doc for m in messages if m["role"] == "retrieval" for doc in m["documents"]]
    turns = [(m["content"], a["content"]) for m, a in pairwise(messages) if a["role"] == "assistant"]
    question, answer = turns[0] if rng.random() < 0.5 else rng.choice(turns)
    text, places = shown_text(docs)
    window = read_pair(question, text)[:1]
    if not window or answer == ABSTENTION:
        return (window[0], (0, 0)) if window else None
    numbers = [doc.get("number", n) for n, doc in enumerate(docs, 1)]
    cited = [place for n, place in zip(numbers, places) if n in extract_citations(answer)]
    asked = set(tokenize(question))

    def near(found: re.Match) -> int:  # of several places, the one amid most of the question's words
        return len(asked & set(tokenize(text[max(0, found.start() - 80) : found.end() + 80])))

    words = whole_word(strip_citations(answer).strip().removesuffix("."))
    said = [found for a, b in cited for found in words.finditer(text, a, b)]
    if not said:
        return None
    start, end = max(said, key=near).span()
    pieces = [n for n, (a, b) in enumerate(window[0].places) if window[0].kinds[n] and a < end and b > start]
    return (window[0], (pieces[0], pieces[-1])) if pieces else None


class PairLoader:
    """Batches of pairs of like length, of about `batch_size` x `sequence_len` word pieces with padding.

    Iterates over ids (B, T), targets (B, 2) and kinds (B, T), all int64. Samples are shared by the ranks. Resuming
    draws the pairs of the present pool again.
    """

    def __init__(self, stream: MixStream, batch_size: int, sequence_len: int, rank: int = 0, world_size: int = 1):
        self.stream, self.batch_size, self.sequence_len = stream, batch_size, sequence_len
        self.rank, self.world_size = rank, world_size
        self.drawn = rank  # the next index to sample
        self.begun = self._mark()
        self.taken, self.batches = 0, []

    def __iter__(self) -> "PairLoader":
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.taken == len(self.batches):
            self.begun, self.taken, self.batches = self._mark(), 0, self._draw()
        batch = self.batches[self.taken]
        self.taken += 1
        ids, kinds = stack([window for window, _ in batch])
        return ids, torch.tensor([target for _, target in batch]), kinds

    def _draw(self) -> list[list[Pair]]:
        pool = [self.stream.sample(self.drawn + n * self.world_size) for n in range(POOL)]
        seed, self.drawn = self.drawn, self.drawn + POOL * self.world_size
        pool.sort(key=lambda pair: len(pair[0].ids))
        batches, size = [], self.batch_size * self.sequence_len
        while pool:
            longest = -(-len(pool[-1][0].ids) // 16) * 16
            n = max(1, size // longest)
            batches.append(pool[-n:])
            del pool[-n:]
        random.Random(seed).shuffle(batches)
        return batches

    def _mark(self) -> dict:
        inner = self.stream.state_dict()
        return {"drawn": self.drawn, "stream": {**inner, "counts": dict(inner["counts"])}}

    def state_dict(self) -> dict:
        return {"begun": self.begun, "taken": self.taken, "ranks": [self.rank, self.world_size]}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict()` was taken."""
        if state["ranks"] != [self.rank, self.world_size]:
            raise UserError(
                f"the checkpoint was written by {state['ranks'][1]} processes; "
                f"resume with as many, not {self.world_size}"
            )
        self.drawn, self.begun = state["begun"]["drawn"], state["begun"]
        self.stream.load_state_dict(state["begun"]["stream"])
        self.taken, self.batches = state["taken"], self._draw() if state["taken"] else []


def pointing_eval(task: Task, n: int, prefix: str) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for the training loop over `n` conversations of `task`, first questions only.

    `f1` of the best words where there is an answer, whether abstained from or not; `abstains`: rightly, where
    there is none; `over_abstains`: wrongly; `score` as in reading_eval.
    """
    task.epoch = 10**6  # draws that training doesn't see even on the same questions
    asked, wanted = [], []
    for i in random.Random(0).sample(range(len(task)), min(n, len(task))):
        read, question, answer = task[i]["messages"][:3]
        asked.append((question["content"], read["documents"]))
        wanted.append(answer["content"])

    def evaluate(model: nn.Module) -> dict[str, float]:
        reader = EvidenceReader(copy.deepcopy(model))
        found = over_ranks(lambda part: [e and (e.text, e.odds) for e in reader.find(part)], asked)
        told = [(f or ("", -1.0), w) for f, w in zip(found, wanted)]
        there = [(text, odds, strip_citations(w)) for (text, odds), w in told if w != ABSTENTION]
        gone = [odds for (_, odds), w in told if w == ABSTENTION]
        mean = lambda xs: sum(xs) / max(1, len(xs))
        out = {
            "f1": mean([answer_f1(text, [w]) for text, _, w in there]),
            "over_abstains": mean([odds <= 0 for _, odds, _ in there]),
            "abstains": mean([odds <= 0 for odds in gone]),
        }
        said = mean([answer_f1(text, [w]) * (odds > 0) for text, odds, w in there])
        out["score"] = (said + out["abstains"]) / 2
        return {prefix + name: value for name, value in out.items()}

    return evaluate
