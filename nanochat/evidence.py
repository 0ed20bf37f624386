"""Where do the documents say it? MiniLM, trained on to point at the words that answer a question, or to find none.

    reader = load_evidence("cpu")  # the tag: trained by scripts.evidence_train
    [found] = reader.find([("Where do newts live?", [{"title": "Newts", "content": "Newts live in ponds."}])])
    found.text, found.document, found.odds  # "ponds", 0, 9.3: above 0, the words are rather there than not

A language model that was trained for minutes reads prose of the kinds it was trained on, and hardly any other: it has
not met enough words. MiniLM, which comes with the dense retriever, has. So it reads the question and a passage as one
text, as in BERT (1810.04805, sections 4.2 and 4.3): a linear layer gives every word piece a score for being the
answer's first and its last, and [CLS] that of there being none. nanochat/reader.py weighs what it finds against the
language model's own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import minilm
from nanochat.checkpoint_manager import find_checkpoint, load_checkpoint, load_weights
from nanochat.common import UserError, pick_dtype, print0
from nanochat.documents import valid_unicode
from nanochat.passages import sentence_spans
from nanochat.rag_utils import strip_citations

MAX_PIECES = 512  # word pieces of question and text: MiniLM's positions end there
MAX_QUESTION = 96  # of them for the question
OVERLAP = 96  # word pieces that two windows of a longer text share
MAX_WINDOWS = 64  # of a text
LONGEST = 40  # word pieces of an answer
BATCH = 4096  # word pieces that are read at a time
WORDS = "embeddings.word_embeddings.weight"


@dataclass
class EvidenceConfig:
    """What a checkpoint needs to be read again."""

    encoder: str = minilm.NAME
    sha256: str = minilm.SHA256


@dataclass
class Evidence:
    """Words of a document that answer a question best."""

    text: str
    document: int  # its place among those that were read
    sentence: str  # in which they stand
    logprob: float  # of these words, given that there are any
    odds: float  # log-odds of these words to there being none


class Pointer(nn.Module):
    """ids and kinds (B, T) -> logits (B, T, 2) of being first and last, fp32; -inf where no answer can be.

    Kinds are 0 for the question and 1 for the text; id 0 is padding. MiniLM's word vectors stay as they are.
    """

    compute_dtype = torch.float32  # of training, where weights stay fp32

    def __init__(self, config: EvidenceConfig):
        super().__init__()
        if (config.encoder, config.sha256) != (minilm.NAME, minilm.SHA256):
            raise UserError(f"this evidence reader was made from another encoder, {config.encoder}; train it again")
        self.config = config
        weights = minilm.load()[1]
        self.register_buffer("words", weights[WORDS], persistent=False)
        names = [name for name in weights if name.startswith(("embeddings.", "encoder."))]
        kept = {name: weights[name].clone() for name in names if weights[name].is_floating_point() and name != WORDS}
        self.encoder = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(w) for name, w in kept.items()})
        self.head = nn.Linear(minilm.DIMS, 2)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        w = {name.replace("/", "."): p for name, p in self.encoder.items()} | {WORDS: self.words}
        logits = self.head(minilm.forward(w, ids, ids != 0, kinds)).float()
        able = (kinds == 1) & (ids != minilm.SEP)
        able[:, 0] = True
        return logits.masked_fill(~able[..., None], -torch.inf)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        self.compute_dtype = dtype

    def param_groups(self, matrix_lr: float, pointer_lr: float, weight_decay: float) -> list[dict]:
        """The layers' matrices for Muon, all the rest for AdamW; only the former are decayed."""
        matrices = [p for name, p in self.encoder.items() if p.ndim == 2 and name.startswith("encoder")]
        taken = set(map(id, matrices))
        rest = [p for p in self.parameters() if id(p) not in taken]
        adam = {"kind": "adamw", "lr": pointer_lr, "weight_decay": 0.0, "betas": (0.9, 0.98), "eps": 1e-8}
        return [
            {"name": "matrix", "kind": "muon", "params": matrices, "lr": matrix_lr, "weight_decay": weight_decay},
            {"name": "rest", "params": rest, **adam},
        ]


class EvidenceReader:
    """A trained Pointer that reads text. `told` (tag, step, sha256) says which checkpoint it is."""

    def __init__(self, net: Pointer, told: dict | None = None, dtype: str = "auto"):
        self.net, self.told = net.eval().requires_grad_(False), told
        net.to(pick_dtype(net.words.device.type, dtype))

    @torch.inference_mode()
    def find(self, asked: Sequence[tuple[str, Sequence[dict]]]) -> list[Evidence | None]:
        """For each question and its documents (of which title and content are read, all as one text) the best words.

        None where nothing can answer. A text of more than `MAX_PIECES` is read in windows, the first `MAX_WINDOWS`.
        """
        shown = [shown_text(docs) for _, docs in asked]
        pairs = [read_pair(question, text) for (question, _), (text, _) in zip(asked, shown)]
        windows = [(n, window) for n, pair in enumerate(pairs) for window in pair]
        windows.sort(key=lambda one: -len(one[1].ids))
        best: list[Evidence | None] = [None] * len(asked)
        device = self.net.words.device
        while windows:
            size = max(1, BATCH // len(windows[0][1].ids))
            batch, windows = windows[:size], windows[size:]
            ids, kinds = (x.to(device) for x in stack([window for _, window in batch]))
            for (n, window), logits in zip(batch, self.net(ids, kinds).float().cpu().numpy()):
                found = _best(window, logits, *shown[n])
                if found and (best[n] is None or found.odds > best[n].odds):
                    best[n] = found
        return best


@dataclass
class Window:
    """A question and a piece of text: word pieces, kinds (0 question, 1 text), and where each stands in the text."""

    ids: list[int]
    kinds: list[int]
    places: list[tuple[int, int]]


def shown_text(docs: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
    """What is read of documents, and where each stands in it."""
    text, places = "", []
    for doc in docs:
        start = len(text)
        text += valid_unicode(f"{doc.get('title') or ''}. {' '.join(doc['content'].split())}")
        places.append((start, len(text)))
        text += "\n"
    return text, places


def read_pair(question: str, text: str) -> list[Window]:
    """A question and a text (`shown_text`) as windows that MiniLM can read."""
    question = valid_unicode(question)
    asked = minilm.load()[0].encode(question, add_special_tokens=False)
    if len(asked.ids) > MAX_QUESTION:
        question = question[: asked.offsets[MAX_QUESTION][0]]
    found = _tokenizer().encode(question, text)
    return [Window(e.ids, e.type_ids, e.offsets) for e in [found, *found.overflowing][:MAX_WINDOWS] if 1 in e.type_ids]


def stack(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Windows -> ids and kinds (B, T), int64, filled up with zeros to a multiple of 16."""
    width = -(-max(len(window.ids) for window in windows) // 16) * 16
    pad = lambda row: row + [0] * (width - len(row))
    return torch.tensor([pad(w.ids) for w in windows]), torch.tensor([pad(w.kinds) for w in windows])


def pointer_loss(net: Pointer, ids: Tensor, targets: Tensor, kinds: Tensor) -> Tensor:
    """Mean cross-entropy of first and last piece; targets (B, 2) are their places, 0 where there is no answer.

    In bf16 where that is the compute dtype; weights stay fp32.
    """
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=net.compute_dtype == torch.bfloat16):
        logits = net(ids, kinds)
    return (F.cross_entropy(logits[..., 0], targets[:, 0]) + F.cross_entropy(logits[..., 1], targets[:, 1])) / 2


def load_evidence(
    tag: str = "", step: int = 0, device: str | torch.device = "cpu", dtype: str = "auto"
) -> EvidenceReader:
    """The evidence reader with this tag (the newest if not given). Raises UserError if there is none."""
    path = find_checkpoint("evidence", tag or None, step or None)
    print0(f"loading {path}")
    weights, meta = load_checkpoint(path)
    try:
        net = Pointer(EvidenceConfig(**meta["model_config"]))
    except TypeError as e:
        raise UserError(f"{path} is no evidence reader's checkpoint: {e}") from e
    load_weights(net, weights, path)
    told = {"tag": meta["tag"], "step": meta["step"], "sha256": meta["model_file"]["sha256"]}
    return EvidenceReader(net.to(device), told, dtype)


def evidence_of(told: dict, device: str | torch.device = "cpu", dtype: str = "auto") -> EvidenceReader | None:
    """The evidence reader that a model was calibrated with; `told` is meta.json's "evidence". None, and a line that
    says so, if it isn't there any more.
    """
    try:
        reader = load_evidence(told["tag"], told["step"], device, dtype)
        if reader.told["sha256"] != told["sha256"]:
            raise UserError("it has been trained anew")
        return reader
    except (KeyError, TypeError, UserError) as e:
        print0(f"without the evidence reader it was calibrated with ({e}): run scripts.rag_eval --calibrate again")
        return None


@lru_cache(maxsize=1)
def _tokenizer():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(minilm.load()[0].to_str())  # its own settings
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_PIECES, stride=OVERLAP, strategy="only_second")
    return tokenizer


def _best(window: Window, logits: np.ndarray, text: str, documents: list[tuple[int, int]]) -> Evidence | None:
    """The likeliest words of one document in a window of `text`, whose `logits` are (T, 2)."""
    logits = logits[: len(window.ids)]
    if not np.isfinite(logits[1:]).any():
        return None
    first, last = logits.T - np.logaddexp.reduce(logits[1:], axis=0)[:, None]  # given that it isn't [CLS]
    n = len(first)
    scores = first[:, None] + last
    scores[~np.triu(np.ones((n, n), bool)) | np.triu(np.ones((n, n), bool), LONGEST)] = -np.inf
    scores[0] = -np.inf
    starts = [start for start, _ in window.places]
    document = np.searchsorted([end for _, end in documents], starts, side="right")
    spans = list(sentence_spans(text))
    sentence = np.searchsorted([end for _, end in spans[:-1]], starts, side="right")
    part = document + sentence  # neither ever falls: the sum is the same where both are
    scores[part[:, None] != part] = -np.inf  # an answer stands in one sentence of one document
    a, b = divmod(int(scores.argmax()), n)
    if not np.isfinite(scores[a, b]):
        return None
    words = text[window.places[a][0] : window.places[b][1]].strip(" .,;:")
    odds = logits[a, 0] + logits[b, 1] - logits[0].sum()
    if not any(map(str.isalnum, strip_citations(words + "]"))):  # "[7]" is no answer, nor is "[7"
        return None
    (start, end), (first_char, last_char) = documents[document[a]], spans[sentence[a]]
    said = text[max(start, first_char) : min(end, last_char)].strip()
    return Evidence(words, int(document[a]), said, float(scores[a, b]), float(odds))
