"""Data sets as conversations, and how they become token streams.

A Task is `len(task)` and `task[i] -> conversation` (docs/formats.md). TaskMixture shuffles several together,
TaskSequence plays them one after the other (a curriculum), JSONLTask reads your own file. Streams are what the loader
packs: `ConversationStream` renders a task, `MixStream` draws from several streams by weight.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nanochat.common import UserError, read_jsonl
from nanochat.tokenizer import Tokenizer, check_conversation


class Task:
    """A data set of conversations. A subclass sets `self.examples` or overrides both methods.

    `epoch` changes what a task with random parts (order of documents, wording) returns; the stream sets it.
    """

    examples: Sequence[dict] = ()
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        return self.examples[i]

    def rng(self, i: int) -> random.Random:
        """The random generator of example i in this epoch: same example, same epoch, same draw."""
        return random.Random(f"{type(self).__name__}/{self.epoch}/{i}")


class TaskMixture(Task):
    """Several tasks shuffled into one, each example once. Give a task twice to weigh it twice."""

    def __init__(self, tasks: Sequence[Task], seed: int = 0):
        self.tasks = list(tasks)
        index = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]
        random.Random(seed).shuffle(index)
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        t, k = self.index[i]
        self.tasks[t].epoch = self.epoch
        return self.tasks[t][k]


class TaskSequence(TaskMixture):
    """Several tasks one after the other, in order."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = list(tasks)
        self.index = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]


class JSONLTask(Task):
    """Your own conversations: one `{"messages": [...]}` a line. Raises UserError naming a malformed line."""

    def __init__(self, path: str | Path):
        self.examples = []
        for n, row in enumerate(read_jsonl(path), 1):
            try:
                self.check(row)
            except UserError as e:
                raise UserError(f"{path}, record {n}: {e}") from e
            self.examples.append(row)
        if not self.examples:
            raise UserError(f"{path} holds no conversation")

    def check(self, row: dict) -> None:
        """Raises UserError if a row can't be learned from."""
        check_conversation(row)
        if not any(m["role"] == "assistant" for m in row["messages"]):
            raise UserError("no assistant message to learn from")


class ConversationStream:
    """sample(i) -> (ids, mask) of conversation i, epoch after epoch, in a new order each.

    A conversation whose messages alone exceed `max_tokens` is passed over (the next one takes its place) and counted
    in `skipped`. One that is too long with its documents first loses its last questions, so that no answer stays whose
    document had to go; only then does the renderer trim documents.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, seed: int = 0, shuffle: bool = True):
        if not len(task):
            raise UserError(f"{type(task).__name__} holds no example")
        self.task, self.tokenizer, self.max_tokens, self.seed, self.shuffle = task, tokenizer, max_tokens, seed, shuffle
        self.skipped = 0
        self._epoch, self._order = -1, np.arange(len(task))

    def sample(self, i: int) -> tuple[list[int], list[int]]:
        for k in range(i, i + len(self.task)):
            epoch, k = divmod(k, len(self.task))
            self.task.epoch = epoch  # always: another stream may have left its own in a task they share
            if epoch != self._epoch:
                self._epoch = epoch
                if self.shuffle:
                    self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.task))
            try:
                ids, mask = self._render(self.task[int(self._order[k])])
            except UserError:
                self.skipped += 1
                continue
            if any(mask):
                return ids, mask
            self.skipped += 1
        raise UserError(f"no conversation fits into {self.max_tokens} tokens; use a longer --sequence_len")

    def _render(self, conversation: dict) -> tuple[list[int], list[int]]:
        messages = conversation["messages"]
        while True:
            ids, mask = self.tokenizer.render_conversation({**conversation, "messages": messages})
            last_turn = [m["role"] for m in messages[-2:]] == ["user", "assistant"]
            if len(ids) <= self.max_tokens:
                return ids, mask
            if not last_turn or sum(m["role"] == "assistant" for m in messages) < 2:
                return self.tokenizer.render_conversation({**conversation, "messages": messages}, self.max_tokens)
            messages = messages[:-2]


class MixStream:
    """Draws from several streams by weight; weights may change while training runs (they are part of the state)."""

    def __init__(self, streams: dict[str, object], weights: dict[str, float], seed: int = 0, world_size: int = 1):
        self.streams, self.weights, self.seed, self.world_size = streams, check_shares(weights), seed, world_size
        self.counts = dict.fromkeys(streams, 0)

    def sample(self, i: int) -> tuple[list[int], list[int] | None]:
        names = list(self.streams)
        name = random.Random(f"{self.seed}/{i}").choices(names, [self.weights[n] for n in names])[0]
        k = self.counts[name] * self.world_size + i % self.world_size  # ranks take turns within each stream
        self.counts[name] += 1
        return self.streams[name].sample(k)

    def state_dict(self) -> dict:
        inner = {n: s.state_dict() for n, s in self.streams.items() if hasattr(s, "state_dict")}
        return {"counts": self.counts, "weights": self.weights, "streams": inner}

    def load_state_dict(self, state: dict) -> None:
        if state["weights"].keys() != self.streams.keys():
            raise UserError("the checkpoint was trained on another mix of data, by another version perhaps; begin anew")
        self.counts, self.weights = dict(state["counts"]), dict(state["weights"])
        for name, inner in state["streams"].items():
            self.streams[name].load_state_dict(inner)


def check_shares(shares: dict[str, float]) -> dict[str, float]:
    """A copy of `shares`. Raises UserError if one is negative (the others then add up to more than 1) or all are 0."""
    if min(shares.values()) < -1e-9 or not sum(shares.values()) > 0:
        given = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
        raise UserError(f"the shares of what is trained on must lie between 0 and 1 and add up to 1, not {given}")
    return {name: max(0.0, share) for name, share in shares.items()}


def whole_word(text: str) -> re.Pattern:
    """`text` as a whole word (or number: '12' is not in '12,000' or '3.12')."""
    return re.compile(rf"(?<![\w.,]){re.escape(text)}(?![\w]|[.,]\d)")


def answer_loss(tokenizer: Tokenizer, task: Task, name: str, n: int = 100) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for the training loop: mean cross-entropy (nats) of the assistant's tokens in `n` conversations.

    Those that are longer than the model's context are left out.
    """

    def evaluate(model: nn.Module) -> dict[str, float]:
        total = count = 0
        device = next(model.parameters()).device
        for i in range(min(n, len(task))):
            try:
                ids, mask = tokenizer.render_conversation(task[i], model.config.sequence_len)
            except UserError:
                continue
            ids, targets = torch.tensor([ids], device=device), torch.tensor([ids], device=device)
            targets[torch.tensor([mask], device=device) == 0] = -1
            with torch.no_grad():
                total += model(ids[:, :-1], targets[:, 1:].contiguous(), reduction="sum").item()
            count += sum(mask)
        return {f"{name}_loss": total / max(1, count)}

    return evaluate
