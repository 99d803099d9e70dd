"""What was learned when: from the index of a batch back to files, lines and tokens.

Packs and their order are asked of the packers and the sampler that the loader reads by, so there is one truth only. A
trace is a pure function of the training set, the sampler's position at the start and the index of the batch. What a run
noted of itself, so that it can be traced later, is `record`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from internlm_ds.data.binmeta import IntArray, read_meta
from internlm_ds.data.packing import PaddedBatcher, StreamPacker
from internlm_ds.data.sampler import BatchSkipper, StaticBatchSampler
from internlm_ds.data.samples import FileSamples
from internlm_ds.data.trainset import TrainSet, open_sampler, open_train_set
from internlm_ds.errors import DataFormatError
from internlm_ds.runspec import RunSpec


@dataclass(frozen=True)
class Piece:
    """A piece of a document in a pack.

    Attributes:
        path, name: The file, and its path below `data.train_folder`; None and "" for synthetic samples.
        type_name: Its data type.
        line: 1-based line in the file, None for synthetic samples.
        start, stop: Its tokens are `[start, stop)` of the document's.
        length: Tokens of the whole document.
        place: Where its first token stands in the micro-batch.
        part, sample: The packer, and the number in its shuffled samples.
    """

    path: str | None
    name: str
    type_name: str
    line: int | None
    start: int
    stop: int
    length: int
    place: int
    part: int
    sample: int


@dataclass(frozen=True)
class TracedPack:
    """A micro-batch: the number of its pack, and its documents in order."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TracedBatch:
    """A batch of all ranks.

    Attributes:
        index: Batch index over all epochs, from 0, as in metrics.jsonl.
        epoch: Pass over the data it belongs to, from 0.
        skipped: It is named in `skip_batches`: counted, never trained on.
        ranks: `ranks[r][m]` is micro-batch m of data-parallel rank r.
    """

    index: int
    epoch: int
    skipped: bool
    ranks: tuple[tuple[TracedPack, ...], ...]

    @property
    def pieces(self) -> list[Piece]:
        """All pieces, rank by rank."""
        return [piece for rank in self.ranks for pack in rank for piece in pack.pieces]


class Trace:
    """The batches of a run, or of one launch of it.

    Args:
        data: The training set.
        sampler: Of any data-parallel rank, standing where the run began; belongs to this object from now on.
        skip_batches: `data.skip_batches`.
    """

    def __init__(self, data: TrainSet, sampler: StaticBatchSampler, *, skip_batches: str = ""):
        self.data = data
        self.skipper = BatchSkipper(skip_batches)
        self._sampler, self._start = sampler, sampler.state_dict()
        self._offsets: dict[str, IntArray] = {}

    @property
    def first_index(self) -> int:
        """Index of the first batch."""
        return int(self._start["batch_count"])

    def batch(self, index: int) -> TracedBatch:
        """The batch of an index.

        Raises:
            DataFormatError: The run began behind it.
        """
        if index < self.first_index:
            raise DataFormatError(f"there is no batch {index}: this run begins with batch {self.first_index}")
        if index < self._sampler.batch_count:
            self._sampler.load_state_dict(self._start)
        while self._sampler.batch_count < index:
            self._sampler.next_batch()
        numbers = self._sampler.next_batch_of_all()
        ranks = tuple(tuple(self.pack(int(number)) for number in column) for column in numbers.T)
        return TracedBatch(index, self._sampler.epoch, self.skipper(index), ranks)

    def pack(self, number: int) -> TracedPack:
        """The documents of pack `number` of the training set."""
        packer, index = self.data.packs.locate(number)
        part = number_of_part(self.data, number)
        assert isinstance(packer, StreamPacker | PaddedBatcher), packer
        file = self.data.files[part] if self.data.files else None
        pieces = []
        for sample, start, stop, length, place in _spans(packer, index):
            pieces.append(
                Piece(
                    path=None if file is None else file.path,
                    name="" if file is None else file.name,
                    type_name=self.data.dataset_types[packer.samples.type_id],
                    line=self._line(packer.samples, sample) if isinstance(packer.samples, FileSamples) else None,
                    start=start,
                    stop=stop,
                    length=length,
                    place=place,
                    part=part,
                    sample=sample,
                )
            )
        return TracedPack(number, tuple(pieces))

    def tokens(self, piece: Piece) -> IntArray:
        """The tokens of a piece, int64, signed as on disk.

        Raises:
            DataFormatError: The file has changed since.
        """
        packer = self.data.packs.parts[piece.part]
        assert isinstance(packer, StreamPacker | PaddedBatcher), packer
        return packer.samples.read(piece.sample)[piece.start : piece.stop]

    def _line(self, samples: FileSamples, sample: int) -> int:
        """1-based row of the meta that describes the sample, which is its line in the bin."""
        if samples.path not in self._offsets:
            self._offsets[samples.path] = read_meta(samples.path)[0]
        offsets, offset = self._offsets[samples.path], int(samples.order.offsets[sample])
        row = int(np.searchsorted(offsets, offset))
        if row < len(offsets) and offsets[row] == offset:
            return row + 1
        return int(np.flatnonzero(offsets == offset)[0]) + 1  # rows in another order than lines: somebody's own meta


def trace_of(spec: RunSpec) -> Trace:
    """The batches of a run on paper, from its first one.

    Raises:
        ConfigError, DataFormatError: The data cannot be opened, see `trainset`.
    """
    data, weights = spec.config.data, spec.config.internlm_ds.data_weights
    found = open_train_set(data, vocab_size=spec.config.model.vocab_size, log=False)
    ranks = {"data_rank": 0, "data_size": spec.layout.data}
    sampler = open_sampler(data, found.packs, found.files, weights=weights, **ranks)
    return Trace(found, sampler, skip_batches=data.skip_batches)


def number_of_part(data: TrainSet, number: int) -> int:
    """Which part of the training set holds a pack."""
    return int(data.packs.ends.searchsorted(number, side="right"))


def skip_text(text: str, indices: Iterable[int]) -> str:
    """`skip_batches` that leaves out what `text` does and `indices` too, as short as can be.

    >>> skip_text("4,12-13", [14, 3])
    '3-4,12-14'
    """
    ranges = sorted([*BatchSkipper(text).ranges, *((index, index) for index in indices)])
    merged: list[tuple[int, int]] = []
    for low, high in ranges:
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in merged)


def _spans(packer: StreamPacker | PaddedBatcher, index: int) -> list[tuple[int, int, int, int, int]]:
    """(sample, start, stop, length, place) of each piece in a pack, none empty."""
    found: list[tuple[int, int, int, int, int]] = []
    if isinstance(packer, PaddedBatcher):
        first, ends = index * packer.rows, packer.samples.ends
        for number in range(first, min(first + packer.rows, len(packer.samples))):
            length = int(ends[number]) - (int(ends[number - 1]) if number else 0)
            if length:
                # rows are dealt to samples that hold something, see collate.unpack
                found.append((number, 0, min(length, packer.seq_len), length, len(found) * packer.seq_len))
        return found
    span, place = packer.span(index), 0
    for number, length in zip(range(span.first, span.stop), packer.lengths(span).tolist()):
        start = span.skip if number == span.first else 0
        stop = min(length, start + packer.packed_length - place)
        if stop > start:
            found.append((number, start, stop, length, place))
            place += stop - start
    return found
