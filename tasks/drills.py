"""Copying and associative recall with random tokens: what a model must be able to do before it can read documents.

A transformer or hybrid learns to copy suddenly or not at all, and a small alphabet in short sequences comes first by
far; docs/LOG.md has the climb step by step. So the drill is a ladder: a level is (symbols, length), and the level
rises when accuracy on fresh drills says the last one is learned.

    stream = DrillStream(tokenizer); train(..., evals=[Eval("drill", 10, lambda m: climb(m, stream))])

copy:    <|bos|> w1 … wn <|sep|> w1 … wn <|sep|> …
recall:  <|bos|> k1 k1' <|mem|> v1 v1' v1'' <|sep|> k2 … <|search_start|> ki ki' <|search_end|> vi vi' vi'' <|sep|> …
lookup:  <|bos|><|retrieval_start|><|doc_start|> thing1 field1 <|mem|> thing1 <|sep|> value <|sep|> … <|doc_end|> …
         <|retrieval_end|><|user_start|> field1 <|mem|> thing1 <|user_end|><|assistant_start|> value <|assistant_end|> …

Recall asks by one key. Lookup is what documents ask for: several tell the same fields of different things, so that only
both names together find the value; higher up, a third of the questions has no answer and gets the abstention.
"""

import random

import torch

from nanochat.common import over_ranks
from nanochat.rag_utils import ABSTENTION
from nanochat.tokenizer import Tokenizer
from tasks.common import MixStream

LEARNED = 0.7  # accuracy that opens the next level
ABSTAIN_FROM = 4  # lookups are in vain, too, from here on; earlier, to abstain is all that would be learned
# (symbols, length); 0 symbols = the whole vocabulary
LADDER = [(64, 16), (64, 48), (128, 48), (256, 48), (512, 64), (1024, 64), (2048, 96), (0, 128), (0, 224)]


class DrillStream:
    """sample(i) -> (ids, mask); `level` indexes LADDER and is part of the state."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0, level: int = 0):
        self.seed, self.level = seed, level
        self.looks = 0  # how many times `climb` has looked
        self.special = s = tokenizer.special_ids
        self.abstention = tokenizer.encode_text(ABSTENTION)
        self.bos, self.sep, self.mem = s["<|bos|>"], s["<|sep|>"], s["<|mem|>"]
        self.ask, self.end = s["<|search_start|>"], s["<|search_end|>"]
        self.n_symbols = len(tokenizer.ranks)
        # The symbols of small alphabets are spread over the table by a fixed shuffle, so that a larger alphabet
        # contains the smaller ones.
        self.symbols = list(range(self.n_symbols))
        random.Random(1).shuffle(self.symbols)

    def state_dict(self) -> dict:
        return {"level": self.level, "looks": self.looks}

    def load_state_dict(self, state: dict) -> None:
        self.level, self.looks = state["level"], state["looks"]

    def sample(self, i: int) -> tuple[list[int], list[int]]:
        rng = random.Random(f"{self.seed}/{i}")
        # a fifth of the drills come from lower levels, lest they be forgotten
        level = self.level if rng.random() < 0.8 else rng.randint(0, self.level)
        kinds = (self.copy, self.recall, self.lookup, self.lookup) if self.level >= 2 else (self.copy,)
        return rng.choice(kinds)(rng, level)

    def _alphabet(self, level: int) -> tuple[list[int], int]:
        size, length = LADDER[level]
        return self.symbols[: size or self.n_symbols], length

    def copy(self, rng: random.Random, level: int) -> tuple[list[int], list[int]]:
        """Random tokens and their repeat; every token of the repeat is a target."""
        symbols, length = self._alphabet(level)
        words = rng.choices(symbols, k=rng.randint(length // 2, length))
        ids = [self.bos, *words, self.sep, *words, self.sep]
        return ids, [0] * (len(words) + 2) + [1] * (len(words) + 1)

    def recall(self, rng: random.Random, level: int) -> tuple[list[int], list[int]]:
        """Pairs of a two-token key and a value of one to four tokens; then every key, shuffled, asks for its value."""
        symbols, length = self._alphabet(level)
        n = max(2, length // 8)
        keys = list({tuple(rng.choices(symbols, k=2)) for _ in range(n)})
        rng.shuffle(keys)
        pairs = [(list(k), rng.choices(symbols, k=rng.randint(1, 4))) for k in keys]
        ids = [self.bos]
        for k, v in pairs:
            ids += [*k, self.mem, *v, self.sep]
        mask = [0] * len(ids)
        for k, v in rng.sample(pairs, len(pairs)):
            ids += [self.ask, *k, self.end, *v, self.sep]
            mask += [0] * (len(k) + 2) + [1] * (len(v) + 1)
        return ids, mask

    def lookup(self, rng: random.Random, level: int) -> tuple[list[int], list[int]]:
        """Documents about a thing each, one to five with the level, that share fields; a question names both."""
        symbols, _ = self._alphabet(level)
        s, word = self.special, lambda most: rng.choices(symbols, k=rng.randint(1, most))
        names = list(dict.fromkeys(tuple(word(2)) for _ in range(20)))
        fields, names = names[: (n := rng.randint(2, 3 + level // 4))], names[n:]
        things = names[: rng.randint(2, 2 + level // 2)]
        ids, facts = [self.bos, s["<|retrieval_start|>"]], {}
        for thing in things[1:]:  # of the first, no document tells
            ids += [s["<|doc_start|>"], *thing]
            for field in rng.sample(fields, rng.randint(1, len(fields))):
                question = (*field, self.mem, *thing)
                facts[question] = word(3)
                ids += [*question, self.sep, *facts[question], self.sep]
            ids.append(s["<|doc_end|>"])
        ids.append(s["<|retrieval_end|>"])
        mask = [0] * len(ids)
        missing = [q for field in fields for thing in things if (q := (*field, self.mem, *thing)) not in facts]
        missing = rng.sample(missing, min(len(missing), 1 + len(facts) // 3)) if level >= ABSTAIN_FROM else []
        for question in rng.sample([*facts, *missing], len(facts) + len(missing)):
            said = [*facts.get(question, self.abstention), s["<|assistant_end|>"]]
            before = [s["<|user_start|>"], *question, s["<|user_end|>"], s["<|assistant_start|>"]]
            ids += before + said
            # of an abstention only the first token, which decides: the others would be most of all targets
            mask += [0] * len(before) + [int(k == 0 or question in facts) for k in range(len(said))]
        return ids, mask


@torch.no_grad()
def drill_accuracy(model, stream: DrillStream, kind: str, level: int, n: int = 8, seed: int = 10**6) -> float:
    """Share of target tokens predicted right (teacher-forced argmax) on `n` drills that training never draws.

    Ranks share the drills.
    """
    device = next(model.parameters()).device

    def judge(part: list[int]) -> list[tuple[int, int]]:
        counts = []
        for i in part:
            ids, mask = getattr(stream, kind)(random.Random(f"eval/{seed}/{i}"), level)
            hidden = model(torch.tensor([ids[:-1]], device=device), return_hidden=True)
            keep = torch.tensor(mask[1:], device=device).bool()
            guess = model.logits(hidden[0, keep]).argmax(-1)
            counts.append((int((guess == torch.tensor(ids[1:], device=device)[keep]).sum()), int(keep.sum())))
        return counts

    right, total = map(sum, zip(*over_ranks(judge, range(n))))
    return right / total


def climb(
    model, stream: DrillStream, mix: MixStream | None = None, after: dict[str, float] | None = None, patience: int = 0
) -> dict[str, float]:
    """An evaluation for the training loop that moves the curriculum: raise the level while this one is learned.

    That is copying and, from level 2, lookup. When the top is learned, or after `patience` looks (0: never), `mix` gets
    the weights `after`: text takes over. Returns the accuracy of all drills at the level reached, and the level.
    """
    top = len(LADDER) - 1
    while True:
        kinds = ("copy", "lookup") if stream.level >= 2 else ("copy",)
        accuracy = {kind: drill_accuracy(model, stream, kind, stream.level) for kind in kinds}
        learned = min(accuracy.values()) > LEARNED
        if not learned or stream.level == top:
            break
        stream.level += 1
    accuracy["recall"] = drill_accuracy(model, stream, "recall", stream.level)
    stream.looks += 1
    if mix and after and (learned or 0 < patience <= stream.looks):
        mix.weights = dict(after)
    return {**accuracy, "level": stream.level}
