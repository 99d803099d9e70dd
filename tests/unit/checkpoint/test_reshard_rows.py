"""Any shard out of any other cut, whatever the dimensions, and no more read than it needs."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.checkpoint.reshard import gather_range, gather_rows
from internlm_ds.layout.shards import Shard
from internlm_ds.parallel.shards import take

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@st.composite
def cuts(draw, shape: tuple[int, ...]) -> list[Shard | None]:
    """A parameter whole, or divided among ranks along one dimension, each with one range or several."""
    if draw(st.booleans()):
        return [None]
    dim = draw(st.integers(0, len(shape) - 1))
    owners = draw(st.lists(st.integers(0, 2), min_size=shape[dim], max_size=shape[dim]))
    ranks = sorted(set(owners))
    return [
        Shard(
            ranks.index(rank), len(ranks), dim, shape[dim], tuple(spans(i for i, o in enumerate(owners) if o == rank))
        )
        for rank in ranks
    ]


def spans(indices):
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


@given(st.data())
def test_any_rows_come_out_of_any_cut(data):
    shape = data.draw(SHAPES)
    stored, wanted = data.draw(cuts(shape)), data.draw(st.sampled_from(data.draw(cuts(shape))))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    expected = take(whole, wanted)
    pieces = {held: take(whole, held) for held in stored}
    arguments = {"wanted": wanted, "shape": shape}

    def read(held, low, high):
        return pieces[held][low:high]

    assert gather_rows(read, stored, **arguments).equal(expected)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    assert gather_range(read, stored, **arguments, start=start, stop=stop).equal(expected.flatten()[start:stop])


def test_only_the_rows_that_are_needed_are_read():
    whole = torch.arange(64.0).view(8, 8)
    halves = [Shard(rank, 2, 0, 8, ((4 * rank, 4 * rank + 4),)) for rank in (0, 1)]
    quarter = Shard(1, 4, 0, 8, ((2, 4),))
    read = []

    def rows(held, low, high):
        read.append((held.rank, low, high))
        return take(whole, held)[low:high]

    assert gather_rows(rows, halves, wanted=quarter, shape=(8, 8)).equal(whole[2:4])
    assert read == [(0, 2, 4)]
    read.clear()
    # elements 9 to 15 lie in row 1 of the quarter
    assert gather_range(rows, halves, wanted=quarter, shape=(8, 8), start=9, stop=15).equal(whole[3, 1:7])
    assert read == [(0, 3, 4)]
