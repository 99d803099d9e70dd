"""Batch arithmetic: micro-batches, ramp-up, tokens per step. Sampling and packing are `data`'s.

A micro-batch is `micro_bsz * seq_len` tokens on one data-parallel rank; a step is `micro_num` of them on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internlm_ds.config.schema import DataConfig
from internlm_ds.errors import LayoutError, Problem
from internlm_ds.layout.ranks import Layout

RAMPUP_HINT = 'write three integers "start increment every" in one string, e.g. "2 2 100", or "" for none'


@dataclass(frozen=True)
class Rampup:
    """The first steps are smaller: `start` micro-batches, `increment` more after each `every` steps."""

    start: int
    increment: int
    every: int


@dataclass(frozen=True)
class BatchPlan:
    """What a step consists of.

    Attributes:
        micro_bsz: Sequences per micro-batch.
        seq_len: Tokens per sequence.
        micro_num: Micro-batches per step and data-parallel rank, once any ramp-up is over.
        data: Data-parallel ranks.
        rampup: How the first steps differ, or None.

    >>> BatchPlan(micro_bsz=2, seq_len=2048, micro_num=4, data=8).tokens_per_step
    131072
    """

    micro_bsz: int
    seq_len: int
    micro_num: int
    data: int = 1
    rampup: Rampup | None = None

    @classmethod
    def from_config(cls, data: DataConfig, *, data_size: int) -> BatchPlan:
        """The plan of a configuration on so many data-parallel ranks.

        Raises:
            LayoutError: `rampup_batch_size` cannot be read.
        """
        return cls(data.micro_bsz, data.seq_len, data.micro_num, data_size, parse_rampup(data.rampup_batch_size))

    @property
    def packed_length(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_bsz * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a whole step on all ranks, once any ramp-up is over."""
        return self.packed_length * self.micro_num * self.data

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a whole step on all ranks (DeepSpeed's `train_batch_size`)."""
        return self.micro_bsz * self.micro_num * self.data

    def micro_num_at(self, batch_index: int) -> int:
        """Micro-batches per rank in the batch of this index, counted from 0 over all epochs.

        Source: InternEvo `StaticBatchSampler`: `min(start + (b // every) * increment, micro_num)`.
        """
        if self.rampup is None:
            return self.micro_num
        grown = self.rampup.start + (batch_index // self.rampup.every) * self.rampup.increment
        return min(grown, self.micro_num)

    def tokens_at(self, batch_index: int) -> int:
        """Tokens of the batch of this index on all ranks."""
        return self.packed_length * self.micro_num_at(batch_index) * self.data

    @property
    def rampup_steps(self) -> int:
        """Batches before the full size is reached; 0 without a ramp-up."""
        if self.rampup is None or self.rampup.start >= self.micro_num:
            return 0
        missing = self.micro_num - self.rampup.start
        return -(-missing // self.rampup.increment) * self.rampup.every

    @property
    def rampup_samples(self) -> int:
        """Packs that one rank's ramp-up takes, as the sampler counts them (whole increments only).

        Source: InternEvo `StaticBatchSampler`: the sum of `(start + i * increment) * every`.
        """
        if self.rampup is None:
            return 0
        r = self.rampup
        return sum((r.start + i * r.increment) * r.every for i in range((self.micro_num - r.start) // r.increment))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every number of micro-batches that occurs, rising."""
        if self.rampup is None:
            return (self.micro_num,)
        grown = range(self.rampup.start, self.micro_num, self.rampup.increment)
        return (*grown, self.micro_num)

    def check(self, layout: Layout, *, valid_micro_num: int, line_of: Callable[[str], int | None]) -> list[Problem]:
        """What keeps this plan from running on a layout: the ramp-up's own arithmetic, chunks, pipelines."""
        return [
            *self._check_rampup(layout, line_of),
            *self._check_chunks(layout, valid_micro_num, line_of),
        ]

    def _check_rampup(self, layout: Layout, line_of: Callable[[str], int | None]) -> list[Problem]:
        if self.rampup is None:
            return []
        r, key = self.rampup, "data.rampup_batch_size"
        text, line = f"{r.start} {r.increment} {r.every}", line_of(key)
        if min(r.start, r.increment, r.every) < 1:
            return [Problem(key, 'start, increment and every must be at least 1, e.g. "1 1 100"', text, line)]
        if r.start > self.micro_num:
            message = f"the start must be at most data.micro_num = {self.micro_num}"
            return [Problem(key, message, text, line)]
        left = self.micro_num - r.start
        if layout.pipe > 1 and left % r.increment:
            good = ", ".join(str(k) for k in range(1, left + 1) if left % k == 0)
            message = (
                f"with a pipeline the increment must divide data.micro_num - start = {left}; possible here: {good}"
            )
            return [Problem(key, message, text, line)]
        return []

    def _check_chunks(
        self, layout: Layout, valid_micro_num: int, line_of: Callable[[str], int | None]
    ) -> list[Problem]:
        """With several chunks per stage the interleaved schedule needs multiples of the pipeline size."""
        if layout.chunks == 1 or layout.pipe == 1:
            return []
        asked = [("data.micro_num", self.micro_num), ("data.valid_micro_num", valid_micro_num)]
        found = [
            Problem(key, _multiple_message(layout, size), size, line_of(key))
            for key, size in asked
            if size % layout.pipe
        ]
        uneven = [size for size in self.sizes[:-1] if size % layout.pipe]
        if uneven and self.rampup is not None:
            r, key = self.rampup, "data.rampup_batch_size"
            message = f"reaches {uneven[0]} micro-batches, which {_multiple_message(layout, uneven[0])}"
            found.append(Problem(key, message, f"{r.start} {r.increment} {r.every}", line_of(key)))
        return found


def parse_rampup(text: str | None) -> Rampup | None:
    """Read `"start increment every"`; empty or None means no ramp-up.

    Raises:
        LayoutError: Not three integers.

    >>> parse_rampup("2 2 100")
    Rampup(start=2, increment=2, every=100)
    """
    if not text:
        return None
    parts = text.split() if isinstance(text, str) else [str(text)]
    if not parts:
        return None
    try:
        start, increment, every = map(int, parts)
    except ValueError as error:
        raise LayoutError(f"data.rampup_batch_size = {text!r}: {RAMPUP_HINT}") from error
    return Rampup(start, increment, every)


def _multiple_message(layout: Layout, size: int) -> str:
    below, above = size - size % layout.pipe, size - size % layout.pipe + layout.pipe
    near = f"{below} or {above}" if below else f"{above}"
    return f"must be divisible by the pipeline size = {layout.pipe} when model.num_chunks > 1; nearest: {near}"
