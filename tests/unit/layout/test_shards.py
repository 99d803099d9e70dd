"""Which part of a parameter a tensor rank holds: every index once, in the reference's order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.arch import internlm
from internlm_ds.arch.spec import ParamSpec
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import LayoutError
from internlm_ds.layout.shards import bounds, holds, local_numel, local_shape, shard_of


@given(count=st.integers(0, 500), size=st.integers(1, 16))
def test_bounds_cover_everything_once_and_nearly_evenly(count: int, size: int) -> None:
    found = [bounds(count, size=size, rank=r) for r in range(size)]
    assert [i for start, stop in found for i in range(start, stop)] == list(range(count))
    assert max(b - a for a, b in found) - min(b - a for a, b in found) <= 1


@given(
    parts=st.sampled_from([1, 3]),
    granule=st.integers(1, 4),
    units=st.integers(1, 12),
    size=st.integers(1, 12),
    uneven=st.booleans(),
)
def test_shards_cover_a_parameter_once(parts: int, granule: int, units: int, size: int, uneven: bool) -> None:
    length = parts * granule * units
    spec = ParamSpec("p", (5, length), "linear", split_dim=1, parts=parts, granule=granule, uneven=uneven)
    if units < size or (units % size and not uneven):
        with pytest.raises(LayoutError, match=f"cannot be divided over parallel.tensor = {size} ranks; possible here"):
            shard_of(spec, size=size, rank=0)
        return
    shards = [shard_of(spec, size=size, rank=r) for r in range(size)]
    if size == 1:
        assert shards == [None]
        return
    indices = sorted(i for s in shards if s for start, stop in s.spans for i in range(start, stop))
    assert indices == list(range(length))
    for rank, shard in enumerate(shards):
        assert shard is not None and shard.shape((5, length)) == (5, shard.width)
        assert shard.whole_shape((5, shard.width)) == (5, length)
        assert local_shape(spec, size=size, rank=rank) == (5, shard.width)


def test_a_rank_holds_its_heads_of_query_key_and_value() -> None:
    qkv = ParamSpec("Wqkv.weight", (24, 8), "linear", split_dim=0, parts=3, granule=2)
    shard = shard_of(qkv, size=4, rank=3)
    assert shard is not None and shard.spans == ((6, 8), (14, 16), (22, 24))


def test_what_is_whole_or_on_the_first_rank_only() -> None:
    norm = ParamSpec("norm.weight", (8,), "norm")
    bias = ParamSpec("out_proj.bias", (8,), "bias", on_first_tensor_rank_only=True)
    assert shard_of(norm, size=2, rank=1) is None and holds(norm, rank=1)
    assert [holds(bias, rank=r) for r in (0, 1)] == [True, False]
    assert [local_numel(bias, size=2, rank=r) for r in (0, 1)] == [8, 0]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("switch", [{}, {"embed_split_hidden": False}, {"use_swiglu": False, "mlp_ratio": 2}])
def test_ranks_hold_a_model_together(size: int, switch: dict) -> None:
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=131, **switch)
    arch = internlm.build(model)
    for spec in arch.iter_params():
        total = sum(local_numel(spec, size=size, rank=r) for r in range(size))
        replicas = 1 if spec.split_dim is not None or spec.on_first_tensor_rank_only else size
        assert total == spec.numel * replicas, spec.name


def test_a_message_names_what_would_work() -> None:
    spec = ParamSpec("Wqkv.weight", (24, 8), "linear", split_dim=0, parts=3, granule=2)
    message = (
        r"Wqkv.weight \[24, 8\]: 4 units along dimension 0 cannot be divided over parallel.tensor = 3 ranks; "
        r"possible here: 1, 2, 4$"
    )
    with pytest.raises(LayoutError, match=message):
        shard_of(spec, size=3, rank=0)
    head = ParamSpec("head.weight", (3, 8), "head", split_dim=0, uneven=True)
    with pytest.raises(LayoutError, match=r"3 indices along dimension 0 .* possible here: 1 to 3$"):
        shard_of(head, size=4, rank=0)
