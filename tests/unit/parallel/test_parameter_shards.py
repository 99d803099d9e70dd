"""Cutting a parameter and putting it together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.layout.shards import Shard, shard_of
from internlm_ds.model.init import fill, initial_value, name_parameters
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.shards import join, shard_of_parameter, take, whole_shape


@given(size=st.integers(2, 5), dim=st.integers(0, 1), parts=st.sampled_from([1, 3]), spare=st.integers(0, 4))
def test_joined_shards_are_the_whole(size: int, dim: int, parts: int, spare: int) -> None:
    length = parts * (2 * size + spare)
    shape = (length, 3) if dim == 0 else (3, length)
    spec = ParamSpec("p", shape, "linear", split_dim=dim, parts=parts, uneven=True)
    whole = torch.arange(3 * length).view(shape)
    shards = [shard_of(spec, size=size, rank=r) for r in range(size)]
    assert join({s: take(whole, s) for s in shards if s}).equal(whole)


def test_a_packed_matrix_is_cut_part_by_part() -> None:
    spec = ParamSpec("Wqkv.bias", (12,), "bias", split_dim=0, parts=3, granule=2)
    assert take(torch.arange(12), shard_of(spec, size=2, rank=1)).tolist() == [2, 3, 6, 7, 10, 11]


def test_what_is_whole_stays_itself() -> None:
    whole = nn.Parameter(torch.zeros(3))
    assert take(whole, None) is whole and shard_of_parameter(whole) is None and whole_shape(whole) == (3,)


def test_a_shard_of_another_whole_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"\(5,\) is not what Shard"):
        take(torch.zeros(5), Shard(0, 2, dim=0, length=4, spans=((0, 2),)))


class Tiny(nn.Module):
    """A column matrix, a row bias and a norm, as tensor rank `rank` of 2 has them."""

    def __init__(self, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 3))
        if rank == 0:
            self.bias = nn.Parameter(torch.empty(3))
        self.norm = nn.Parameter(torch.empty(3))


SPECS = (
    ParamSpec("x.weight", (4, 3), "linear", 0.1, split_dim=0),
    ParamSpec("x.bias", (3,), "bias", on_first_tensor_rank_only=True),
    ParamSpec("x.norm", (3,), "norm", init_value=1.0),
)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_carry_what_others_need_to_know(rank: int, sequence_parallel: bool) -> None:
    module = Tiny(rank)
    name_parameters(module, "x", SPECS, tensor=Axis("tensor", 2, rank), sequence_parallel=sequence_parallel)
    fill(module, SPECS, seed=1)
    assert module.weight.equal(initial_value(SPECS[0], 1)[2 * rank : 2 * rank + 2])
    assert module.weight.tensor_model_parallel and whole_shape(module.weight) == (4, 3)
    flagged = {name for name, p in module.named_parameters() if getattr(p, "sequence_parallel", False)}
    assert flagged == ({"norm"} if sequence_parallel else set())
    assert [name for name, p in module.named_parameters() if hasattr(p, "tensor_model_parallel")] == ["weight"]


def test_a_module_of_another_shape_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"x.weight: module has \(2, 3\), blueprint \(4, 3\)"):
        name_parameters(Tiny(0), "x", SPECS, tensor=Axis.single("tensor"))
