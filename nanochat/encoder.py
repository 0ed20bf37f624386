"""Texts -> unit vectors for dense retrieval, and rerankers. Offline by default.

    encoder = get_encoder()  # the packaged MiniLM
    encoder.encode_queries(["What is machine learning?"])  # (1, 384), float32
    encoder.encode_passages(texts)  # (n, 384), float32; progress bar, cached, spread over torchrun's ranks
    get_reranker("late").score("What is machine learning?", texts)  # (n,), float32

`get_encoder` takes "" or "minilm"; "lm:SOURCE", our own model's hidden states (SOURCE as in load_model: a stage such as
rag, or a checkpoint folder); else a sentence-transformers name or folder. `get_reranker` takes "late" (MiniLM's token
vectors) or the name of a sentence-transformers CrossEncoder.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from nanochat import minilm
from nanochat.cache import Cache
from nanochat.common import UserError, cpu_has_fast_bf16, from_main, get_base_dir
from nanochat.documents import valid_unicode

WINDOW = 4096  # passages that are looked up, sorted and dealt to ranks at a time
BATCH_TOKENS = 4096  # of a batch, padding included
PAD = 16  # batches are as wide as a multiple of this: the width of matrix units
COMMIT_SECONDS = 2.0  # how much work a kill may cost


@dataclass
class Encoder:
    """A model that embeds texts. `prepare` makes what is sorted by length and batched: token ids, or the texts as they
    are; `embed` takes a batch of those and whether they are passages, and gives (n, dims) vectors of any length.
    """

    name: str  # get_encoder(name) gives this encoder again
    sha256: str  # of its weights
    dims: int
    prepare: Callable[[list[str]], list]
    embed: Callable[[list, bool], torch.Tensor | np.ndarray]

    @property
    def info(self) -> dict:
        """What identifies the vectors; stands in kb.json."""
        return {"name": self.name, "sha256": self.sha256, "dims": self.dims}

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Queries -> (n, dims) float32, unit length. Computed in fp32: who shares a batch changes no ranking."""
        items = self.prepare([valid_unicode(text) for text in texts])
        vectors = np.zeros((len(items), self.dims), dtype=np.float32)
        for batch in _batches(items):
            vectors[batch] = self._unit(batch, items, False)
        return vectors

    def encode_together(self, texts: Sequence[str]) -> np.ndarray:
        """A few texts as one batch -> (n, dims) float32, unit length; as fast as passages, and nothing is kept."""
        items = self.prepare([valid_unicode(text) for text in texts])
        return self._unit(list(range(len(items))), items, True)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Passages -> (n, dims) float32, unit length, in bf16 where the CPU is fast at it, with a progress bar.

        Equal texts are embedded once, and never again while they are in BASE/cache/embeddings.sqlite: a killed run
        goes on where it was. In a process group all ranks must call it with the same texts; each embeds a share, all
        get everything, to the bit what one process gets.
        """
        from tqdm import tqdm

        cache = Cache(get_base_dir() / "cache" / "embeddings.sqlite")
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        texts, places = [valid_unicode(text) for text in texts], {}
        for place, text in enumerate(texts):
            places.setdefault(self._key(text), []).append(place)
        keys, vectors = list(places), np.zeros((len(texts), self.dims), dtype=np.float32)
        with tqdm(total=len(keys), desc="embedding", unit=" passages", mininterval=1, disable=rank > 0) as bar:
            for start in range(0, len(keys), WINDOW):
                window = keys[start : start + WINDOW]
                found = np.zeros((len(window), self.dims), dtype=np.float32)
                known = _known(cache.get_many(window) if rank == 0 else {}, window, found)
                missing = from_main(sorted(set(range(len(window))) - known))  # ranks look at different times
                bar.update(len(window) - len(missing))
                items = self.prepare([texts[places[window[i]][0]] for i in missing])
                new, committed = {}, time.monotonic()
                for n, batch in enumerate(_batches(items)):
                    if n % world == rank:
                        at = [missing[i] for i in batch]
                        found[at] = self._unit(batch, items, True)
                        new |= {window[i]: found[i].tobytes() for i in at}
                    if new and time.monotonic() - committed > COMMIT_SECONDS:
                        cache.put_many(new)
                        new, committed = {}, time.monotonic()
                    bar.update(len(batch))
                cache.put_many(new)
                if world > 1:  # every row is zero on all ranks but one: as integers their sum is that row to the bit
                    dist.all_reduce(torch.from_numpy(found).view(torch.int32))
                for key, vector in zip(window, found, strict=True):
                    vectors[places[key]] = vector
        cache.close()
        return vectors

    def _key(self, text: str) -> str:
        precision = "bf16" if cpu_has_fast_bf16() else "fp32"
        return hashlib.sha256(f"{self.sha256} {precision} {text}".encode()).hexdigest()

    def _unit(self, batch: list[int], items: list, passages: bool) -> np.ndarray:
        vectors = np.asarray(self.embed([items[i] for i in batch], passages), dtype=np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _known(stored: dict[str, bytes], window: list[str], found: np.ndarray) -> set[int]:
    """Copy sound stored vectors into `found` (n, dims); the rows that have one."""
    known = set()
    for row, key in enumerate(window):
        if len(value := stored.get(key, b"")) == found[row].nbytes:
            vector = np.frombuffer(value, dtype=np.float32)
            if abs(float(vector @ vector) - 1) < 1e-3:  # neither NaN nor a flipped bit that matters
                found[row] = vector
                known.add(row)
    return known


def _batches(items: list) -> Iterator[list[int]]:
    """Positions in batches of like length, the longest first, of at most BATCH_TOKENS with padding.

    A batch's size follows from its first item alone, so that a run that goes on after a kill makes the same batches.
    """
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    start = 0
    while start < len(order):
        size = max(1, BATCH_TOKENS // max(1, len(items[order[start]])))
        yield order[start : start + size]
        start += size


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids -> ids (B, T) and mask (B, T), both int64, filled up with zeros on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(-(-int(lengths.max()) // PAD) * PAD) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([i for row in rows for i in row])
    return ids, mask


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """hidden (B, T, C), mask (B, T) -> the mean over the mask, (B, C), fp32."""
    return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@lru_cache(maxsize=4)
def get_encoder(name: str = "") -> Encoder:
    """The process's encoder of that name: loading takes seconds, so knowledge bases share it."""
    if name in ("", "minilm", minilm.NAME):
        return _minilm()
    return _language_model(name[3:]) if name.startswith("lm:") else _sentence_transformer(name)


# ----------------------------------------------------------------------------------------------------------------------
# MiniLM, our own model, and anything sentence-transformers loads


def _minilm() -> Encoder:
    minilm.load()

    def embed(rows: list[list[int]], passages: bool) -> torch.Tensor:
        ids, mask = _padded(rows)
        return _mean(minilm.hidden(ids, mask, not passages), mask)

    return Encoder(minilm.NAME, minilm.SHA256, minilm.DIMS, minilm.tokens, embed)


def _language_model(source: str) -> Encoder:
    """The mean of our model's last hidden states over a text."""
    from nanochat.checkpoint_manager import find_checkpoint, load_model

    path = find_checkpoint(source).resolve()
    exact, tokenizer, meta = load_model(str(path), dtype="float32")
    fast = copy.deepcopy(exact).set_compute_dtype(torch.bfloat16) if cpu_has_fast_bf16() else exact

    def prepare(texts: list[str]) -> list[list[int]]:
        rows = tokenizer.encode_batch([f" {text}" for text in texts], num_threads=1)
        return [[tokenizer.bos, *row[: exact.config.sequence_len - 1]] for row in rows]

    def embed(rows: list[list[int]], passages: bool) -> torch.Tensor:
        ids, mask = _padded(rows)  # the model is causal: padding on the right changes nothing
        with torch.inference_mode():
            hidden = (fast if passages else exact).forward_embed_only(ids)
        return _mean(hidden[:, 1:], mask[:, 1:])  # <|bos|> has seen nothing

    return Encoder(f"lm:{path}", meta["model_file"]["sha256"], exact.config.n_embd, prepare, embed)


def _load(kind: str, name: str):
    """sentence_transformers.`kind` of that name, from a folder or what was downloaded before: no network."""
    try:
        import sentence_transformers

        return getattr(sentence_transformers, kind)(name, device="cpu", local_files_only=True)
    except ImportError as e:
        raise UserError(f"'{name}' needs the package {e.name}: pip install -e . in the repo's folder") from e
    except Exception as e:  # whatever the hub, a missing file or a foreign format raises
        raise UserError(
            f"'{name}' is no {kind} that is on this machine ({type(e).__name__}); give its folder, or fetch it before "
            f"with: hf download {name}"
        ) from e


def _sentence_transformer(name: str) -> Encoder:
    """Any model of sentence-transformers, in fp32, with the prompts it brings for queries and documents."""
    model = _load("SentenceTransformer", name)
    digest = hashlib.sha256(repr((sorted(model.prompts.items()), model.max_seq_length)).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def embed(texts: list[str], passages: bool) -> np.ndarray:
        encode = model.encode_document if passages else model.encode_query
        return encode(texts, batch_size=len(texts), show_progress_bar=False)

    return Encoder(name, digest.hexdigest(), embed(["a"], True).shape[1], list, embed)


# ----------------------------------------------------------------------------------------------------------------------
# Rerankers


@dataclass
class Reranker:
    """`score(query, texts)` -> (n,) float32, higher is better; scores of different queries don't compare."""

    name: str
    score: Callable[[str, Sequence[str]], np.ndarray]


@lru_cache(maxsize=4)
def get_reranker(name: str = "late") -> Reranker:
    """The process's reranker of that name."""
    if name == "late":
        return Reranker(name, late_interaction)
    model = _load("CrossEncoder", name)

    def score(query: str, texts: Sequence[str]) -> np.ndarray:
        pairs = [(valid_unicode(query), valid_unicode(text)) for text in texts]
        scores = model.predict(pairs, show_progress_bar=False) if pairs else np.zeros(0)
        if np.ndim(scores) != 1:
            raise UserError(
                f"the CrossEncoder '{name}' gives {np.shape(scores)[1]} numbers a text; a reranker gives one"
            )
        return np.asarray(scores, dtype=np.float32)

    return Reranker(name, score)


def late_interaction(query: str, texts: Sequence[str]) -> np.ndarray:
    """For each text the mean, over the query's tokens, of the highest cosine with one of the text's tokens: (n,).

    ColBERT's MaxSim (2004.12832) with MiniLM's token vectors, which weren't trained for it.
    """
    asked = _token_vectors(valid_unicode(query), False).astype(np.float32)
    found = [(asked @ _token_vectors(valid_unicode(text), True).astype(np.float32).T).max(1).mean() for text in texts]
    return np.array(found, dtype=np.float32)


@lru_cache(maxsize=4096)
def _token_vectors(text: str, passage: bool) -> np.ndarray:
    """Text -> unit vectors of its tokens, (T, 384) float16: a fiftieth of a second the first time, 80 kB kept.

    One text at a time: in bf16 a batch would change the last bits, and with them a score would depend on what else
    was asked before.
    """
    ids, mask = _padded(minilm.tokens([text]))
    hidden = minilm.hidden(ids, mask, not passage)[mask.bool()].float()
    return torch.nn.functional.normalize(hidden, dim=-1).half().numpy()
