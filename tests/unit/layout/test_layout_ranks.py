"""Groups partition the ranks, places and ranks are one another's inverse, sizes that do not fit are explained."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.config.schema import ParallelConfig, PipelineConfig, TensorConfig, Zero1Config
from internlm_ds.errors import LayoutError
from internlm_ds.layout.ranks import Coord, Layout, divisors, group_of, smallest_world_size, solve


@st.composite
def layouts(draw) -> Layout:
    data = draw(st.integers(1, 12))
    zero = draw(st.sampled_from(divisors(data)))
    return Layout(pipe=draw(st.integers(1, 4)), data=data, tensor=draw(st.integers(1, 4)), zero=zero)


@given(layouts())
def test_rank_and_coord_are_inverse(layout):
    for rank in range(layout.world_size):
        assert layout.rank(layout.coord(rank)) == rank


@given(layouts())
def test_every_kind_of_group_partitions_the_ranks(layout):
    sizes = {
        "tensor_groups": layout.tensor,
        "data_groups": layout.data,
        "pipe_groups": layout.pipe,
        "zero_groups": layout.zero,
        "replica_groups": layout.data // layout.zero,
    }
    for name, size in sizes.items():
        groups = getattr(layout, name)
        assert all(len(group) == size and list(group) == sorted(group) for group in groups), name
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size)), name


@given(layouts())
def test_zero_and_replica_groups_cross_inside_data_groups(layout):
    for rank in range(layout.world_size):
        zero, replica = set(group_of(layout.zero_groups, rank)), set(group_of(layout.replica_groups, rank))
        data = set(group_of(layout.data_groups, rank))
        assert zero & replica == {rank}
        assert zero <= data and replica <= data


def test_groups_differ_in_their_axis_only():
    layout = Layout(pipe=2, data=2, tensor=2)
    assert layout.tensor_groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.data_groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.pipe_groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.log_rank == 4


def test_zero_groups_are_runs_of_data_neighbours():
    layout = Layout(data=4, tensor=2, zero=2)
    assert layout.zero_groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.replica_groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize("name", ["pipe", "data", "tensor", "zero", "chunks"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(LayoutError, match=f"a layout needs {name} >= 1, got {name}=0"):
        Layout(**{name: 0})


def test_zero_must_divide_data():
    with pytest.raises(LayoutError, match="zero=3 must divide data=8; possible here: 1, 2, 4, 8"):
        Layout(data=8, zero=3)


def test_places_outside_are_refused():
    layout = Layout(data=2, tensor=2)
    with pytest.raises(LayoutError, match="ranks run from 0 to 3"):
        layout.coord(4)
    with pytest.raises(LayoutError, match="data runs from 0 to 1"):
        layout.rank(Coord(0, 2, 0))
    with pytest.raises(LayoutError, match="rank 9 is in none of the groups"):
        group_of(layout.data_groups, 9)


@pytest.mark.parametrize("zero1, expected", [(-1, 8), (0, 8), (-7, 8), (1, 1), (4, 4), (8, 8)])
def test_solve_reads_zero1(zero1, expected):
    layout, problems = _solve(zero1=zero1, world_size=8)
    assert not problems
    assert layout == Layout(data=8, zero=expected)


def test_solve_fills_data_with_what_is_left():
    layout, problems = _solve(tensor=2, pipe=2, world_size=16, num_chunks=2)
    assert not problems
    assert layout == Layout(pipe=2, data=4, tensor=2, zero=4, chunks=2)


@pytest.mark.parametrize(
    "kwargs, key, message",
    [
        ({"tensor": 3}, "parallel.tensor", "must divide the world size = 8; possible here: 1, 2, 4, 8"),
        ({"pipe": 3}, "parallel.pipeline", "must divide world size / tensor = 8 / 1 = 8; possible here: 1, 2, 4, 8"),
        (
            {"tensor": 4, "pipe": 4},
            "parallel.pipeline",
            "must divide world size / tensor = 8 / 4 = 2; possible here: 1, 2",
        ),
        (
            {"zero1": 3, "tensor": 2},
            "parallel.zero1",
            "must divide data parallel = 4 (world size 8 / tensor 2 / pipeline 1); possible here: 1, 2, 4, or -1",
        ),
        ({"tensor": 0}, "parallel.tensor", "must be at least 1"),
        ({"pipe": -1}, "parallel.pipeline", "must be at least 1"),
        ({"num_chunks": 0}, "model.num_chunks", "must be at least 1"),
        ({"world_size": 0}, "world size", "a run needs at least one process"),
    ],
)
def test_solve_says_what_would_work(kwargs, key, message):
    layout, problems = _solve(**{"world_size": 8, **kwargs})
    assert layout is None
    assert [problem.key for problem in problems] == [key]
    assert message in problems[0].message


def test_solve_blames_both_axes_when_neither_divides():
    _, problems = _solve(tensor=3, pipe=5, world_size=8)
    assert [problem.key for problem in problems] == ["parallel.tensor", "parallel.pipeline"]


def test_solve_finds_the_line_of_either_form():
    lines = {"parallel.zero1.size": 7, "parallel.tensor": 9}
    _, problems = _solve(zero1=3, world_size=8, line_of=lines.get)
    assert str(problems[0]).startswith("parallel.zero1 = 3 (line 7): must divide data parallel = 8")
    _, problems = _solve(tensor=3, world_size=8, line_of=lines.get)
    assert problems[0].line == 9


def _solve(*, world_size, tensor=1, pipe=1, zero1=-1, num_chunks=1, line_of=lambda key: None):
    parallel = ParallelConfig(Zero1Config(zero1), TensorConfig(tensor), PipelineConfig(pipe))
    return solve(parallel, world_size=world_size, num_chunks=num_chunks, line_of=line_of)


@pytest.mark.parametrize(("zero1", "pipe", "expected"), [(-1, 1, 1), (8, 1, 8), (8, 2, 16), (0, 4, 4), (1, 1, 1)])
def test_smallest_world_size(zero1: int, pipe: int, expected: int) -> None:
    parallel = ParallelConfig(zero1=Zero1Config(zero1), pipeline=PipelineConfig(pipe))
    assert smallest_world_size(parallel) == expected
