"""Groups of weight parallelism on paper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.errors import LayoutError
from internlm_ds.layout.weight_ranks import WeightLayout


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_every_kind_of_group_holds_each_rank_once(pipe: int, weight: int, zero: int, replicas: int):
    layout = WeightLayout(pipe * weight * zero * replicas, pipe=pipe, weight=weight, zero=zero)
    kinds = [(layout.weight_groups, weight), (layout.weight_data_groups, zero * replicas), (layout.zero_groups, zero)]
    for groups, size in kinds:
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {size}


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(LayoutError, match=r"parallel.weight = 3: pipeline x weight = 3 must divide the world size = 8"):
        WeightLayout(8, weight=3)
    with pytest.raises(LayoutError, match=r"parallel.zero1 = 3: must divide the weight-data size = 2"):
        WeightLayout(8, weight=4, zero=3)
