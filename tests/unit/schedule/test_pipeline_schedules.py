"""Pipeline schedules on paper: everything once, no deadlock, memory and idle time by formula; faults are found."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.errors import LayoutError
from internlm_ds.schedule import orders
from internlm_ds.schedule.instructions import (
    Backward,
    Forward,
    Instruction,
    Load,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    WeightGrad,
)
from internlm_ds.schedule.lists import Pipeline
from internlm_ds.schedule.simulate import Costs, Report, simulate, simulate_training

STAGES, CHUNKS = (1, 2, 3, 4, 8), (1, 2, 3, 4)


def sizes(stages: int, chunks: int) -> Iterator[int]:
    """Numbers of micro-batches that a pipeline of this shape takes, up to four for each stage."""
    return (m for m in range(1, 4 * stages + 1) if chunks == 1 or m % stages == 0)


SHAPES = [(stages, chunks) for stages in STAGES for chunks in CHUNKS]


# ---- the schedules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "chunks"), SHAPES)
def test_1f1b_ends_and_idles_as_the_formula_says(stages: int, chunks: int):
    pipeline = Pipeline(stages=stages, chunks=chunks)
    for micro_batches in sizes(stages, chunks):
        report = simulate_training(pipeline, micro_batches=micro_batches)
        assert report.problems == (), (pipeline, micro_batches)
        # Narayanan et al. (2021), sections 2.2.1 and 2.2.2
        assert report.bubble == pytest.approx((stages - 1) / (chunks * micro_batches))
        messages = pipeline.num_messages(micro_batches)
        assert (report.sent.get("activation", 0), report.sent.get("gradient", 0)) == (messages, messages)


@pytest.mark.parametrize("stages", STAGES)
def test_1f1b_keeps_no_more_micro_batches_than_stages_follow(stages: int):
    for micro_batches in sizes(stages, 1):
        report = simulate_training(Pipeline(stages=stages), micro_batches=micro_batches)
        assert report.peak_in_flight == tuple(min(micro_batches, stages - stage) for stage in range(stages))


def test_interleaving_keeps_more():
    report = simulate_training(Pipeline(stages=4, chunks=2), micro_batches=16)
    # one more than what runs ahead: 2 (P - r - 1) + (V - 1) P
    assert report.peak_in_flight == (11, 9, 7, 5)


@pytest.mark.parametrize(("stages", "chunks"), SHAPES)
def test_the_first_batch_may_wait_at_every_receive(stages: int, chunks: int):
    for micro_batches in sizes(stages, chunks):
        pipeline = Pipeline(stages=stages, chunks=chunks)
        assert simulate_training(pipeline, micro_batches=micro_batches, receive_blocks=True).problems == ()


@pytest.mark.parametrize(("stages", "chunks"), [shape for shape in SHAPES if shape[1] > 1])
def test_receiving_ahead_changes_neither_order_nor_time(stages: int, chunks: int):
    for micro_batches in sizes(stages, chunks):
        plain = simulate_training(Pipeline(stages, chunks), micro_batches=micro_batches)
        ahead = simulate_training(Pipeline(stages, chunks, receive_ahead=True), micro_batches=micro_batches)
        assert ahead.problems == () and ahead.spans == plain.spans


def test_receiving_ahead_posts_one_pass_earlier():
    lists = [Pipeline(2, 2, receive_ahead=ahead).training(0, micro_batches=2) for ahead in (False, True)]
    second_chunk = [instructions.index(RecvActivation(0, 1)) for instructions in lists]
    passes = [instructions.index(Forward(1, 0)) for instructions in lists]
    assert second_chunk[0] > passes[0] and second_chunk[1] < passes[1]
    assert Counter(lists[0]) == Counter(lists[1])


def test_a_first_batch_that_waited_at_receives_ahead_would_hang():
    """Why the engine does not receive ahead before it knows shapes."""
    report = simulate_training(Pipeline(2, 2, receive_ahead=True), micro_batches=2, receive_blocks=True)
    assert [problem.split(":")[0] for problem in report.problems] == ["deadlock", "deadlock"]


@pytest.mark.parametrize("stages", STAGES)
def test_zero_bubble_idles_less_with_the_same_memory(stages: int):
    for micro_batches in sizes(stages, 1):
        zero = simulate_training(Pipeline(stages, kind="zb-h1"), micro_batches=micro_batches)
        plain = simulate_training(Pipeline(stages), micro_batches=micro_batches)
        assert zero.problems == ()
        assert zero.peak_in_flight == plain.peak_in_flight
        assert zero.duration < plain.duration or stages == 1
        if micro_batches >= stages:  # Qi et al. (2023), table 2: (P - 1)(F + B - W), all 1 here
            assert zero.duration - 3 * micro_batches == pytest.approx(stages - 1)


def test_zero_bubble_with_unequal_passes():
    costs = Costs(forward=1.0, backward=1.2, weight=0.7)
    report = simulate_training(Pipeline(4, kind="zb-h1"), micro_batches=16, costs=costs)
    assert report.duration == pytest.approx(2.9 * 16 + 3 * (1.0 + 1.2 - 0.7))


def test_stage_r_puts_r_weight_passes_off():
    for stage in range(4):
        order = orders.zb_h1(stage, stages=4, micro_batches=6)
        backward, weight, most = 0, 0, 0
        for work in order:
            backward += isinstance(work, Backward)
            weight += isinstance(work, WeightGrad)
            if isinstance(work, WeightGrad):
                most = max(most, backward - weight)
        assert (backward, weight, most) == (6, 6, stage)


@given(
    stages=st.sampled_from(STAGES), chunks=st.sampled_from(CHUNKS), micro_batches=st.integers(min_value=1, max_value=40)
)
def test_evaluation_takes_any_number_of_micro_batches(stages: int, chunks: int, micro_batches: int):
    pipeline = Pipeline(stages, chunks, receive_ahead=True)
    lists = [pipeline.evaluation(stage, micro_batches=micro_batches) for stage in range(stages)]
    report = simulate(pipeline, lists, micro_batches=micro_batches, training=False)
    assert report.problems == ()
    assert report.sent.get("activation", 0) == pipeline.num_messages(micro_batches)


@given(
    forward=st.floats(min_value=0.1, max_value=3),
    backward=st.floats(min_value=0.1, max_value=3),
    message=st.floats(min_value=0, max_value=3),
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(["1f1b", "zb-h1"]),
)
def test_order_does_not_depend_on_durations(forward: float, backward: float, message: float, shape, kind: str):
    stages, chunks = shape
    pipeline = Pipeline(stages, chunks if kind == "1f1b" else 1, kind)
    costs = Costs(forward, backward, 0.5, message)
    report = simulate_training(pipeline, micro_batches=2 * stages, costs=costs)
    assert report.problems == ()
    for stage in range(stages):
        spans = [span for span in report.spans if span.stage == stage]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans))


def test_a_list_is_what_a_reader_expects():
    assert Pipeline(2).training(1, micro_batches=2) == (
        *(RecvActivation(0), Load(0), Forward(0), Backward(0), SendGrad(0)),
        *(RecvActivation(1), Load(1), Forward(1), Backward(1), SendGrad(1)),
        *(ReduceGrads(), OptimizerStep()),
    )
    assert Pipeline(2).training(0, micro_batches=2) == (
        *(Load(0), Forward(0), SendActivation(0), Load(1), Forward(1), SendActivation(1)),
        *(RecvGrad(0), Backward(0), RecvGrad(1), Backward(1)),
        *(ReduceGrads(), OptimizerStep()),
    )


def test_interleaved_order_is_megatrons():
    order = orders.interleaved(0, stages=2, chunks=2, micro_batches=4)
    words = [f"{type(work).__name__[0]}{work.micro_batch}{'ab'[work.chunk]}" for work in order]
    assert " ".join(words) == "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a"


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_interleaving_needs_multiples_of_the_stages():
    with pytest.raises(LayoutError, match=r"in groups of 4, one for each stage; 6 of them do not divide"):
        Pipeline(4, 2).training(0, micro_batches=6)


def test_unknown_schedules_are_refused():
    with pytest.raises(LayoutError, match=r"no pipeline schedule 'gpipe'; there are 1f1b, zb-h1"):
        Pipeline(4, kind="gpipe")
    with pytest.raises(LayoutError, match=r"zb-h1 is for one chunk per stage, not 2; use 1f1b, or one chunk"):
        Pipeline(4, 2, "zb-h1")


# ---- broken schedules are caught ----------------------------------------------------------------------------------

BROKEN = [(Pipeline(4), 8), (Pipeline(2, 3), 4), (Pipeline(4, 2), 8), (Pipeline(3, kind="zb-h1"), 6)]


def run(pipeline: Pipeline, micro_batches: int, change) -> Report:
    """Simulate a pipeline's lists after `change(lists)`."""
    lists = [list(pipeline.training(stage, micro_batches=micro_batches)) for stage in range(pipeline.stages)]
    change(lists)
    return simulate(pipeline, [tuple(one) for one in lists], micro_batches=micro_batches)


def drop(kind: type[Instruction]):
    def change(lists: list[list[Instruction]]) -> None:
        stage, place = next((s, i) for s, one in enumerate(lists) for i, x in enumerate(one) if isinstance(x, kind))
        del lists[stage][place]

    return change


@pytest.mark.parametrize(("pipeline", "micro_batches"), BROKEN, ids=str)
@pytest.mark.parametrize(
    "kind", [Load, Forward, Backward, SendActivation, RecvActivation, SendGrad, RecvGrad, ReduceGrads, OptimizerStep]
)
def test_a_dropped_instruction_is_caught(pipeline: Pipeline, micro_batches: int, kind: type[Instruction]):
    assert run(pipeline, micro_batches, drop(kind)).problems


def test_a_dropped_weight_pass_is_caught():
    report = run(*BROKEN[3], drop(WeightGrad))
    assert report.problems == ("stage 0 leaves out WeightGrad(micro_batch=0, chunk=0)",)


@pytest.mark.parametrize(("pipeline", "micro_batches"), BROKEN, ids=str)
def test_a_repeated_instruction_is_caught(pipeline: Pipeline, micro_batches: int):
    rng = random.Random(3)
    for _ in range(40):

        def repeat(lists: list[list[Instruction]]) -> None:
            one = rng.choice(lists)
            place = rng.choice([i for i, x in enumerate(one) if not isinstance(x, Load)])
            one.insert(place, one[place])

        assert run(pipeline, micro_batches, repeat).problems


@pytest.mark.parametrize(("pipeline", "micro_batches"), BROKEN, ids=str)
@pytest.mark.parametrize("kind", [SendActivation, SendGrad, RecvActivation, RecvGrad])
def test_a_reversed_channel_is_caught(pipeline: Pipeline, micro_batches: int, kind: type[Instruction]):
    """One end of a channel gives or takes its messages in the opposite order."""

    def reverse(lists: list[list[Instruction]]) -> None:
        one = lists[0] if any(isinstance(x, kind) for x in lists[0]) else lists[1]
        places = [i for i, x in enumerate(one) if isinstance(x, kind)]
        for place, instruction in zip(places, [one[i] for i in reversed(places)]):
            one[place] = instruction

    assert run(pipeline, micro_batches, reverse).problems


@pytest.mark.parametrize(("pipeline", "micro_batches"), BROKEN, ids=str)
def test_swapped_instructions_are_caught(pipeline: Pipeline, micro_batches: int):
    """Two instructions of one kind change places, and everything around them stays."""
    rng = random.Random(5)
    for _ in range(40):

        def swap(lists: list[list[Instruction]]) -> None:
            one = lists[rng.randrange(len(lists) - 1)]
            kind = rng.choice([Forward, Backward, SendActivation, RecvGrad])
            places = rng.sample([i for i, x in enumerate(one) if isinstance(x, kind)], 2)
            a, b = places
            one[a], one[b] = one[b], one[a]

        assert run(pipeline, micro_batches, swap).problems


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lists: lists[0].insert(0, SendActivation(0)), "has nothing to send yet"),
        (lambda lists: lists[0].insert(0, Backward(0)), r"comes before Forward\(micro_batch=0, chunk=0\)"),
        (lambda lists: lists[3].insert(0, Forward(0)), r"comes before RecvActivation\(micro_batch=0, chunk=0\)"),
        (lambda lists: lists[0].insert(0, Forward(0)), r"comes before Load\(micro_batch=0, chunk=0\)"),
        (lambda lists: lists[0].insert(-2, Forward(0)), "is done twice"),
        (lambda lists: lists[0].insert(0, OptimizerStep()), "comes before the gradients are reduced"),
        (lambda lists: lists[0].append(Forward(0)), "comes after the gradients are reduced"),
        (lambda lists: lists[0].append(OptimizerStep()), r"stage 0 does OptimizerStep\(\) too often"),
        (
            lambda lists: lists[0].remove(SendActivation(7)),
            "stage 0 sends 7 activations to stage 1, which is ready for 8",
        ),
        (lambda lists: lists[0].remove(SendActivation(7)), "deadlock: stage 1 waits for ever at Forward"),
        (lambda lists: lists[1].remove(RecvActivation(0)), r"would get the message for RecvActivation\(micro_batch=0"),
    ],
)
def test_a_problem_says_where_and_what(change, words: str):
    problems = run(*BROKEN[0], change).problems
    assert any(re.search(words, problem) for problem in problems), problems
