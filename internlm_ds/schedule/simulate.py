"""Runs the instruction lists of all stages on paper: does it end, is everything done once, how long does it take?

Each directed edge of the pipeline is one channel for activations and one for gradients, first in, first out. Sending
never waits; a pass waits for its message. That is what `engine.channels` promises, so a schedule that passes here can
neither hang nor mix up messages there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    WeightGrad,
    Work,
)
from internlm_ds.schedule.lists import Pipeline

RECEIVES = (RecvActivation, RecvGrad)
SENDS = (SendActivation, SendGrad)
PASSES = (Forward, Backward, WeightGrad)


@dataclass(frozen=True)
class Costs:
    """How long a stage takes for one micro-batch, all its chunks together, in any unit.

    Attributes:
        forward: Forward pass.
        backward: Gradient of the input; also of the weights unless the schedule puts them off.
        weight: Gradient of the weights.
        message: From the end of a pass to the arrival of its message.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    message: float = 0.0


@dataclass(frozen=True)
class Span:
    """One pass on the clock."""

    stage: int
    work: Work
    start: float
    end: float


@dataclass(frozen=True)
class Report:
    """What a simulation found.

    Attributes:
        problems: Everything that is wrong, in words; empty for a schedule that works.
        spans: Every pass, by stage, in order.
        duration: When the last stage ends.
        busy: Per stage, time spent in passes.
        peak_in_flight: Per stage, most (chunk, micro-batch) pairs that were forward and not yet backward: what its
            activations take.
        sent: Messages of each kind, all stages together.
    """

    problems: tuple[str, ...]
    spans: tuple[Span, ...]
    duration: float
    busy: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    sent: dict[str, int]

    @property
    def bubble(self) -> float:
        """Idle time of the busiest stage over its busy time: (P-1)/(V·M) for (interleaved) 1F1B."""
        busiest = max(self.busy, default=0.0)
        return (self.duration - busiest) / busiest if busiest else 0.0


def simulate_training(
    pipeline: Pipeline, *, micro_batches: int, costs: Costs = Costs(), receive_blocks: bool = False
) -> Report:
    """`simulate` for the schedule that `pipeline` itself makes."""
    lists = [pipeline.training(stage, micro_batches=micro_batches) for stage in range(pipeline.stages)]
    return simulate(pipeline, lists, micro_batches=micro_batches, costs=costs, receive_blocks=receive_blocks)


def simulate(
    pipeline: Pipeline,
    lists: Sequence[Instructions],
    *,
    micro_batches: int,
    training: bool = True,
    costs: Costs = Costs(),
    receive_blocks: bool = False,
) -> Report:
    """Run the lists of all stages against each other.

    Args:
        pipeline: What the lists are for.
        lists: One per stage, in order.
        micro_batches: M; every one must pass every chunk of every stage once.
        training: Backward passes and an update are expected.
        costs: Of the passes.
        receive_blocks: A receive waits for its message, not only the pass behind it: a stricter world, which the lists
            that do not receive ahead survive. The engine's first batch lives in it, whose messages bring their shapes.
    """
    assert len(lists) == pipeline.stages, (len(lists), pipeline)
    world = _World(pipeline, costs, receive_blocks)
    stages = [_Stage(world, stage, instructions) for stage, instructions in enumerate(lists)]
    while any([stage.advance() for stage in stages]):
        pass
    problems = [*world.problems, *_stuck(stages), *_left_over(world)]
    if not problems:
        problems = [p for stage in stages for p in _incomplete(stage, pipeline, micro_batches, training)]
    return Report(
        problems=tuple(problems),
        spans=tuple(span for stage in stages for span in stage.spans),
        duration=max(stage.clock for stage in stages),
        busy=tuple(sum(span.end - span.start for span in stage.spans) for stage in stages),
        peak_in_flight=tuple(stage.peak for stage in stages),
        sent=dict(world.sent),
    )


@dataclass
class _Channel:
    """Messages of one kind over one edge: what was sent, when it arrives, what the other side is ready for."""

    sent: list[tuple[Work, float]] = field(default_factory=list)
    expected: list[Work] = field(default_factory=list)
    place: dict[Work, int] = field(default_factory=dict)

    def expect(self, receive: Work) -> None:
        self.place.setdefault(receive, len(self.expected))
        self.expected.append(receive)


class _World:
    """What stages share: channels, costs, and what went wrong."""

    def __init__(self, pipeline: Pipeline, costs: Costs, receive_blocks: bool):
        self.pipeline, self.receive_blocks = pipeline, receive_blocks
        self.channels: dict[tuple[str, int, int], _Channel] = {}
        self.problems: list[str] = []
        self.sent: Counter[str] = Counter()
        self.message_cost = costs.message
        backward = costs.backward if pipeline.kind == "zb-h1" else costs.backward + costs.weight
        whole = {Forward: costs.forward, Backward: backward, WeightGrad: costs.weight}
        self.cost: dict[type, float] = {kind: cost / pipeline.chunks for kind, cost in whole.items()}

    def channel(self, kind: str, source: int, target: int) -> _Channel:
        return self.channels.setdefault((kind, source, target), _Channel())

    def incoming(self, stage: int, receive: Work) -> _Channel:
        """The channel that a receive listens to."""
        step = -1 if isinstance(receive, RecvActivation) else 1
        kind = "activation" if isinstance(receive, RecvActivation) else "gradient"
        return self.channel(kind, (stage + step) % self.pipeline.stages, stage)

    def send(self, stage: int, send: Work, now: float) -> None:
        """Put a message on its way, named as its receiver will name it."""
        stages, forward = self.pipeline.stages, isinstance(send, SendActivation)
        kind, target = ("activation", stage + 1) if forward else ("gradient", stage - 1)
        chunk = send.chunk + target // stages  # +1 past the last stage, -1 before the first
        receive = (RecvActivation if forward else RecvGrad)(send.micro_batch, chunk)
        self.channel(kind, stage, target % stages).sent.append((receive, now + self.message_cost))
        self.sent[kind] += 1


class _Stage:
    """One stage at its list."""

    def __init__(self, world: _World, stage: int, instructions: Instructions):
        self.world, self.stage, self.instructions = world, stage, instructions
        self.position, self.clock = 0, 0.0
        self.done: Counter[Instruction] = Counter()
        self.spans: list[Span] = []
        self.in_flight = self.peak = 0

    @property
    def finished(self) -> bool:
        return self.position == len(self.instructions)

    def advance(self) -> bool:
        """Go on until something is missing; False if not even one instruction could be done."""
        start = self.position
        while not self.finished and self._step(self.instructions[self.position]):
            self.done[self.instructions[self.position]] += 1
            self.position += 1
        return self.position > start

    def _step(self, instruction: Instruction) -> bool:
        """Do one instruction; False when it has to wait."""
        if isinstance(instruction, RECEIVES):
            return self._receive(instruction)
        if isinstance(instruction, SENDS):
            self._send(instruction)
        elif isinstance(instruction, PASSES):
            return self._pass(instruction)
        elif isinstance(instruction, OptimizerStep) and not self.done[ReduceGrads()]:
            self._wrong(instruction, "comes before the gradients are reduced")
        return True

    def _receive(self, receive: Work) -> bool:
        channel = self.world.incoming(self.stage, receive)
        if self.world.receive_blocks:
            place = len(channel.expected)
            if len(channel.sent) <= place:
                return False
            self.clock = max(self.clock, channel.sent[place][1])
        channel.expect(receive)
        return True

    def _send(self, send: Work) -> None:
        source = Forward if isinstance(send, SendActivation) else Backward
        if not self.done[source(send.micro_batch, send.chunk)]:
            self._wrong(send, "has nothing to send yet")
        self.world.send(self.stage, send, self.clock)

    def _pass(self, work: Work) -> bool:
        start = self._ready(work)
        if start is None:
            return False
        if self.done[work]:
            self._wrong(work, "is done twice")
        if self.done[ReduceGrads()]:
            self._wrong(work, "comes after the gradients are reduced")
        self.clock = start + self.world.cost[type(work)]
        self.spans.append(Span(self.stage, work, start, self.clock))
        self.in_flight += isinstance(work, Forward) - isinstance(work, Backward)
        self.peak = max(self.peak, self.in_flight)
        return True

    def _ready(self, work: Work) -> float | None:
        """When a pass can start; None while its message is not on its way."""
        place = (work.micro_batch, work.chunk)
        pipeline = self.world.pipeline
        if isinstance(work, WeightGrad):
            return self._after(Backward(*place), work)
        if isinstance(work, Forward):
            first, last = pipeline.is_first(self.stage, work.chunk), pipeline.is_last(self.stage, work.chunk)
            if first or last:
                self._after(Load(*place), work)
            return self.clock if first else self._message(RecvActivation(*place), work)
        self._after(Forward(*place), work)
        return self.clock if pipeline.is_last(self.stage, work.chunk) else self._message(RecvGrad(*place), work)

    def _after(self, needed: Instruction, work: Work) -> float:
        if not self.done[needed]:
            self._wrong(work, f"comes before {needed}")
        return self.clock

    def _message(self, receive: Work, work: Work) -> float | None:
        channel = self.world.incoming(self.stage, receive)
        place = channel.place.get(receive)
        if place is None:
            self._wrong(work, f"comes before {receive}")
            return self.clock
        if len(channel.sent) <= place:
            return None
        found, arrival = channel.sent[place]
        if found != receive:
            self._wrong(work, f"would get the message for {found}")
        return max(self.clock, arrival)

    def _wrong(self, instruction: Instruction, what: str) -> None:
        self.world.problems.append(f"stage {self.stage}: {instruction} {what}")


def _stuck(stages: list[_Stage]) -> list[str]:
    return [
        f"deadlock: stage {s.stage} waits for ever at {s.instructions[s.position]}, its instruction {s.position}"
        for s in stages
        if not s.finished
    ]


def _left_over(world: _World) -> list[str]:
    """Messages that nobody is ready for, and receives that no message answers."""
    found = []
    for (kind, source, target), channel in world.channels.items():
        sent, expected = len(channel.sent), len(channel.expected)
        if sent != expected:
            found.append(f"stage {source} sends {sent} {kind}s to stage {target}, which is ready for {expected}")
    return found


def _incomplete(stage: _Stage, pipeline: Pipeline, micro_batches: int, training: bool) -> list[str]:
    """What a stage left out or did too often."""
    passes: list[type[Work]] = [Forward]
    if training:
        passes += [Backward, WeightGrad] if pipeline.kind == "zb-h1" else [Backward]
    wanted: Counter[Instruction] = Counter(
        kind(m, chunk) for kind in passes for m in range(micro_batches) for chunk in range(pipeline.chunks)
    )
    end: list[Instruction] = [ReduceGrads(), OptimizerStep()] if training else []
    wanted.update(end)
    done = Counter({i: n for i, n in stage.done.items() if i in end or isinstance(i, PASSES)})
    return [
        *(f"stage {stage.stage} leaves out {i}" for i in wanted - done),
        *(f"stage {stage.stage} does {i} too often" for i in done - wanted),
    ]
