"""A user's own DeepSpeed keys: merging, unknown names at any depth, conflicts, files that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm_ds.errors import TranslationError
from internlm_ds.runspec import RunSpec
from internlm_ds.translate import ds_schema, examine, overlay, translate

SpecOf = Callable[..., RunSpec]
OVERLAYS = Path(__file__).resolve().parents[3] / "ds_configs" / "overlays"


def problems_of(spec: RunSpec, *files: Path) -> dict[str, str]:
    with pytest.raises(TranslationError) as error:
        translate(spec, overlays=files)
    return {problem.key: problem.message for problem in error.value.problems}


def with_dict(spec_of: SpecOf, fragment: dict[str, Any], *more: str, **kwargs: Any) -> RunSpec:
    return spec_of(f"deepspeed={fragment!r}", *more, **kwargs)


# ---- merging --------------------------------------------------------------------------------------


def test_a_users_keys_are_merged_and_noted(spec_of: SpecOf) -> None:
    spec = with_dict(spec_of, {"zero_optimization": {"round_robin_gradients": True}, "memory_breakdown": True})
    translation = translate(spec)
    assert translation.ds_config["zero_optimization"]["round_robin_gradients"] is True
    assert translation.ds_config["zero_optimization"]["stage"] == 1
    notes = {note.source: note for note in translation.notes}
    note = notes["deepspeed.zero_optimization.round_robin_gradients"]
    assert (note.fidelity, note.target) == ("exact", "zero_optimization.round_robin_gradients")
    assert notes["deepspeed.memory_breakdown"].target == "memory_breakdown"


def test_overlays_come_after_the_dict_in_order(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = with_dict(spec_of, {"steps_per_print": 1, "memory_breakdown": True})
    first, second = tmp_path / "a.json", tmp_path / "b.yaml"
    first.write_text('{"steps_per_print": 2, "dump_state": true}')
    second.write_text("steps_per_print: 3\n")
    found = translate(spec, overlays=[first, second]).ds_config
    assert (found["steps_per_print"], found["dump_state"], found["memory_breakdown"]) == (3, True, True)
    assert translate(spec, overlays=[second, first]).ds_config["steps_per_print"] == 2


def test_the_dtype_of_sums_can_be_chosen(spec_of: SpecOf) -> None:
    half = {"data_types": {"grad_accum_dtype": "bf16"}}
    spec = with_dict(spec_of, half, "model.dtype=torch.bfloat16")
    translation = translate(spec)
    assert translation.grad_accum_dtype == "bf16"
    assert "accumulate in bf16" in next(n.reason for n in translation.notes if n.source == "model.dtype")
    wide = with_dict(spec_of, {"data_types": {"grad_accum_dtype": "fp32"}}, "model.dtype=torch.float16")
    assert translate(wide).grad_accum_dtype == "fp32"


def test_translation_does_not_change_the_configuration(spec_of: SpecOf) -> None:
    spec = with_dict(spec_of, {"zero_optimization": {"round_robin_gradients": True}})
    before = json.dumps(spec.config.deepspeed)
    translate(spec, overlays=[OVERLAYS / "timers.json"])
    assert json.dumps(spec.config.deepspeed) == before


@pytest.mark.parametrize("path", sorted(OVERLAYS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_overlays(spec_of: SpecOf, path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    spec = spec_of("model.dtype=torch.bfloat16")
    ds_config = translate(spec, overlays=[path]).ds_config
    fragment = json.loads(path.read_text())
    assert overlay.merge(ds_config, fragment) == ds_config
    DeepSpeedConfig(ds_config)
    assert path.name in (OVERLAYS.parent / "README.md").read_text(encoding="utf-8")


# ---- unknown names and wrong kinds ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fragment", "key", "words"),
    [
        ({"gradient_clippin": 1}, "deepspeed.gradient_clippin", "did you mean gradient_clipping?"),
        (
            {"zero_optimization": {"round_robin_gradient": True}},
            "deepspeed.zero_optimization.round_robin_gradient",
            "no such key in zero_optimization; did you mean round_robin_gradients?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.devise",
            "did you mean device?",
        ),
        ({"zzz": 1}, "deepspeed.zzz", "DeepSpeed 0.19.8 knows no such key"),
        ({"amp": {"enabled": True}}, "deepspeed.amp", "was removed from DeepSpeed"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "deepspeed.zero_optimization.mics_shard_size", "was removed"),
        ({"zero_optimization": 1}, "deepspeed.zero_optimization", "a mapping is needed"),
        ({"memory_breakdown": "yes"}, "deepspeed.memory_breakdown", "must be true or false"),
        ({"steps_per_print": "often"}, "deepspeed.steps_per_print", "must be an integer"),
        ({"steps_per_print": True}, "deepspeed.steps_per_print", "must be an integer"),
        ({"comms_logger": {"prof_ops": "all"}}, "deepspeed.comms_logger.prof_ops", "must be a list"),
        ({"communication_data_type": "fp8"}, "deepspeed.communication_data_type", "must be one of 'fp32'"),
        ({"log_level": 3}, "deepspeed.log_level", "must be a string"),
        ({"log_level": "loud"}, "deepspeed.log_level", "must be one of 'debug'"),
        ({"gradient_predivide_factor": "1"}, "deepspeed.gradient_predivide_factor", "must be a number"),
    ],
)
def test_wrong_keys_of_the_dict(spec_of: SpecOf, fragment: dict[str, Any], key: str, words: str) -> None:
    found = problems_of(with_dict(spec_of, fragment))
    assert list(found) == [key]
    assert words in found[key]


def test_infinity_is_no_json(spec_of: SpecOf, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("gradient_predivide_factor: .inf\n")
    assert "no infinity" in problems_of(spec_of(), file)[f"{file}: gradient_predivide_factor"]


def test_problems_of_files_name_the_file(spec_of: SpecOf, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimisation": {"stage": 1}, "train_batch_size": 1}')
    found = problems_of(spec_of(), file)
    assert "did you mean zero_optimization?" in found[f"{file}: zero_optimisation"]
    assert "data.micro_bsz" in found[f"{file}: train_batch_size"]


def test_a_wrong_section_refuses_all_leaves_below_it(spec_of: SpecOf) -> None:
    _, problems = examine(with_dict(spec_of, {"zero_optimisation": {"stage": 1}}))
    translation, _ = examine(with_dict(spec_of, {"zero_optimisation": {"stage": 1}}))
    assert [problem.key for problem in problems] == ["deepspeed.zero_optimisation"]
    assert translation.refused_sources == {"deepspeed.zero_optimisation.stage"}


def test_metric_names_in_open_sections_are_free() -> None:
    assert not overlay.check({"optimizer": {"params": {"x": 1}}}, base={"optimizer": {"params": {"x": 1}}}, prefix="")


# ---- conflicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(overlay.GUARDS))
def test_every_guard_names_a_key_that_exists(key: str) -> None:
    section: Any = ds_schema.KEYS
    for name in key.split("."):
        assert name in section
        section = section[name]
    assert overlay.GUARDS[key].reason


@pytest.mark.parametrize(
    ("fragment", "key", "words"),
    [
        ({"train_batch_size": 7}, "train_batch_size", "data.micro_num"),
        ({"gradient_clipping": 0.1}, "gradient_clipping", "set that instead"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", "must be 1"),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm", "must be false"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
            "cpu or none",
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param", "stage 3"),
        ({"pipeline": {"pipe_partitioned": True}}, "pipeline.pipe_partitioned", "cannot be partitioned"),
        ({"pipeline": {"use_reentrant": True}}, "pipeline.use_reentrant", "must be false"),
        (
            {"pipeline": {"activation_checkpoint_interval": 1}},
            "pipeline.activation_checkpoint_interval",
            "model.checkpoint",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "set adam.*"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "lr_scheduler"),
        ({"fp16": {"enabled": True}}, "fp16", "model.dtype"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast", "model.dtype"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler", "profiles nothing"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing", "model.checkpoint"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint", "ckpt.*"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation", "must be true"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "must be mean"),
        ({"compile": {"deepcompile": True}}, "compile", "DeepCompile"),
    ],
)
def test_conflicts_are_refused(spec_of: SpecOf, fragment: dict[str, Any], key: str, words: str) -> None:
    found = problems_of(with_dict(spec_of, fragment))
    assert list(found) == [f"deepspeed.{key}"]
    assert words in found[f"deepspeed.{key}"]


@pytest.mark.parametrize(
    "fragment",
    [
        {"zero_optimization": {"stage": 1, "overlap_comm": False}},
        {"gradient_clipping": 1.0, "train_batch_size": 4},
        {"pipeline": {"use_reentrant": False}},
        {"flops_profiler": {"enabled": False}},
        {"managed_gradient_accumulation": True},
        {"zero_optimization": {"offload_param": None}},
    ],
)
def test_repeating_what_is_so_anyway_is_fine(spec_of: SpecOf, fragment: dict[str, Any]) -> None:
    translate(with_dict(spec_of, fragment))


def test_precision_cannot_be_changed_behind_the_configuration(spec_of: SpecOf) -> None:
    assert "model.dtype" in problems_of(with_dict(spec_of, {"bf16": {"enabled": True}}))["deepspeed.bf16.enabled"]
    bf16 = "model.dtype=torch.bfloat16"
    found = problems_of(with_dict(spec_of, {"bf16": {"check_grad_overflow": False}}, bf16))
    assert "must be true" in found["deepspeed.bf16.check_grad_overflow"]
    translate(with_dict(spec_of, {"bf16": {"immediate_grad_update": False}}, bf16))
    for theirs, ours in (("bf16_master_weights_and_grads", "masters"), ("bf16_optimizer_states", "moments")):
        found = problems_of(with_dict(spec_of, {"bf16": {theirs: True}}, bf16))
        assert f"write internlm_ds.{ours}_dtype instead" in found[f"deepspeed.bf16.{theirs}"]
    found = problems_of(with_dict(spec_of, {"data_types": {"grad_accum_dtype": "fp16"}}, bf16))
    assert "bf16 gradients are summed in bf16 or fp32" in found["deepspeed.data_types.grad_accum_dtype"]
    found = problems_of(with_dict(spec_of, {"bf16": {"immediate_grad_update": True}}))
    assert "not torch.bfloat16" in found["deepspeed.bf16"]


# ---- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "line 1: not JSON"),
        ("a.json", "[1]", "holds list, a mapping"),
        ("a.yaml", "a: [1", "not YAML"),
        ("a.yml", "just words", "holds str, a mapping"),
        ("a.json", None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(spec_of: SpecOf, tmp_path: Path, name: str, text: str | None, words: str) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(TranslationError, match=words) as error:
        translate(spec_of(), overlays=[file])
    assert str(file) in str(error.value)
