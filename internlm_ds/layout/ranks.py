"""Who is who among the ranks: pipe × data × tensor as integers, and every group as a tuple of global ranks.

The tensor axis runs fastest, then data, pipe slowest: `rank = (pipe * data_size + data) * tensor_size + tensor`. A
zero group is a run of `zero` neighbours on the data axis that share the optimizer's state; a replica group joins the
ranks that hold the same share of it. Process groups, devices and this process' own place are `parallel`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internlm_ds.config.schema import ParallelConfig
from internlm_ds.errors import LayoutError, Problem

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Coord:
    """Place of a rank on the three axes, each from 0."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes.

    Attributes:
        pipe: Pipeline stages.
        data: Data-parallel ranks.
        tensor: Tensor-parallel ranks.
        zero: Data-parallel neighbours that share one copy of the optimizer's state; divides `data`, 1 means no sharing.
        chunks: Runs of layers per stage (InternLM's `num_chunks`).

    Raises:
        LayoutError: A size is below 1, or `zero` does not divide `data`.

    >>> Layout(pipe=2, data=2, tensor=2).pipe_groups
    ((0, 4), (1, 5), (2, 6), (3, 7))
    """

    pipe: int = 1
    data: int = 1
    tensor: int = 1
    zero: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        for name in ("pipe", "data", "tensor", "zero", "chunks"):
            if getattr(self, name) < 1:
                raise LayoutError(f"a layout needs {name} >= 1, got {name}={getattr(self, name)}")
        if self.data % self.zero:
            raise LayoutError(
                f"zero={self.zero} must divide data={self.data}; possible here: {_listed(divisors(self.data))}"
            )

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.tensor

    @property
    def log_rank(self) -> int:
        """Tensor 0, data 0, last stage: the rank that knows the loss."""
        return self.rank(Coord(self.pipe - 1, 0, 0))

    def rank(self, coord: Coord) -> int:
        """The global rank at a place.

        Raises:
            LayoutError: The place is outside the layout.
        """
        for name in ("pipe", "data", "tensor"):
            if not 0 <= getattr(coord, name) < getattr(self, name):
                raise LayoutError(f"{coord} is outside {self}: {name} runs from 0 to {getattr(self, name) - 1}")
        return (coord.pipe * self.data + coord.data) * self.tensor + coord.tensor

    def coord(self, rank: int) -> Coord:
        """The place of a global rank.

        Raises:
            LayoutError: There is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside {self}: ranks run from 0 to {self.world_size - 1}")
        above, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(above, self.data)
        return Coord(pipe, data, tensor)

    @property
    def tensor_groups(self) -> Groups:
        """Blocks of `tensor` neighbours."""
        return tuple(tuple(range(first, first + self.tensor)) for first in range(0, self.world_size, self.tensor))

    @property
    def data_groups(self) -> Groups:
        """Ranks that differ on the data axis only, by stage, then by tensor rank."""
        return self._along_data(0, self.data, 1)

    @property
    def pipe_groups(self) -> Groups:
        """Ranks that differ in their stage only."""
        per_stage = self.data * self.tensor
        return tuple(tuple(range(first, self.world_size, per_stage)) for first in range(per_stage))

    @property
    def zero_groups(self) -> Groups:
        """Runs of `zero` data neighbours, by stage, then by run, then by tensor rank."""
        return tuple(
            tuple(self.rank(Coord(pipe, first + i, tensor)) for i in range(self.zero))
            for pipe in range(self.pipe)
            for first in range(0, self.data, self.zero)
            for tensor in range(self.tensor)
        )

    @property
    def replica_groups(self) -> Groups:
        """Ranks that hold the same share of the optimizer's state: one of each zero group, size `data / zero`."""
        return tuple(
            tuple(self.rank(Coord(pipe, data, tensor)) for data in range(share, self.data, self.zero))
            for pipe in range(self.pipe)
            for share in range(self.zero)
            for tensor in range(self.tensor)
        )

    def _along_data(self, first: int, stop: int, step: int) -> Groups:
        return tuple(
            tuple(self.rank(Coord(pipe, data, tensor)) for data in range(first, stop, step))
            for pipe in range(self.pipe)
            for tensor in range(self.tensor)
        )


def group_of(groups: Groups, rank: int) -> tuple[int, ...]:
    """The group that holds a rank.

    Raises:
        LayoutError: No group does.
    """
    for group in groups:
        if rank in group:
            return group
    raise LayoutError(f"rank {rank} is in none of the groups {groups}")


def smallest_world_size(parallel: ParallelConfig) -> int:
    """Processes for one data-parallel rank, or for as many as share optimizer states when `zero1` names a number.

    >>> from internlm_ds.config.schema import PipelineConfig, Zero1Config
    >>> smallest_world_size(ParallelConfig(zero1=Zero1Config(8), pipeline=PipelineConfig(2)))
    16
    """
    return max(1, parallel.pipeline.size) * max(1, parallel.tensor.size) * max(1, parallel.zero1.size)


def solve(
    parallel: ParallelConfig, *, world_size: int, num_chunks: int, line_of: Callable[[str], int | None]
) -> tuple[Layout | None, list[Problem]]:
    """Sizes of all axes for so many processes.

    `zero1`: 0 or less is all of data parallel, 1 no sharing, k a run of k ranks that must divide data parallel.

    Args:
        parallel: Its sizes after both forms (int and dict) were read.
        world_size: Number of processes.
        num_chunks: `model.num_chunks`.
        line_of: Line of a dotted key in the configuration, None where there is none.
    Returns:
        The layout, None when it does not come out; and what is wrong, with what would work.
    """
    problems = _below_one(parallel, world_size=world_size, num_chunks=num_chunks, line_of=line_of)
    if problems:
        return None, problems
    tensor, pipe = parallel.tensor.size, parallel.pipeline.size
    if world_size % (tensor * pipe):
        return None, _not_dividing(tensor, pipe, world_size=world_size, line_of=line_of)
    data = world_size // (tensor * pipe)
    asked = parallel.zero1.size
    zero = data if asked <= 0 else asked
    if data % zero:
        message = (
            f"must divide data parallel = {data} (world size {world_size} / tensor {tensor} / pipeline {pipe}); "
            f"possible here: {_listed(divisors(data))}, or -1 for all of it"
        )
        return None, [Problem("parallel.zero1", message, asked, _line(line_of, "parallel.zero1", ".size"))]
    return Layout(pipe=pipe, data=data, tensor=tensor, zero=zero, chunks=num_chunks), []


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, rising.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [k for k in range(1, number + 1) if number % k == 0]


def _below_one(
    parallel: ParallelConfig, *, world_size: int, num_chunks: int, line_of: Callable[[str], int | None]
) -> list[Problem]:
    found = [
        Problem(key, "must be at least 1", size, _line(line_of, key, ".size"))
        for key, size in (
            ("parallel.tensor", parallel.tensor.size),
            ("parallel.pipeline", parallel.pipeline.size),
            ("model.num_chunks", num_chunks),
        )
        if size < 1
    ]
    if world_size < 1:
        found.append(Problem("world size", "a run needs at least one process", world_size))
    return found


def _not_dividing(tensor: int, pipe: int, *, world_size: int, line_of: Callable[[str], int | None]) -> list[Problem]:
    """Blame the axis that does not divide by itself; where each would, the pipeline (its size is freer)."""
    if world_size % tensor:
        good = divisors(world_size // pipe if world_size % pipe == 0 else world_size)
        message = f"must divide the world size = {world_size}; possible here: {_listed(good)}"
        found = [Problem("parallel.tensor", message, tensor, _line(line_of, "parallel.tensor", ".size"))]
        if world_size % pipe == 0:
            return found
        message = f"must divide the world size = {world_size}; possible here: {_listed(divisors(world_size))}"
        return [*found, Problem("parallel.pipeline", message, pipe, _line(line_of, "parallel.pipeline", ".size"))]
    message = (
        f"must divide world size / tensor = {world_size} / {tensor} = {world_size // tensor}; "
        f"possible here: {_listed(divisors(world_size // tensor))}"
    )
    return [Problem("parallel.pipeline", message, pipe, _line(line_of, "parallel.pipeline", ".size"))]


def _line(line_of: Callable[[str], int | None], key: str, suffix: str) -> int | None:
    """Line of a key that may be written as an int or as a dict with `size`."""
    return line_of(key + suffix) or line_of(key)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
