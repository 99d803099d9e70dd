"""Rank groups, layer partition, zero partition and teraflops against the reference."""

from __future__ import annotations

import pytest
from cases import entries
from deviations import zero1_of_nought_means_all

from internlm_ds.config.schema import ParallelConfig, PipelineConfig, TensorConfig, Zero1Config
from internlm_ds.errors import LayoutError
from internlm_ds.layout.ranks import Layout, group_of, solve
from internlm_ds.layout.stages import partition_uniform
from internlm_ds.layout.weight_ranks import WeightLayout
from internlm_ds.layout.zero_partition import partition
from internlm_ds.plan.compute import megatron_flops

TFLOPS_TOLERANCE = 1e-12


def test_groups_equal_the_reference():
    for case in entries("parallel", "groups.json"):
        layout = _layout(case)
        weights = _weight_layout(case) if _splits_weights(case) else None
        for entry in case["ranks"]:
            _assert_same_place(case, entry, layout)
            if weights is None:
                _assert_same_zero_group(case, entry, layout)
            else:
                _assert_same_weight_place(entry, weights)


def test_partition_uniform_equals_the_reference():
    for case in entries("parallel", "partition_uniform.json"):
        if "parts" not in case:
            with pytest.raises(LayoutError):
                partition_uniform(case["num_layers"], pipe=case["pp"], chunks=case["num_chunks"])
            continue
        ours = partition_uniform(case["num_layers"], pipe=case["pp"], chunks=case["num_chunks"])
        assert [[list(bounds) for bounds in stage] for stage in ours] == case["parts"], case


def test_zero_partition_equals_the_reference():
    for case in entries("parallel", "zero_partition.json"):
        ours = partition(case["shapes"], zero_size=case["zero_size"])
        assert [list(indices) for indices in ours.assignment] == case["assignment"]
        assert [list(texts) for texts in ours.plan] == case["plan"]
        assert list(ours.empty_ranks) == case["no_params_ranks"]


def test_megatron_flops_equals_the_reference():
    for case in entries("parallel", "megatron_flops.json"):
        assert megatron_flops(**case["kwargs"]) == pytest.approx(case["tflops"], rel=TFLOPS_TOLERANCE)


def _splits_weights(case: dict) -> bool:
    return case["mode"] == "isp" or case.get("weight", 1) > 1


def _weight_layout(case: dict) -> WeightLayout:
    return WeightLayout(case["world"], pipe=case["pp"], weight=case.get("weight", 1), zero=case["zero1"])


def _layout(case: dict) -> Layout:
    parallel = ParallelConfig(
        # with split weights ZeRO runs along their own axis
        zero1=Zero1Config(size=-1 if _splits_weights(case) else case["zero1"]),
        tensor=TensorConfig(size=case["tp"], mode=case["mode"]),
        pipeline=PipelineConfig(size=case["pp"]),
    )
    layout, problems = solve(parallel, world_size=case["world"], num_chunks=1, line_of=lambda key: None)
    assert layout is not None and not problems, problems
    return layout


def _assert_same_place(case: dict, entry: dict, layout: Layout) -> None:
    rank = entry["rank"]
    groups = {"tensor": layout.tensor_groups, "data": layout.data_groups, "pipe": layout.pipe_groups}
    coord = layout.coord(rank)
    assert (rank == layout.log_rank) == entry["is_log_rank"]
    for mode, axis_groups in groups.items():
        if mode in entry:
            assert [getattr(coord, mode), list(group_of(axis_groups, rank))] == entry[mode], (mode, rank)


def _assert_same_zero_group(case: dict, entry: dict, layout: Layout) -> None:
    rank = entry["rank"]
    zero_group = group_of(layout.zero_groups, rank)
    if zero1_of_nought_means_all(case):
        assert zero_group == group_of(layout.data_groups, rank)
    else:
        assert [zero_group.index(rank), list(zero_group)] == entry["zero1"], rank


def _assert_same_weight_place(entry: dict, weights: WeightLayout) -> None:
    rank = entry["rank"]
    ours = {
        "weight": weights.weight_groups,
        "weight_data": weights.weight_data_groups,
        "zero1": weights.zero_groups,
    }
    for mode, groups in ours.items():
        group = group_of(groups, rank)
        assert [group.index(rank), list(group)] == entry[mode], (mode, rank)
