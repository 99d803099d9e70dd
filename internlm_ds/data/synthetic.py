"""Data for runs without any: InternLM's dummy samples, made when they are read.

`n, r, 0, 1, …, n-1, 0, 1, …` with r repetitions; a million of them costs two arrays of small integers and their sums.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.samples import joined, lengths_of

SYNTHETIC_SEED = 1999
TRAIN_SAMPLES = 1_000_000
VALID_SAMPLES_PER_RANK = 500
DATASET_TYPES = ("en", "cn", "code")


class SyntheticSamples:
    """Dummy samples, all of type 0.

    Args:
        num_samples: How many.
        max_len: Each is cut to so many tokens.
        fixed_seqlen: Double the repetitions until a sample fills `max_len` (`fixed_random_dataset_seqlen`).
        vocab_size: Ids are taken modulo it, so that any model can train on them; InternLM's own start at ids below 200.

    Source: InternEvo `RandomDataset`.
    """

    type_id = 0

    def __init__(self, num_samples: int, *, max_len: int, fixed_seqlen: bool = False, vocab_size: int | None = None):
        rng = np.random.RandomState(SYNTHETIC_SEED)
        top = rng.randint(1, 30, size=num_samples)
        repeats = rng.randint(10, 200, size=num_samples)
        while fixed_seqlen and (short := top * repeats < max_len).any():
            repeats[short] *= 2
        ends = np.cumsum(np.minimum(top * repeats + 2, max_len), dtype=np.int64)
        self._set(top.astype(np.int32), repeats.astype(np.int32), ends, max_len, vocab_size)

    def _set(
        self,
        top: npt.NDArray[np.int32],
        repeats: npt.NDArray[np.int32],
        ends: IntArray,
        max_len: int,
        vocab_size: int | None,
    ) -> None:
        self.top, self.repeats, self.ends = top, repeats, ends
        self.max_len, self.vocab_size = max_len, vocab_size

    def __len__(self) -> int:
        return len(self.top)

    def take(self, order: IntArray) -> SyntheticSamples:
        taken = object.__new__(SyntheticSamples)
        ends = np.cumsum(lengths_of(self.ends)[order], dtype=np.int64)
        taken._set(self.top[order], self.repeats[order], ends, self.max_len, self.vocab_size)
        return taken

    def read(self, index: int) -> IntArray:
        top, repeats = int(self.top[index]), int(self.repeats[index])
        length = min(top * repeats + 2, self.max_len)
        tokens = np.arange(-2, length - 2, dtype=np.int64) % top
        tokens[:2] = (top, repeats)[:length]
        return tokens if self.vocab_size is None else tokens % self.vocab_size

    def read_span(self, first: int, stop: int) -> IntArray:
        return joined(self, first, stop)
