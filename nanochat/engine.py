"""Answering: read a prompt once (prefill), then one token at a time (decode), for one reader or many prompts at once.

    engine = Engine(model, tokenizer)
    text = engine.answer(conversation)                              # greedy
    for piece in engine.stream(conversation, temperature=0.7): print(piece, end="", flush=True)
    texts = engine.answer_batch(conversations, batch_size=16)       # evaluations
    completions = engine.generate(prompts, max_tokens=64)           # token ids in, ids and log-probabilities out
    prefix = engine.prefill(ids); engine.generate([ids + more], prefix=prefix)  # `ids` is read once

Prefill is limited by matrix products, decoding by how fast single operations are dispatched: hence big pieces in the
one, as many rows as there are in the other. A conversation longer than the context loses documents, worst first
(`Tokenizer.render_conversation`); the answer's share of the context is reserved beforehand. Reading documents one by
one is in reader.py.
"""

import codecs
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from nanochat.blocks.gemv import speed_up
from nanochat.common import UserError
from nanochat.gpt import GPT, Cache
from nanochat.quoting import Quoting
from nanochat.rag_utils import ABSTENTION
from nanochat.tokenizer import Tokenizer

QUOTE_FROM = 32  # likeliest tokens among which the one that goes on quoting is looked for first
PREFILL_TOKENS = 2048  # tokens read in one call, over all rows: enough to fill the cores, little enough to fit anywhere


@dataclass
class Prefix:
    """Tokens that were read and what the model knows after them. Never written to: continue it as often as you like."""

    ids: list[int]
    cache: Cache  # of one row
    logits: torch.Tensor  # (V,) for the token that comes next


@dataclass
class Completion:
    """What the model said after one prompt."""

    ids: list[int] = field(default_factory=list)  # without the stop token
    logprobs: list[float] = field(default_factory=list)  # of each token at temperature 1, the stop token's included
    watched: list[float] = field(default_factory=list)  # log-probabilities of the `watch` tokens in first place
    finished: bool = False  # ended by a stop token, not by max_tokens


# ----------------------------------------------------------------------------------------------------------------------
# The three small functions everything below is made of


@torch.inference_mode()
def prefill(model: GPT, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read ids (B, T) into the cache, in pieces; returns the last position's logits (B, V)."""
    piece = max(64, PREFILL_TOKENS // ids.size(0) // 64 * 64)  # multiples of 64 keep the scan's chunks full
    for part in ids.split(piece, dim=1):
        hidden = model(part, cache=cache, return_hidden=True)
    return model.logits(hidden[:, -1])


@torch.inference_mode()
def decode_one(model: GPT, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read one token a row, (B,), and return the logits (B, V) for the next."""
    return model.logits(model(tokens[:, None], cache=cache, return_hidden=True)[:, 0])


def sample(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """logits (B, V) -> tokens (B,). Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # nothing overflows, however cold
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf)  # the token that crosses top_p stays
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------


class Engine:
    """A model and its tokenizer, ready to answer. The weights may be fp32 or cast once (`load_model`, phase "eval")."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        speed_up(model)
        self.stop = {tokenizer.assistant_end, tokenizer.bos}
        self.special = set(tokenizer.special_ids.values())
        self.refusal = tokenizer.encode_text(ABSTENTION)
        self.last_read: Prefix | None = None  # the prompt `stream` read last: a follow-up reads only what is new

    # ------------------------------------------------------------------------------------------------------------------
    # Conversations in, text out

    def prompt(self, conversation: dict, max_tokens: int = 256) -> list[int]:
        """The conversation as ids that end where the answer begins, cut so that the answer has room in the context."""
        return self.tokenizer.render_conversation(
            conversation, self.model.config.sequence_len - self.room(max_tokens), completion=True
        )[0]

    def room(self, max_tokens: int) -> int:
        """How long an answer may be: `max_tokens`, but at most half of the context."""
        return min(max_tokens, self.model.config.sequence_len // 2)

    def text(self, ids: Sequence[int]) -> str:
        """What the ids of an answer say; special tokens stand for no text."""
        return self.tokenizer.decode_text([i for i in ids if i not in self.special])

    def answer(
        self,
        conversation: dict,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to one conversation."""
        return self.answer_batch([conversation], 1, max_tokens, temperature, top_k, top_p, seed)[0]

    def answer_batch(
        self,
        conversations: Sequence[dict],
        batch_size: int = 16,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        quote: bool = False,
        abstain: bool = True,
        progress: bool = False,
    ) -> list[str]:
        """The answers to many conversations, in their order.

        With `quote`, an answer over documents is in their words or, where it may `abstain`, the abstention.
        """
        prompts = [self.prompt(c, max_tokens) for c in conversations]
        room, options = self.room(max_tokens), {"quote": quote, "abstain": abstain, "progress": progress}
        done = self.complete_batch(prompts, batch_size, room, temperature, top_k, top_p, seed, **options)
        return [self.text(c.ids) for c in done]

    def complete_batch(
        self,
        prompts: Sequence[list[int]],
        batch_size: int = 16,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        watch: Sequence[int] = (),
        quote: bool = False,
        abstain: bool = True,
        progress: bool = False,
    ) -> list[Completion]:
        """`generate` for any number of prompts, `batch_size` at a time; batches are of similar lengths."""
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least 1 is needed")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        done: list[Completion] = [Completion()] * len(prompts)
        with tqdm(total=len(prompts), disable=not (progress and prompts), unit="answer", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = [prompts[i] for i in rows]
                options = {"watch": watch, "quote": quote, "abstain": abstain}
                out = self.generate(batch, max_tokens, temperature, top_k, top_p, seed + start, **options)
                for i, completion in zip(rows, out):
                    done[i] = completion
                bar.update(len(rows))
        return done

    def stream(
        self,
        conversation: dict | list[int],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        quote: bool = False,
        abstain: bool = True,
    ) -> Iterator[str]:
        """The answer to a conversation (or to rendered ids) in pieces, as they come; joined, they are `answer`'s text.

        A character whose bytes are spread over tokens comes out whole. The prompt is checked and read before this
        returns, so that bad input raises here and not at the first piece.
        """
        check_sampling(max_tokens, temperature, top_k, top_p)
        if isinstance(conversation, dict):
            ids, max_tokens = self.prompt(conversation, max_tokens), self.room(max_tokens)
        else:
            ids = conversation
        self.last_read = self.prefill(ids, self.last_read)
        prefix = self.last_read
        quoting = [Quoting(self.tokenizer, ids, abstain)] if quote else ()
        steps = self._decode(
            prefix.logits[None], prefix.cache.clone(), max_tokens, temperature, top_k, top_p, seed, self.stop, quoting
        )
        return self._pieces(steps)

    def _pieces(self, steps: Iterator[list[tuple[int, int, float]]]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        first = True
        for ((_, token, _),) in steps:
            if token in self.special:
                continue
            piece = decoder.decode(self.tokenizer.decode_bytes([token]))
            if piece:  # the space every text is encoded after
                yield piece.removeprefix(" ") if first else piece
                first = False
        if piece := decoder.decode(b"", final=True):
            yield piece

    # ------------------------------------------------------------------------------------------------------------------
    # Ids in, ids out

    def prefill(self, ids: list[int], prefix: Prefix | None = None) -> Prefix:
        """Read `ids` (only what is new, if they begin with `prefix`) and remember what the model then knows."""
        logits, cache = self._prefill_equal([ids], prefix)
        return Prefix(ids, cache, logits[0])

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] | None = None,
        prefix: Prefix | None = None,
        watch: Sequence[int] = (),
        quote: bool = False,
        abstain: bool = True,
    ) -> list[Completion]:
        """Complete the prompts together, as one batch; they may be of any lengths.

        Prompts of equal length are read together, the others one by one; rows that are finished leave the batch.
        With `quote`, what answers a prompt with documents is a passage of one of them and citations, or where it may
        `abstain` the abstention (quoting.py): of the likeliest tokens the first is taken that goes on so.
        """
        check_sampling(max_tokens, temperature, top_k, top_p)
        if not prompts:
            return []
        groups: dict[int, list[int]] = {}
        for row, ids in enumerate(prompts):
            groups.setdefault(len(ids), []).append(row)
        read = [self._prefill_equal([prompts[row] for row in rows], prefix) for rows in groups.values()]
        rows = [row for group in groups.values() for row in group]
        logits = torch.cat([logits for logits, _ in read])
        cache = Cache.stack([cache for _, cache in read])
        out = [Completion() for _ in prompts]
        if watch:
            for row, values in zip(rows, logits.log_softmax(-1)[:, list(watch)].tolist()):
                out[row].watched = values
        stop = self.stop if stop is None else set(stop)
        quoting = [Quoting(self.tokenizer, prompts[row], abstain) for row in rows] if quote else ()
        for step in self._decode(logits, cache, max_tokens, temperature, top_k, top_p, seed, stop, quoting):
            for i, token, logprob in step:
                completion = out[rows[i]]
                completion.logprobs.append(logprob)
                if token in stop:
                    completion.finished = True
                else:
                    completion.ids.append(token)
        return out

    def score(self, prompt: list[int], answer: list[int], prefix: Prefix | None = None) -> list[float]:
        """The log-probability of each token of `answer` (give it the end token, too) after `prompt`."""
        if not answer:
            return []
        read = self.prefill(prompt, prefix)
        ids = torch.tensor(answer, device=self.device)
        logits = read.logits[None]
        with torch.inference_mode():
            if len(answer) > 1:
                rest = self.model(ids[None, :-1], cache=read.cache.clone())[0]
                logits = torch.cat([logits, self._logits(rest)])
            return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()

    @torch.inference_mode()
    def score_batch(
        self, prompts: Sequence[list[int]], answer: list[int], batch_size: int = 16, progress: bool = False
    ) -> list[float]:
        """The log-probability of the whole of `answer` after each prompt.

        Rows of one batch are filled up on the right, where nothing looks: much faster than reading them one by one.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out = [0.0] * len(prompts)
        target = torch.tensor(answer, device=self.device)
        with tqdm(total=len(prompts), unit="document", disable=not (progress and prompts), leave=False) as bar:
            for start in range(0, len(order), batch_size):
                rows = [prompts[i] + answer for i in order[start : start + batch_size]]
                ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=self.device)
                for k, row in enumerate(rows):
                    ids[k, : len(row)] = torch.tensor(row)
                hidden = self.model(ids[:, :-1], return_hidden=True)
                at = torch.stack([h[len(row) - 1 - len(answer) : len(row) - 1] for h, row in zip(hidden, rows)])
                logprobs = self._logits(self.model.logits(at)).log_softmax(-1)
                scores = logprobs.gather(-1, target.expand(len(rows), -1)[..., None])[..., 0].sum(-1).tolist()
                for i, score in zip(order[start : start + batch_size], scores):
                    out[i] = score
                bar.update(len(rows))
        return out

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.wte.weight.device

    def _logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Without the ids a padded vocabulary has and the tokenizer doesn't."""
        return logits[..., : self.tokenizer.vocab_size]

    def _prefill_equal(self, prompts: list[list[int]], prefix: Prefix | None) -> tuple[torch.Tensor, Cache]:
        """Read prompts of one length as one batch, from `prefix` on if all begin with it -> (B, V) logits, cache."""
        if not prompts[0]:
            raise ValueError("a prompt needs at least one token")
        n = len(prefix.ids) if prefix is not None else 0
        if not n or any(ids[:n] != prefix.ids for ids in prompts):
            n, cache = 0, self.model.new_cache(len(prompts))
        else:
            cache = prefix.cache.select([0] * len(prompts))
            if len(prompts[0]) == n:
                return prefix.logits.expand(len(prompts), -1), cache
        ids = torch.tensor([p[n:] for p in prompts], device=self.device)
        return self._logits(prefill(self.model, ids, cache)), cache

    def _decode(
        self,
        logits: torch.Tensor,
        cache: Cache,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        stop: Collection[int],
        quoting: Sequence[Quoting] = (),
    ) -> Iterator[list[tuple[int, int, float]]]:
        """From the first token's logits (B, V): yields at each step (row, token, log-probability) of the live rows."""
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = list(range(logits.size(0)))
        said: list[list[int]] = [[] for _ in rows]
        for step in range(max_tokens):
            tokens = sample(logits, temperature, top_k, top_p, generator)
            for i, row in enumerate(rows):
                if quoting and quoting[row]:
                    likely = logits[i]
                    if not step and not quoting[row].abstain and self._refuses(tokens[i], cache, i):
                        likely = likely.scatter(0, tokens[i], -math.inf)
                        tokens[i] = likely.argmax()
                    tokens[i] = self._quote(likely, int(tokens[i]), said[row], quoting[row], stop)
                said[row].append(int(tokens[i]))
            logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            values = tokens.tolist()
            yield list(zip(rows, values, logprobs.tolist()))
            live = [i for i, token in enumerate(values) if token not in stop]
            if not live or step == max_tokens - 1:
                return
            if len(live) < len(rows):
                rows, tokens, cache = [rows[i] for i in live], tokens[live], cache.select(live)
            logits = self._logits(decode_one(self.model, tokens, cache))

    def _refuses(self, token: torch.Tensor, cache: Cache, row: int) -> bool:
        """Whether a first token begins the abstention: names begin with an "I", too, so this looks a token ahead."""
        if int(token) != self.refusal[0]:
            return False
        ahead = self._logits(decode_one(self.model, token[None], cache.select([row])))
        return int(ahead.argmax()) == self.refusal[1]

    def _quote(self, logits: torch.Tensor, token: int, said: list[int], quoting: Quoting, stop: Collection[int]) -> int:
        """`token`, or if that isn't allowed the likeliest that is; where there is none, `token`."""
        for n in (QUOTE_FROM, logits.numel()):  # of a trained model, hardly ever more than a few have to be tried
            for candidate in (token, *logits.topk(min(n, logits.numel())).indices.tolist()):
                done = candidate in stop
                if quoting.allows(said if done else [*said, candidate], done):
                    return candidate
        return token


def check_sampling(max_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError where a sampling setting makes no sense."""
    if max_tokens < 1:
        raise UserError(f"max_tokens {max_tokens}: at least 1 is needed")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature}: give 0 (greedy) or more")
    if top_k < 0:
        raise UserError(f"top_k {top_k}: give 0 (no limit) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: give a number above 0 and up to 1")
