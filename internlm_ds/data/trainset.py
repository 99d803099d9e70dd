"""The training data that a configuration names, on paper: which files, packed how, sampled how. No tensors.

`loader` adds torch to it. Which files there are is `catalog`'s, what a pack is `packing`'s, which packs make a batch
`sampler`'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from internlm_ds.config.schema import Config
from internlm_ds.data import catalog
from internlm_ds.data.catalog import BinFile
from internlm_ds.data.packing import Concatenation, PaddedBatcher, packer_for
from internlm_ds.data.sampler import StaticBatchSampler
from internlm_ds.data.synthetic import DATASET_TYPES, TRAIN_SAMPLES, SyntheticSamples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSet:
    """Packs of all training files.

    Attributes:
        packs: One part a file, in the order of numbers.
        files: The file of each part; empty for synthetic data, which is one part without a file.
        dataset_types: Names of the data types, in the order of their ids.
        rows: Rows in which a pack of unpacked data is laid out; None for packed data.
        seq_len: Tokens of a row.
    """

    packs: Concatenation
    files: tuple[BinFile, ...]
    dataset_types: tuple[str, ...]
    rows: int | None
    seq_len: int

    def __len__(self) -> int:
        return len(self.packs)


def open_train_set(config: Config, *, log: bool = True) -> TrainSet:
    """Open and pack what `data.train_folder` holds, or the synthetic samples that stand in for it.

    Args:
        log: Say what was dropped from which file.
    Raises:
        DataFormatError: Files are missing, damaged or do not fit the model's vocabulary.
    """
    data = config.data
    packer = packer_for(pack_sample_into_one=data.pack_sample_into_one, use_packed_dataset=data.use_packed_dataset)
    sizes = {"packed_length": data.micro_bsz * data.seq_len, "seq_len": data.seq_len}
    parts, files = [], []
    types: tuple[str, ...] = DATASET_TYPES
    if not data.train_folder:
        samples = SyntheticSamples(
            TRAIN_SAMPLES,
            max_len=data.seq_len,
            fixed_seqlen=data.fixed_random_dataset_seqlen,
            vocab_size=config.model.vocab_size,
        )
        parts.append(packer(samples, **sizes))
    else:
        found = catalog.scan(data.train_folder, min_length=data.min_length, min_length_dict=data.min_length_dict)
        types = found.dataset_types
        for file, kept in catalog.open_files(found, vocab_size=config.model.vocab_size, log=log):
            files.append(file)
            parts.append(packer(kept, **sizes))
            if log:
                _report_packs(parts[-1], file.name)
    rows = data.micro_bsz if packer is PaddedBatcher else None
    return TrainSet(Concatenation(parts), tuple(files), types, rows, data.seq_len)


def build_sampler(
    config: Config, num_packs: int, *, data_rank: int, data_size: int, seed: int | None = None
) -> StaticBatchSampler:
    """This rank's sampler as a configuration asks for it; `seed` replaces `data.seed`."""
    return StaticBatchSampler(
        num_packs,
        batch_size=config.data.micro_num,
        rampup=config.data.rampup_batch_size,
        seed=config.data.seed if seed is None else seed,
        data_rank=data_rank,
        data_size=data_size,
    )


def _report_packs(part: Any, name: str) -> None:
    if not len(part):
        logger.warning("%s is left out: it does not fill one micro-batch of %d tokens", name, part.packed_length)
    elif isinstance(part, PaddedBatcher) and part.num_empty_packs:
        logger.warning("%s: %d of %d unpacked micro-batches hold no sample", name, part.num_empty_packs, len(part))
