"""From an order of passes to the whole list of a stage's instructions: data, messages, and the end of the step.

The order itself is `orders`'. `training` and `evaluation` are what the engine and the planner ask for.

Legend: P stages, V chunks per stage, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from internlm_ds.config.schema import Config
from internlm_ds.errors import LayoutError
from internlm_ds.layout.ranks import Layout
from internlm_ds.schedule import orders
from internlm_ds.schedule.instructions import (
    Backward,
    Forward,
    Instruction,
    Instructions,
    Load,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    Work,
)

KINDS = ("1f1b", "zb-h1")


@dataclass(frozen=True)
class Pipeline:
    """How a pipeline runs; the same on all its stages.

    Attributes:
        stages: P.
        chunks: V, runs of layers per stage; more than one makes `1f1b` the interleaved schedule.
        kind: `1f1b` or `zb-h1`.
        receive_ahead: With several chunks, be ready for each message one pass before the one that needs it.

    Raises:
        LayoutError: A kind that is not known, or not for several chunks.
    """

    stages: int = 1
    chunks: int = 1
    kind: str = "1f1b"
    receive_ahead: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LayoutError(f"there is no pipeline schedule {self.kind!r}; there are {', '.join(KINDS)}")
        if self.kind != "1f1b" and self.chunks > 1:
            raise LayoutError(f"{self.kind} is for one chunk per stage, not {self.chunks}; use 1f1b, or one chunk")

    @classmethod
    def from_config(cls, config: Config, layout: Layout) -> Pipeline:
        """How a configuration's stages take turns. A single stage has nobody to take turns with, whatever is asked."""
        if layout.pipe == 1:
            return cls()
        return cls(
            stages=layout.pipe,
            chunks=layout.chunks,
            kind=config.internlm_ds.pipeline_schedule,
            receive_ahead=config.parallel.pipeline.interleaved_overlap,
        )

    def training(self, stage: int, *, micro_batches: int) -> Instructions:
        """What a stage does in one step.

        Raises:
            LayoutError: Several chunks, and M is no multiple of P.
        """
        return _training(self, stage, micro_batches)

    def evaluation(self, stage: int, *, micro_batches: int) -> Instructions:
        """What a stage does for a batch that is only evaluated; any M."""
        return _evaluation(self, stage, micro_batches)

    def num_messages(self, micro_batches: int) -> int:
        """Activations that all stages together send in a step; as many gradients come back in training."""
        return micro_batches * (self.stages * self.chunks - 1)

    def peak_in_flight(self, stage: int, *, micro_batches: int) -> int:
        """Most (micro-batch, chunk) pairs that a stage has forward and not yet backward: its activations in memory.

        >>> [Pipeline(stages=4).peak_in_flight(stage, micro_batches=16) for stage in range(4)]
        [4, 3, 2, 1]
        """
        work = self.training(stage, micro_batches=micro_batches)
        return max(accumulate(isinstance(w, Forward) - isinstance(w, Backward) for w in work))

    def is_first(self, stage: int, chunk: int) -> bool:
        """Does the model start here?"""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Does the model end here?"""
        return stage == self.stages - 1 and chunk == self.chunks - 1


@lru_cache(maxsize=64)
def _training(pipeline: Pipeline, stage: int, micro_batches: int) -> Instructions:
    sizes = {"stages": pipeline.stages, "micro_batches": micro_batches}
    if pipeline.kind == "zb-h1":
        order = orders.zb_h1(stage, **sizes)
    elif pipeline.chunks > 1:
        order = orders.interleaved(stage, chunks=pipeline.chunks, **sizes)
    else:
        order = orders.one_f_one_b(stage, **sizes)
    return (*_with_messages(order, pipeline, stage), ReduceGrads(), OptimizerStep())


@lru_cache(maxsize=64)
def _evaluation(pipeline: Pipeline, stage: int, micro_batches: int) -> Instructions:
    order = orders.forward_only(stages=pipeline.stages, chunks=pipeline.chunks, micro_batches=micro_batches)
    return tuple(_with_messages(order, pipeline, stage))


def _with_messages(order: orders.Order, pipeline: Pipeline, stage: int) -> Iterator[Instruction]:
    """The order with everything that a pass needs before it and leaves behind it."""
    # a lone stage's next message is its own last one: it cannot be ready for it earlier
    ahead = 1 if pipeline.receive_ahead and min(pipeline.chunks, pipeline.stages) > 1 else 0
    received = 0
    for k, work in enumerate(order):
        for coming in order[received : k + ahead + 1]:
            yield from _receive(coming, pipeline, stage)
        received = k + ahead + 1
        yield from _load(work, pipeline, stage)
        yield work
        yield from _send(work, pipeline, stage)


def _receive(work: Work, pipeline: Pipeline, stage: int) -> Iterator[Instruction]:
    if isinstance(work, Forward) and not pipeline.is_first(stage, work.chunk):
        yield RecvActivation(work.micro_batch, work.chunk)
    if isinstance(work, Backward) and not pipeline.is_last(stage, work.chunk):
        yield RecvGrad(work.micro_batch, work.chunk)


def _load(work: Work, pipeline: Pipeline, stage: int) -> Iterator[Instruction]:
    ends_here = pipeline.is_first(stage, work.chunk) or pipeline.is_last(stage, work.chunk)
    if isinstance(work, Forward) and ends_here:
        yield Load(work.micro_batch, work.chunk)


def _send(work: Work, pipeline: Pipeline, stage: int) -> Iterator[Instruction]:
    if isinstance(work, Forward) and not pipeline.is_last(stage, work.chunk):
        yield SendActivation(work.micro_batch, work.chunk)
    if isinstance(work, Backward) and not pipeline.is_first(stage, work.chunk):
        yield SendGrad(work.micro_batch, work.chunk)
