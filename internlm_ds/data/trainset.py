"""The training data that a configuration names, on paper: which files, packed how, sampled how. No tensors.

`loader` adds torch to it. Which files there are is `catalog`'s, what a pack is `packing`'s, which packs make a batch
`sampler`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm_ds.config.schema import DataConfig
from internlm_ds.data import catalog
from internlm_ds.data.catalog import BinFile, Catalog
from internlm_ds.data.mixture import Mixture
from internlm_ds.data.packing import Concatenation, PaddedBatcher, packer_for
from internlm_ds.data.sampler import StaticBatchSampler
from internlm_ds.data.synthetic import DATASET_TYPES, TRAIN_SAMPLES, SyntheticSamples
from internlm_ds.data.weighted import WeightedSampler, sources_of

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


def open_train_set(
    data: DataConfig,
    *,
    vocab_size: int,
    log: bool = True,
    files: Catalog | None = None,
    make_side_files: bool = False,
) -> TrainSet:
    """Open and pack what `data.train_folder` holds, or the synthetic samples that stand in for it.

    Args:
        vocab_size: Ids of files must be below it.
        log: Say what was dropped from which file.
        files: Take these, whatever lies in the folder.
        make_side_files: `internlm_ds.side_file`, see `side_file`.
    Raises:
        DataFormatError: Files are missing, damaged or do not fit the vocabulary.
    """
    packer = packer_for(pack_sample_into_one=data.pack_sample_into_one, use_packed_dataset=data.use_packed_dataset)
    sizes = {"packed_length": data.micro_bsz * data.seq_len, "seq_len": data.seq_len}
    rows = data.micro_bsz if packer is PaddedBatcher else None
    if not data.train_folder:
        fixed = data.fixed_random_dataset_seqlen
        samples = SyntheticSamples(TRAIN_SAMPLES, max_len=data.seq_len, fixed_seqlen=fixed, vocab_size=vocab_size)
        return TrainSet(Concatenation([packer(samples, **sizes)]), (), DATASET_TYPES, rows, data.seq_len)
    if files is None:
        files = catalog.scan(data.train_folder, min_length=data.min_length, min_length_dict=data.min_length_dict)
    parts, opened = [], []
    for file, kept in catalog.open_files(files, vocab_size=vocab_size, log=log, make_side_files=make_side_files):
        opened.append(file)
        parts.append(packer(kept, **sizes))
        if log:
            _report_packs(parts[-1], file.name)
    return TrainSet(Concatenation(parts), tuple(opened), files.dataset_types, rows, data.seq_len)


def open_sampler(
    data: DataConfig,
    packs: Concatenation,
    files: Sequence[BinFile],
    *,
    weights: Mapping[str, float] | None = None,
    data_rank: int,
    data_size: int,
    seed: int | None = None,
) -> StaticBatchSampler:
    """The sampler of one data-parallel rank.

    Args:
        packs, files: The training set, and the file of each of its parts.
        weights: `internlm_ds.data_weights`; None: every pack once an epoch, in InternLM's order.
        seed: Replaces `data.seed`.
    Raises:
        ConfigError: The weights do not fit the files.
        DataFormatError: There are too few packs.
    """
    seed = data.seed if seed is None else seed
    place: dict[str, Any] = {"data_rank": data_rank, "data_size": data_size, "seed": seed}
    settings = {"batch_size": data.micro_num, "rampup": data.rampup_batch_size, **place}
    if weights is None:
        return StaticBatchSampler(len(packs), **settings)
    sources = sources_of(weights, [file.name for file in files], [len(part) for part in packs.parts])
    return WeightedSampler(Mixture(sources, seed=seed), len(packs), **settings)


def _report_packs(part: Any, name: str) -> None:
    if not len(part):
        logger.warning("%s is left out: it does not fill one micro-batch of %d tokens", name, part.packed_length)
    elif isinstance(part, PaddedBatcher) and part.num_empty_packs:
        logger.warning("%s: %d of %d unpacked micro-batches hold no sample", name, part.num_empty_packs, len(part))
