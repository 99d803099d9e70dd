"""Validation sets: which there are, which samples a rank sees of each, and in what batches.

Samples stand one to a row, not packed. A set that cannot fill one micro-batch on every rank is skipped, on all ranks
alike: the decision depends on its size only. Rows become tensors in `loader`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.bintext import OpenFiles
from internlm_ds.data.catalog import open_kept, report_dropped, walk_bins
from internlm_ds.data.collate import MicroBatchArrays, fixed_borders, jsonl_collate
from internlm_ds.data.sampler import DataParallelSampler
from internlm_ds.data.samples import Samples
from internlm_ds.data.synthetic import VALID_SAMPLES_PER_RANK, SyntheticSamples
from internlm_ds.errors import DataFormatError

logger = logging.getLogger(__name__)

VALIDATION_MIN_LENGTH = 50


class ValidationSet:
    """Samples of one or several files, in file order."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> IntArray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part].read(index - (int(self._ends[part - 1]) if part else 0))


@dataclass(frozen=True)
class ValidationBatches:
    """Batches of one set on one rank.

    Attributes:
        name: The set's name in log lines.
        samples: The whole set, the same on all ranks.
        batch_size: Rows per batch and rank, a multiple of `micro_bsz`.
        micro_bsz: Rows per micro-batch.
        seq_len: Tokens per row; longer samples are cut.
        data_rank, data_size: Place on the data axis and its size.
    """

    name: str
    samples: ValidationSet
    batch_size: int
    micro_bsz: int
    seq_len: int
    data_rank: int = 0
    data_size: int = 1

    def __len__(self) -> int:
        return len(self._own) // self.batch_size

    def __iter__(self) -> Iterator[list[MicroBatchArrays]]:
        own = self._own
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            micro_starts = range(start, start + self.batch_size, self.micro_bsz)
            yield [
                rows_as_micro_batch(
                    [self.samples[own[i]] for i in range(at, at + self.micro_bsz)], seq_len=self.seq_len
                )
                for at in micro_starts
            ]

    @property
    def _own(self) -> DataParallelSampler:
        return DataParallelSampler(
            len(self.samples), data_rank=self.data_rank, data_size=self.data_size, drop_last=True
        )


def rows_as_micro_batch(samples: Sequence[IntArray], *, seq_len: int) -> MicroBatchArrays:
    """Samples, one to a row of `seq_len`, rows behind one another; all of type 0."""
    tokens, labels = jsonl_collate(samples, max_length=seq_len)
    borders = fixed_borders(len(samples), seq_len)
    return MicroBatchArrays(tokens.ravel(), borders, labels.ravel(), np.zeros(tokens.size, dtype=np.int64))


def batch_size_for(num_samples: int, *, micro_bsz: int, valid_micro_num: int, data_size: int) -> int:
    """Rows per evaluation batch and rank; 0 means the set is too small.

    Source: InternEvo `get_validation_data_loader`.

    >>> batch_size_for(11, micro_bsz=2, valid_micro_num=3, data_size=1)
    6
    """
    return min(valid_micro_num * micro_bsz, num_samples // data_size) // micro_bsz * micro_bsz


def find_sets(folder: str, *, vocab_size: int | None, log: bool = True) -> dict[str, ValidationSet]:
    """Every folder that holds bin files is a set named after it; of equal names the later one counts.

    Samples of fewer than 50 tokens are left out, as InternLM does whatever `min_length` says.

    Raises:
        DataFormatError: The folder does not exist or holds no bin; a file is damaged.
    """
    sets: dict[str, ValidationSet] = {}
    opened = OpenFiles()
    for root, names in walk_bins(folder, key="data.valid_folder"):
        parts = []
        for path in (os.path.join(root, name) for name in names):
            kept = open_kept(path, min_length=VALIDATION_MIN_LENGTH, vocab_size=vocab_size, files=opened)
            if log:
                report_dropped(kept, name=os.path.relpath(path, folder), min_length=VALIDATION_MIN_LENGTH)
            parts.append(kept)
        if parts:
            sets[os.path.basename(os.path.abspath(root))] = ValidationSet(parts)
    if not sets:
        raise DataFormatError("no .bin file below data.valid_folder; None validates on synthetic data", path=folder)
    return sets


def synthetic_sets(
    *, seq_len: int, data_size: int, fixed_seqlen: bool, vocab_size: int | None
) -> dict[str, ValidationSet]:
    """The set "val" of InternLM's dummy data."""
    samples = SyntheticSamples(
        VALID_SAMPLES_PER_RANK * data_size, max_len=seq_len, fixed_seqlen=fixed_seqlen, vocab_size=vocab_size
    )
    return {"val": ValidationSet([samples])}


def batches_of(
    sets: dict[str, ValidationSet],
    *,
    micro_bsz: int,
    valid_micro_num: int,
    seq_len: int,
    data_rank: int,
    data_size: int,
) -> dict[str, ValidationBatches]:
    """Batches of the sets that are large enough; the others are named in the log and left out."""
    chosen = {}
    for name, samples in sets.items():
        size = batch_size_for(len(samples), micro_bsz=micro_bsz, valid_micro_num=valid_micro_num, data_size=data_size)
        if size:
            chosen[name] = ValidationBatches(name, samples, size, micro_bsz, seq_len, data_rank, data_size)
        elif data_rank == 0:
            need = f"{len(samples)} samples of at least {VALIDATION_MIN_LENGTH} tokens, {micro_bsz * data_size} needed"
            logger.info("skip validate %s. (%s)", name, need)
    return chosen
