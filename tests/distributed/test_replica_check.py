"""Copies of parameters that drift apart are found, named, and on all ranks; equal ones pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internlm_ds.errors import ReplicasDifferError
from internlm_ds.layout.ranks import Layout
from internlm_ds.parallel.replicas import COLUMNS, ReplicaCheck, bit_hash
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(120)

WEIGHTS = torch.arange(1, 2 * COLUMNS, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 1000, 5 * COLUMNS + 3])
def test_one_bit_changes_the_hash(dtype: torch.dtype, numel: int):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    whole = bit_hash(tensor, WEIGHTS)
    assert bit_hash(tensor.clone(), WEIGHTS) == whole
    for place in {0, numel // 2, numel - 1}:
        other = tensor.clone()
        other[place] = torch.nextafter(other[place], torch.full((), torch.inf, dtype=dtype))
        assert bit_hash(other, WEIGHTS) != whole
    if numel > 1:
        assert bit_hash(tensor.roll(1), WEIGHTS) != whole, "elements in another order"


def test_nan_is_bits_like_all_others():
    nan = torch.full((3,), torch.nan)
    assert bit_hash(nan, WEIGHTS) == bit_hash(nan.clone(), WEIGHTS) != bit_hash(torch.zeros(3), WEIGHTS)


# (layout, rank whose copy changes, parameter, what the error says of it)
DRIFTS = {
    "data2": (Layout(data=2, zero=2), 1, "blocks.0.mlp.w1.weight", "blocks.0.mlp.w1.weight: rank 0; rank 1 differ"),
    "data4": (Layout(data=4, zero=1), 2, "norm.weight", "norm.weight: ranks 0, 1, 3; rank 2 differ"),
    "tensor2-norm": (Layout(tensor=2), 0, "blocks.1.norm1.weight", "blocks.1.norm1.weight: rank 0; rank 1 differ"),
    "tensor2-data2-shard": (
        Layout(data=2, tensor=2, zero=1),
        3,
        "blocks.0.mixer.Wqkv.weight",
        "blocks.0.mixer.Wqkv.weight (part 2 of 2): rank 1; rank 3 differ",
    ),
    "tensor2-data2-bias-of-rank-0": (
        Layout(data=2, tensor=2, zero=1),
        2,
        "blocks.1.mixer.out_proj.bias",
        "blocks.1.mixer.out_proj.bias: rank 0; rank 2 differ",
    ),
    "pipe2-data2": (
        Layout(pipe=2, data=2, zero=1),
        3,
        "blocks.3.norm2.weight",
        "blocks.3.norm2.weight: rank 2; rank 3 differ",
    ),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_a_changed_copy_is_found(name: str, tmp_path: Path):
    from internlm_ds.verify.case import Case

    layout, rank, parameter, said = DRIFTS[name]
    case = Case(layout=layout, steps=2)
    answers = run_ranks(_train_and_drift, layout, case.write(tmp_path), case, rank, parameter)
    (text,) = set(answers)
    assert text.splitlines()[1:] == [f"  {said}"]
    assert text.startswith("copies of 1 parameter are no longer equal") and "internlm_ds.guard.drift_every" in text


def _train_and_drift(context, path: str, case, rank: int, parameter: str) -> str:
    """Two steps and a look, which finds nothing; one bit changes; another look. Returns what it says."""
    from internlm_ds.parallel.comm import ProcessComm
    from internlm_ds.verify.training import build_engine, take_steps

    spec, engine, _ = build_engine(context, path)
    replicas = ReplicaCheck(engine.logical_parameters(), comm=ProcessComm())
    take_steps(context, spec, engine, case, after_step=lambda step: replicas.check())
    if context.rank == rank:
        weight = dict(engine.logical_parameters())[parameter].data.view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))
    try:
        replicas.check()
    except ReplicasDifferError as error:
        assert error.exit_code == 3 and error.on_all_ranks
        return str(error)
    return "nothing found"


def test_layouts_without_copies_compare_nothing(tmp_path: Path):
    assert run_ranks(_num_compared, Layout(pipe=2)) == [0, 0]
    assert run_ranks(_num_compared, Layout()) == [0]


def _num_compared(context) -> int:
    from internlm_ds.parallel.comm import ProcessComm

    own = [(f"blocks.{context.rank}.weight", torch.nn.Parameter(torch.zeros(2)))]
    replicas = ReplicaCheck(own, comm=ProcessComm())
    replicas.check()
    return len(replicas.keys)


def test_many_differences_are_counted():
    texts = run_ranks(_all_differ, Layout(data=3))
    assert len(set(texts)) == 1 and texts[0].splitlines()[-1] == "  and 12 more"
    assert texts[0].splitlines()[1] == "  p0: rank 0; rank 1; rank 2 differ"


def _all_differ(context) -> str:
    from internlm_ds.parallel.comm import ProcessComm

    own = [(f"p{i}", torch.nn.Parameter(torch.full((2,), float(context.rank)))) for i in range(20)]
    try:
        ReplicaCheck(own, comm=ProcessComm()).check()
    except ReplicasDifferError as error:
        return str(error)
    return "nothing found"
