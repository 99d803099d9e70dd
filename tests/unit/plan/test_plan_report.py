"""Plans of whole configurations: the numbers of the tutorial, what fits, and the words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_ds import plan
from internlm_ds.plan.report import Plan, gigabytes
from internlm_ds.runspec import RunSpec
from internlm_ds.translate import translate
from internlm_ds.translate.optimizer_kind import block_numel

SpecOf = Callable[..., RunSpec]


def plan_of(spec: RunSpec, *overlays: Path) -> Plan:
    return plan.describe(spec, translate(spec, overlays=overlays))


def part(found: Plan, name: str, stage: int = 0) -> int:
    return next(c.nbytes for c in found.stages[stage].components if c.name == name)


def test_the_tutorials_model_on_8_ranks(spec_of: SpecOf) -> None:
    found = plan_of(spec_of(config="7b", world_size=8))
    assert found.num_params == found.stages[0].numel == 7_321_948_160
    assert found.batch.tokens_per_step == 131_072
    assert part(found, "weights") == part(found, "gradients") == 2 * found.num_params
    assert part(found, "fp32 master weights") == 4 * found.num_params // 8
    assert part(found, "Adam moments") == 8 * found.num_params // 8
    # gradients are reduced where they lie
    assert all(component.name != "reduction buffer" for component in found.stages[0].components)
    assert part(found, "own gradients in fp32") == 4 * found.num_params // 8
    assert found.fits and 60e9 < found.peak_bytes < 80e9
    assert not found.alternatives


def test_bf16_sums_in_fp32_and_names_the_override(spec_of: SpecOf) -> None:
    found = plan_of(spec_of("model.dtype=torch.bfloat16", config="7b", world_size=8))
    assert found.num_params and part(found, "gradients") == 4 * found.num_params
    assert not found.fits
    changes = {alternative.change: alternative.peak_bytes for alternative in found.alternatives}
    override = 'deepspeed = dict(data_types=dict(grad_accum_dtype="bf16"))'
    assert changes[override] < 80e9 < found.peak_bytes
    assert changes["--set model.checkpoint=True"] < found.peak_bytes
    text = plan.render(found)
    assert "does NOT fit" in text and f"with {override}: " in text


def test_alternatives_hold_what_they_promise(spec_of: SpecOf) -> None:
    found = plan_of(spec_of("model.dtype=torch.bfloat16", config="7b", world_size=8))
    for alternative in found.alternatives:
        if alternative.change.startswith("--set"):
            overrides = [item for item in alternative.change.split() if item != "--set"]
            changed = plan_of(spec_of("model.dtype=torch.bfloat16", *overrides, config="7b", world_size=8))
        elif alternative.change.startswith("--overlay"):
            overlay = Path(__file__).resolve().parents[3] / alternative.change.split()[1]
            changed = plan_of(spec_of("model.dtype=torch.bfloat16", config="7b", world_size=8), overlay)
        else:
            fragment = "deepspeed={'data_types': {'grad_accum_dtype': 'bf16'}}"
            changed = plan_of(spec_of("model.dtype=torch.bfloat16", fragment, config="7b", world_size=8))
        assert changed.peak_bytes == alternative.peak_bytes, alternative.change


def test_stages_hold_all_parameters_and_fewer_micro_batches_the_later_they_are(spec_of: SpecOf) -> None:
    spec = spec_of(config="20b", world_size=32)
    found = plan_of(spec)
    assert len(found.stages) == 4
    assert sum(stage.numel for stage in found.stages) == found.num_params
    assert [stage.layers for stage in found.stages] == [(0, 16), (16, 31), (31, 46), (46, 63)]
    activations = [part(found, "activations of blocks", stage) for stage in range(4)]
    assert activations == [activations[3] * n for n in (4, 3, 2, 1)]
    assert part(found, "pipeline messages") == 4 * 2 * 4096 * 5120
    assert found.fits


def test_recomputed_blocks_keep_their_input_only(spec_of: SpecOf) -> None:
    none = plan_of(spec_of(config="7b", world_size=8))
    half = plan_of(spec_of("model.checkpoint=0.5", config="7b", world_size=8))
    whole = plan_of(spec_of("model.checkpoint=True", config="7b", world_size=8))
    assert part(half, "activations of blocks") * 2 == part(none, "activations of blocks")
    assert part(half, "inputs of recomputed blocks") == 16 * 2 * 4096 * 4096
    assert "activations of blocks" not in {c.name for c in whole.stages[0].components}
    assert whole.peak_bytes < half.peak_bytes < none.peak_bytes


def test_without_sharing_states_are_whole(spec_of: SpecOf) -> None:
    found = plan_of(spec_of("parallel.zero1=1", world_size=4))
    assert found.num_params and part(found, "Adam moments") == 8 * found.num_params


def test_offload_moves_states_to_the_host(spec_of: SpecOf) -> None:
    overlay = Path(__file__).resolve().parents[3] / "ds_configs/overlays/offload_optimizer_cpu.json"
    found = plan_of(spec_of(config="7b", world_size=8), overlay)
    names = {component.name for component in found.stages[0].components}
    assert not {"fp32 master weights", "Adam moments"} & names
    assert found.num_params and found.stages[0].host_bytes == 16 * found.num_params // 8
    assert "in host memory" in plan.render(found)


def test_states_in_bf16(spec_of: SpecOf) -> None:
    overlay = Path(__file__).resolve().parents[3] / "ds_configs/overlays/offload_optimizer_cpu.json"
    asked = ("model.dtype=torch.bfloat16", "internlm_ds.moments_dtype=bfloat16")
    moments = spec_of(*asked, config="7b", world_size=8)
    found = plan_of(moments)
    assert part(found, "Adam moments") == part(found, "fp32 master weights") == 4 * found.num_params // 8
    assert part(found, "update in fp32") == 16 * block_numel("cuda")
    assert plan_of(moments, overlay).stages[0].host_bytes == 12 * found.num_params // 8
    both = plan_of(spec_of(*asked, "internlm_ds.masters_dtype=bfloat16", config="7b", world_size=8))
    assert part(both, "update in fp32") == 20 * block_numel("cuda")
    assert not any(component.name == "fp32 master weights" for component in both.stages[0].components)
    alone = plan_of(spec_of(*asked, "internlm_ds.masters_dtype=bfloat16", config="7b", world_size=1))
    changes = " ".join(alternative.change for alternative in alone.alternatives)
    assert changes and "grad_accum_dtype" not in changes and "offload" not in changes, "these are refused"


def test_bf16_without_immediate_update_keeps_a_second_gradient(spec_of: SpecOf) -> None:
    name = "gradients of one micro-batch"
    now = plan_of(spec_of("model.dtype=torch.bfloat16"))
    later = plan_of(spec_of("model.dtype=torch.bfloat16", "deepspeed={'bf16': {'immediate_grad_update': False}}"))
    assert part(now, name) < part(later, name)
    fp16 = plan_of(spec_of("model.dtype=torch.float16", "deepspeed={'data_types': {'grad_accum_dtype': 'fp32'}}"))
    assert fp16.num_params and part(fp16, name) == 2 * fp16.num_params


def test_text_says_what_a_dry_run_must_say(spec_of: SpecOf) -> None:
    text = plan.render(plan_of(spec_of(config="7b", world_size=8)))
    for words in (
        "7b.py on 8 ranks",
        "pipeline 1 x data 8 x tensor 1",
        "all 8 data-parallel ranks",
        "7,321,948,160 parameters on a rank",
        "131,072 tokens a step",
        "summed in fp16",
        "fits",
    ):
        assert words in text
    ramp = plan.render(plan_of(spec_of(config="20b", world_size=32)))
    assert "ramp-up   4, 8, 12, 16 micro-batches, full size after 1500 steps" in ramp


@pytest.mark.parametrize(
    ("config", "world_size"),
    [("7b", 8), ("7b_internlm2", 8), ("7b_llama2", 8), ("20b", 32), ("debug_cpu", 1), ("demo", 2)],
)
def test_json_is_strict_and_adds_up(spec_of: SpecOf, config: str, world_size: int) -> None:
    data = json.loads(json.dumps(plan.as_json(plan_of(spec_of(config=config, world_size=world_size))), allow_nan=False))
    assert data["world_size"] == world_size
    for stage in data["stages"]:
        for phase, total in stage["phases"].items():
            assert total == sum(c["bytes"] for c in stage["components"] if c["phase"] in ("always", phase))
        assert stage["peak_bytes"] == max(stage["phases"].values())
    assert data["peak_bytes"] == max(stage["peak_bytes"] for stage in data["stages"])


def test_a_registered_model_has_no_memory_on_paper(spec_of: SpecOf) -> None:
    from dataclasses import replace

    spec = replace(spec_of(), arch=None)
    found = plan.describe(spec, translate(spec))
    assert found.stages == () and found.peak_bytes == 0
    assert "memory: unknown" in plan.render(found)


def test_gigabytes() -> None:
    assert gigabytes(80_000_000_000) == "80.00 GB"
