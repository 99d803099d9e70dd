"""The ladder on paper: which claims there are for so many ranks, and that each is a configuration that comes out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from internlm_ds.arch.internlm import mlp_width
from internlm_ds.layout.ranks import Layout
from internlm_ds.runspec import resolve
from internlm_ds.translate import translate
from internlm_ds.verify.ladder import ladder, layouts


def names(ranks: int, *, quick: bool = False) -> list[str]:
    return [claim.name for claim in ladder(ranks, quick=quick)]


def test_one_rank():
    assert names(1) == ["one process num_chunks=2", "one process checkpoint=0.5", "one process checkpoint=1"]
    assert names(1, quick=True) == names(1)


def test_two_ranks():
    both = ("checkpoint=1", "unpacked", "bfloat16")
    assert names(2) == [
        *("pipeline=2", "pipeline=2 num_chunks=2", "pipeline=2 zb-h1", "pipeline=2 checkpoint=0.5"),
        *(f"pipeline=2 {feature}" for feature in both),
        *("tensor=2", "tensor=2 sequence_parallel", *(f"tensor=2 {feature}" for feature in both)),
        *("data=2", "data=2 zero1=1", *(f"data=2 {feature}" for feature in both)),
    ]


def test_four_ranks_mix_the_axes_and_share_states_in_part():
    found = names(4)
    for name in ("pipeline=2", "tensor=2", "data=2", "pipeline=4", "tensor=4", "data=4"):
        assert name in found
    for name in ("tensor=2 pipeline=2 sequence_parallel", "data=2 pipeline=2 num_chunks=2", "data=2 tensor=2 bfloat16"):
        assert name in found
    assert [name for name in found if "zero1=2" in name] == ["data=4 zero1=2"]
    assert found.index("tensor=4") < found.index("data=2 tensor=2")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16])
def test_layouts_are_those_that_ranks_allow(ranks: int):
    found = layouts(ranks)
    assert found[0] == Layout() and len(set(found)) == len(found)
    assert all(ranks % layout.world_size == 0 and layout.zero == layout.data for layout in found)
    assert {Layout(pipe=ranks), Layout(data=ranks, zero=ranks)} <= set(found)
    assert (Layout(tensor=ranks) in found) == (ranks in (1, 2, 4, 8, 16))


def test_eight_ranks_have_all_three_axes():
    assert "data=2 tensor=2 pipeline=2 zb-h1" in names(8) and "tensor=8 sequence_parallel" in names(8)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_quick_tries_each_layout_of_all_ranks_and_each_feature_once(ranks: int):
    whole, quick = ladder(ranks), ladder(ranks, quick=True)
    assert {claim.feature for claim in quick} == {claim.feature for claim in whole}
    assert {claim.name for claim in quick} <= {claim.name for claim in whole}
    features = [claim.feature for claim in quick if claim.feature]
    assert len(features) == len(set(features))
    assert all(claim.case.layout.world_size == ranks for claim in quick)
    assert quick[0].case.steps < whole[0].case.steps


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_names_are_unique_and_claims_share_few_single_processes(ranks: int):
    claims = ladder(ranks)
    assert len({claim.name for claim in claims}) == len(claims)
    assert len({claim.case.alone() for claim in claims}) == (1 if ranks == 1 else 3)


@pytest.mark.parametrize("ranks", [1, 3, 4, 8])
def test_every_claim_is_a_run_that_starts(ranks: int, tmp_path: Path):
    for claim in ladder(ranks):
        case = claim.case
        spec = resolve(case.write(tmp_path), world_size=case.layout.world_size)
        assert spec.layout == case.layout, claim.name
        assert spec.batch.micro_num == case.micro_batches // case.layout.data
        assert mlp_width(spec.config.model) % case.layout.tensor == 0
        assert spec.config.data.use_packed_dataset == case.packed
        translate(spec)
        resolve(case.alone().write(tmp_path), world_size=1)


def test_features_reach_the_configuration(tmp_path: Path):
    claims = {claim.feature: claim.case for claim in ladder(4)}

    def config(feature: str):
        case = claims[feature]
        return resolve(case.write(tmp_path), world_size=case.layout.world_size).config

    assert config("sequence_parallel").parallel.tensor.mode == "msp"
    assert config("zb-h1").internlm_ds.pipeline_schedule == "zb-h1"
    assert config("num_chunks=2").model.num_chunks == 2
    assert config("checkpoint=0.5").model.checkpoint == 0.5
    assert config("bfloat16").model.dtype == "bfloat16"
    assert not config("unpacked").data.use_packed_dataset


def test_the_ladder_needs_no_torch():
    script = "import sys, internlm_ds.verify.ladder as l; l.ladder(4); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
