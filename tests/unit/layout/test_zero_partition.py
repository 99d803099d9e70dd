"""Largest first to the least loaded rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.errors import LayoutError
from internlm_ds.layout.zero_partition import partition


@given(st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=20), st.integers(1, 6))
def test_every_parameter_has_one_rank(shapes, zero_size):
    found = partition(shapes, zero_size=zero_size)
    assert sorted(i for rank in found.assignment for i in rank) == list(range(len(shapes)))
    assert len(found.numels) == zero_size
    assert all(found.numels[rank] == 0 for rank in found.empty_ranks)


def test_log_line_reads_as_in_the_tutorial():
    found = partition([[4, 4], [4], [2]], zero_size=3)
    assert found.log_line(1) == "Number of elements on ranks: [16, 4, 2], rank:1"
    assert found.plan == (("0_4_4",), ("1_4",), ("2_2",))


def test_more_ranks_than_parameters():
    assert partition([[3]], zero_size=3).empty_ranks == (1, 2)


def test_no_rank_is_refused():
    with pytest.raises(LayoutError, match="a zero group needs at least one rank, got 0"):
        partition([[3]], zero_size=0)
