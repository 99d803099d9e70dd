"""Stages cover the layers once and in order, evenly; what cannot be divided is explained."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.arch import internlm
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import LayoutError
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.stages import check, partition_at, partition_uniform, stage_layers


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 30))
def test_partition_covers_every_layer_once_and_evenly(pipe, chunks, more):
    num_layers = chunks * (pipe + more)
    parts = partition_uniform(num_layers, pipe=pipe, chunks=chunks)
    in_order = [bounds for chunk in range(chunks) for bounds in (stage[chunk] for stage in parts)]
    assert [i for start, stop in in_order for i in range(start, stop)] == list(range(num_layers))
    sizes = [[stop - start for start, stop in stage] for stage in parts]
    assert max(map(max, sizes)) - min(map(min, sizes)) <= 1
    assert [sum(size) for size in sizes] == sorted(sum(size) for size in sizes)


@pytest.mark.parametrize(
    "num_layers, pipe, chunks, message",
    [
        (10, 2, 3, "10 layers cannot be cut into 3 equal chunks; chunks possible here: 1, 2, 5, 10"),
        (3, 4, 1, r"3 layers in 1 chunk\(s\) are too few for 4 stages: at most 3 stages"),
        (8, 8, 2, r"8 layers in 2 chunk\(s\) are too few for 8 stages: at most 4 stages"),
        (4, 0, 1, "each must be at least 1"),
    ],
)
def test_partition_that_cannot_be(num_layers, pipe, chunks, message):
    with pytest.raises(LayoutError, match=message):
        partition_uniform(num_layers, pipe=pipe, chunks=chunks)


def test_stage_layers_put_embedding_first_and_head_last():
    assert stage_layers(_arch(4), Layout(pipe=2)) == (((0, 3),), ((3, 7),))
    assert stage_layers(_arch(4), Layout()) == (((0, 7),),)


def test_stage_layers_with_chunks():
    assert stage_layers(_arch(4), Layout(pipe=2, chunks=2)) == (((0, 2), (3, 4)), ((2, 3), (4, 7)))


def test_stage_layers_at_the_users_borders():
    assert stage_layers(_arch(4), Layout(pipe=2), borders=(0, 1, 4)) == (((0, 2),), ((2, 7),))
    chunked = stage_layers(_arch(6), Layout(pipe=2, chunks=2), borders=(0, 1, 2, 5, 6))
    assert chunked == (((0, 2), (3, 6)), ((2, 3), (6, 9)))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 30))
def test_even_borders_are_the_uniform_partition(pipe, chunks, more):
    parts = partition_uniform(chunks * (pipe + more), pipe=pipe, chunks=chunks)
    borders = [0, *(stage[chunk][1] for chunk in range(chunks) for stage in parts)]
    assert partition_at(borders, pipe=pipe, chunks=chunks) == parts


@pytest.mark.parametrize("borders", [(0, 4), (0, 1, 2, 4), (0, 0, 4), (1, 2, 4), (0, 3, 2)])
def test_borders_that_do_not_cut(borders):
    message = r"does not cut the layers into 2 runs for 2 stage\(s\) of 1 chunk\(s\): write 3 rising numbers"
    with pytest.raises(LayoutError, match=message):
        partition_at(borders, pipe=2)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_stage_layers_cover_the_whole_list(pipe, chunks, more):
    arch = _arch(chunks * (pipe + more))
    bounds = stage_layers(arch, Layout(pipe=pipe, chunks=chunks))
    covered = sorted(i for stage in bounds for start, stop in stage for i in range(start, stop))
    assert covered == list(range(len(arch.layers)))


def test_check_names_the_key_to_change():
    lines = {"parallel.pipeline": 12, "model.num_chunks": 3}
    assert check(8, Layout(pipe=4, chunks=2), line_of=lines.get) == []
    too_many = check(3, Layout(pipe=4), line_of=lines.get)[0]
    assert (too_many.key, too_many.line) == ("parallel.pipeline", 12)
    assert "must be at most model.num_layers = 3" in too_many.message and "1 to 3" in too_many.message
    uneven = check(10, Layout(pipe=2, chunks=3), line_of=lines.get)[0]
    assert (uneven.key, uneven.line) == ("model.num_chunks", 3)
    assert "must divide model.num_layers = 10; possible here: 1, 2, 5" in uneven.message


def _arch(num_layers: int):
    return internlm.build(ModelConfig(num_layers=num_layers, hidden_size=8, num_attention_heads=2, vocab_size=16))
