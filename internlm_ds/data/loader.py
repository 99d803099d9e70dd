"""Batches of tensors: what the training loop, DeepSpeed's engine and people with loops of their own are fed with.

`PackedDataset` is a map-style torch data set of micro-batches. `TrainLoader` deals it out step by step in InternLM's
order, knows its true position and reads ahead in a thread; `FlatSampler` gives the same order to any other loader,
DeepSpeed's own among them. What a micro-batch holds is decided in `packing` and `collate`, which batch holds it in
`sampler`; this file adds torch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from internlm_ds.config.schema import Config
from internlm_ds.data import kernels, validation
from internlm_ds.data.catalog import BinFile
from internlm_ds.data.collate import BatchStats, MicroBatchArrays
from internlm_ds.data.micro_batches import Counts, micro_batch, stats_of, worth_compiling
from internlm_ds.data.packing import Concatenation
from internlm_ds.data.readahead import ReadAhead
from internlm_ds.data.sampler import BatchSkipper, StaticBatchSampler
from internlm_ds.data.trainset import open_sampler, open_train_set
from internlm_ds.data.weighted import WeightedSampler, facts_of
from internlm_ds.layout.batch import BatchPlan

logger = logging.getLogger(__name__)

MOST_WORKERS = 16

# ((tokens, cu_seqlens), (labels, type_ids)); T tokens, shapes (T,), (T + 1,), (T,), (T,), see collate.MicroBatchArrays
MicroBatch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Item = TypeVar("Item")
# index of a batch, its packs, whether it is skipped, the sampler's position behind it
_Draw = tuple[int, list[int], bool, dict[str, Any]]


@dataclass(frozen=True)
class StepBatch:
    """The data of one step on this rank.

    Attributes:
        index: Batch index over all epochs, from 0.
        micro_batches: One entry per micro-batch; empty if `skipped`.
        stats: What the log says of it; zeros if `skipped`.
        skipped: The batch is named in `skip_batches`: it counts as seen but is not trained on, nor read.
        num_packs: Micro-batches that the batch stands for, skipped or not.
    """

    index: int
    micro_batches: list[MicroBatch]
    stats: BatchStats
    skipped: bool
    num_packs: int


class PackedDataset(Dataset[MicroBatch]):
    """Micro-batches by number; one item is one packed micro-batch.

    Args:
        packs: The packs of all files, one file after the other.
        dataset_types: Names of the data types, in the order of their ids.
        rows: Lay each pack out in so many rows (unpacked data), or None.
        seq_len: Tokens of a row.
        files: The file of each part of `packs`; empty for data without files.
    """

    def __init__(
        self,
        packs: Concatenation,
        *,
        dataset_types: Sequence[str],
        seq_len: int,
        rows: int | None = None,
        files: Sequence[BinFile] = (),
    ):
        self.packs, self.dataset_types, self.files = packs, tuple(dataset_types), tuple(files)
        self.rows, self.seq_len = rows, seq_len
        self._is_large = worth_compiling(packs)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> MicroBatch:
        return as_tensors(self._arrays(index)[0])

    def step(self, numbers: Sequence[int], *, index: int) -> StepBatch:
        """The batch made of the packs named."""
        made = [self._arrays(number) for number in numbers]
        if self._is_large:
            kernels.load_in_background()  # behind the first batch, which shall not wait for it
        batch = [as_tensors(arrays) for arrays, _ in made]
        return StepBatch(index, batch, stats_of([counts for _, counts in made]), False, len(made))

    def _arrays(self, index: int) -> tuple[MicroBatchArrays, Counts]:
        return micro_batch(self.packs, index, rows=self.rows, seq_len=self.seq_len)


class TrainLoader:
    """Steps without end, in InternLM's order, whatever reads ahead.

    Args:
        dataset: The same on all ranks.
        sampler: This rank's.
        skip_batches: `data.skip_batches`.
        read_ahead: Steps to keep ready; 0 reads when asked.
        workers: Threads that read ahead.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        sampler: StaticBatchSampler,
        skip_batches: str = "",
        read_ahead: int = 2,
        workers: int = 1,
    ):
        self.dataset, self.sampler = dataset, sampler
        self.skipper = BatchSkipper(skip_batches)
        self.read_ahead, self.workers = read_ahead, workers
        self._position = sampler.state_dict()
        self._steps: ReadAhead[tuple[StepBatch, dict[str, Any]]] | None = None

    @property
    def dataset_types(self) -> tuple[str, ...]:
        """Names of the data types, in the order of their ids."""
        return self.dataset.dataset_types

    def next_step(self) -> StepBatch:
        """The next batch, in this epoch or the next.

        Raises:
            DataFormatError: A file is damaged or has changed, or an id does not fit the vocabulary.
        """
        if self._steps is None:
            drawn = _drawn(self.sampler, self.skipper)
            # not a method: whoever reads ahead must not keep this loader, or dropping it would end nothing
            make = partial(_made, self.dataset)
            self._steps = ReadAhead(drawn, make=make, depth=self.read_ahead, workers=self.workers)
        try:
            batch, self._position = self._steps.next()
        except BaseException:
            self.load_state_dict(self._position)  # asked again, the same batch is tried again
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the last `next_step` left off: plain data, see `StaticBatchSampler.state_dict`."""
        return dict(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch after which `state` was taken.

        Raises:
            CheckpointError: The state does not fit this run.
        """
        self.close()
        self.sampler.load_state_dict(state)
        if state.get("num_packs", len(self.dataset)) != len(self.dataset):
            found, now = state["num_packs"], len(self.dataset)
            logger.warning(
                "the training data has changed: %d packs at the checkpoint, %d now; the order differs", found, now
            )
        before, after = state.get("data_world_size"), self.sampler.data_size
        if before not in (None, after):
            logger.info(
                "data-parallel ranks were %s, are %d: the rest of epoch %d is dealt out anew in the same order",
                *(before, after, self.sampler.epoch),
            )
        self._position = self.sampler.state_dict()

    def close(self) -> None:
        """Stop reading ahead; `next_step` starts it again."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None


class FlatSampler(Sampler[int]):
    """This rank's pack numbers one by one, in `TrainLoader`'s order: a sampler for other loaders.

    Each `iter` gives the rest of the current epoch; when it is used up the next `iter` gives the next epoch, as
    `deepspeed.utils.RepeatingLoader` asks for them. Loaders read ahead, so the position is the caller's to count:
    `seek` to the number of items trained on so far.

    Args:
        sampler: This rank's batches; copied, so it may go on elsewhere.
    """

    def __init__(self, sampler: StaticBatchSampler):
        self._sampler = copy.deepcopy(sampler)
        self._start = sampler.state_dict()

    def __len__(self) -> int:
        """Items in the rest of this epoch."""
        self._sampler.load_state_dict(self._start)
        return sum(len(batch) for batch in self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.load_state_dict(self._start)
        rest = list(self._sampler)  # behind the last batch the sampler stands at the next epoch
        following = self._sampler.state_dict()
        for batch in rest:
            yield from batch
        self._start = following

    def seek(self, items: int) -> None:
        """Stand behind so many items from the very beginning, over all epochs.

        Raises:
            ValueError: `items` is no whole number of steps.
        """
        sampler = self._sampler
        sampler.load_state_dict({**sampler.state_dict(), **_BEGINNING})
        while items > 0:
            items -= len(sampler.next_batch())
        if items:
            raise ValueError(f"a step ends {-items} items later; seek to the end of a step")
        self._start = sampler.state_dict()


class ValidationLoader:
    """Evaluation batches of one set: each a list of micro-batches of `micro_bsz` rows, padded to `seq_len`."""

    def __init__(self, batches: validation.ValidationBatches):
        self.batches = batches

    @property
    def name(self) -> str:
        return self.batches.name

    @property
    def batch_size(self) -> int:
        """Rows per batch and rank."""
        return self.batches.batch_size

    @property
    def num_samples(self) -> int:
        """Samples of the whole set, over all ranks."""
        return len(self.batches.samples)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for micro_batches in self.batches:
            yield [as_tensors(arrays) for arrays in micro_batches]


def build_dataset(config: Config, *, log: bool = True) -> PackedDataset:
    """The training data that a configuration names, the same on all ranks.

    Args:
        log: Say what was dropped from which file.
    Raises:
        DataFormatError: Files are missing, damaged or do not fit the model's vocabulary.
    """
    side = config.internlm_ds.side_file
    found = open_train_set(config.data, vocab_size=config.model.vocab_size, log=log, make_side_files=side)
    return PackedDataset(
        found.packs, dataset_types=found.dataset_types, seq_len=found.seq_len, rows=found.rows, files=found.files
    )


def build_sampler(
    config: Config, dataset: PackedDataset, *, data_rank: int, data_size: int, seed: int | None = None
) -> StaticBatchSampler:
    """This rank's sampler of a data set as a configuration asks for it; `seed` replaces `data.seed`.

    Raises:
        ConfigError: `internlm_ds.data_weights` do not fit the files.
        DataFormatError: There are too few packs.
    """
    place = {"data_rank": data_rank, "data_size": data_size, "seed": seed}
    weights = config.internlm_ds.data_weights
    return open_sampler(config.data, dataset.packs, dataset.files, weights=weights, **place)


def build_train_loader(config: Config, *, data_rank: int, data_size: int, seed: int | None = None) -> TrainLoader:
    """Training batches of one data-parallel rank. `data.num_worker` threads read ahead; 0 reads when asked.

    Raises:
        DataFormatError: Files are missing or damaged, do not fit the vocabulary, or are too few.
    """
    dataset = build_dataset(config, log=data_rank == 0)
    sampler = build_sampler(config, dataset, data_rank=data_rank, data_size=data_size, seed=seed)
    if data_rank == 0 and isinstance(sampler, WeightedSampler):
        batch = BatchPlan.from_config(config.data, data_size=data_size)
        for facts in facts_of(sampler.mixture, batch=batch, steps=config.data.total_steps):
            logger.info("mixture over %d steps: %s", config.data.total_steps, facts)
    return TrainLoader(
        dataset,
        sampler=sampler,
        skip_batches=config.data.skip_batches,
        read_ahead=2 if config.data.num_worker > 0 else 0,
        workers=max(1, min(config.data.num_worker, MOST_WORKERS)),
    )


def build_validation_loaders(config: Config, *, data_rank: int, data_size: int) -> dict[str, ValidationLoader]:
    """Validation sets by name; the same names on all ranks, those too small for all ranks left out.

    Raises:
        DataFormatError: Files are missing, damaged or do not fit the vocabulary.
    """
    data, vocab_size = config.data, config.model.vocab_size
    if data.valid_folder:
        sets = validation.find_sets(data.valid_folder, vocab_size=vocab_size, log=data_rank == 0)
    else:
        fixed = data.fixed_random_dataset_seqlen
        sets = validation.synthetic_sets(
            seq_len=data.seq_len, data_size=data_size, fixed_seqlen=fixed, vocab_size=vocab_size
        )
    batches = validation.batches_of(
        sets,
        micro_bsz=data.micro_bsz,
        valid_micro_num=data.valid_micro_num,
        seq_len=data.seq_len,
        data_rank=data_rank,
        data_size=data_size,
    )
    return {name: ValidationLoader(each) for name, each in batches.items()}


def as_tensors(arrays: MicroBatchArrays) -> MicroBatch:
    """The arrays as tensors that share their memory."""
    inputs = torch.from_numpy(arrays.tokens), torch.from_numpy(arrays.cu_seqlens)
    return inputs, (torch.from_numpy(arrays.labels), torch.from_numpy(arrays.type_ids))


def first_item(batch: Sequence[Item]) -> Item:
    """`collate_fn` for loaders with batch_size=1: the one item, without a new dimension."""
    (item,) = batch
    return item


_BEGINNING = {
    "epoch": 0,
    "num_consumed_samples_in_epoch": 0,
    "batch_count": 0,
    "epoch_start_batch_count": 0,
    "odd_packs": 0,
    "is_dealt_anew": False,
}


def _drawn(sampler: StaticBatchSampler, skipper: Callable[[int], bool]) -> Iterator[_Draw]:
    """Batches without end."""
    while True:
        index = sampler.batch_count
        numbers = sampler.next_batch()
        yield index, numbers, skipper(index), sampler.state_dict()


def _made(dataset: PackedDataset, drawn: _Draw) -> tuple[StepBatch, dict[str, Any]]:
    index, numbers, is_skipped, position = drawn
    if is_skipped:
        # not read: a damaged sample is a reason to skip its batch
        return StepBatch(index, [], BatchStats.of([]), True, len(numbers)), position
    return dataset.step(numbers, index=index), position
