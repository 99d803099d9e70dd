"""The translation of whole configurations: every key once, honest fidelities, a JSON that DeepSpeed takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internlm_ds.config.schema import Leaf
from internlm_ds.errors import TranslationError
from internlm_ds.runspec import RunSpec
from internlm_ds.translate import Note, examine, translate
from internlm_ds.translate.deepspeed import RULES
from internlm_ds.translate.provenance import MEANING, plain
from internlm_ds.translate.rules import find

SpecOf = Callable[..., RunSpec]

PRECISIONS = ("torch.float32", "torch.tf32", "torch.bfloat16", "torch.float16")


def note_of(spec: RunSpec, key: str) -> Note:
    translation, _ = examine(spec)
    return next(note for note in translation.notes if note.source == key)


def refusal(spec: RunSpec, key: str) -> str:
    """The message about a key in the error, which the report must repeat."""
    with pytest.raises(TranslationError) as error:
        translate(spec)
    assert error.value.exit_code == 2
    found = [problem for problem in error.value.problems if problem.key == key]
    assert found, f"{key} is not among {[p.key for p in error.value.problems]}"
    assert note_of(spec, key).fidelity == "refused"
    assert note_of(spec, key).reason == found[0].message
    return found[0].message


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("flash", "model.dtype=torch.float32", "have no float32"),
        ("varlen", "model.dtype=torch.tf32", "have no float32"),
        ("varlen", "model.hidden_size=2048", "heads of up to 256, these have 512"),
        ("varlen", "model.attn_drop_rate=0.1", "drops no attention weights (model.attn_drop_rate = 0.1)"),
    ],
)
def test_a_kernel_that_runs_nowhere_is_refused(spec_of: SpecOf, name: str, override: str, words: str) -> None:
    message = refusal(
        spec_of("model.dtype=torch.bfloat16", f"internlm_ds.attention={name}", override), "internlm_ds.attention"
    )
    assert words in message and '"auto", "sdpa" and "reference" can' in message


# ---- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["7b", "7b_internlm2", "7b_llama2", "20b", "debug_cpu", "demo"])
def test_every_leaf_has_one_note(spec_of: SpecOf, config: str) -> None:
    spec = spec_of(config=config, world_size=8)
    translation = translate(spec)
    assert [note.source for note in translation.notes] == [leaf.source for leaf in spec.leaves]
    assert len({note.source for note in translation.notes}) == len(translation.notes)
    for note in translation.notes:
        assert note.fidelity in MEANING
        assert note.fidelity == "exact" or note.reason
        assert note.fidelity != "exact" or note.target
        json.dumps(note.as_json(), allow_nan=False)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_no_key_lacks_a_rule(spec_of: SpecOf, dtype: str) -> None:
    spec = spec_of(f"model.dtype={dtype}")
    missing = [leaf.key for leaf in spec.leaves if not leaf.helper and find(RULES, leaf.key) is None]
    assert not missing


def test_targets_exist_in_the_json(spec_of: SpecOf) -> None:
    for dtype in PRECISIONS:
        translation = translate(spec_of(f"model.dtype={dtype}"))
        for note in translation.notes:
            section: Any = translation.ds_config
            for name in (note.target or "").split(".") if note.target else ():
                assert name in section, f"{note.source} -> {note.target}"
                section = section[name]


def test_a_key_nobody_knows_is_refused_rather_than_dropped(spec_of: SpecOf) -> None:
    spec = spec_of()
    spec = replace(spec, leaves=(*spec.leaves, Leaf("data.future.key", 1, "file", 3), Leaf("future", 1, "file", 4)))
    assert "does not know what to do with it" in refusal(spec, "future")


def test_infinity_in_a_note_is_a_word(spec_of: SpecOf) -> None:
    note = note_of(spec_of('ckpt.checkpoint_every=float("inf")'), "ckpt.checkpoint_every")
    assert plain(float("inf")) == "inf" and plain(float("-inf")) == "-inf" and plain(float("nan")) == "nan"
    json.dumps(note.as_json(), allow_nan=False)


def test_helper_constants_have_no_effect(spec_of: SpecOf) -> None:
    note = note_of(spec_of(config="7b", world_size=8), "VOCAB_SIZE")
    assert (note.fidelity, note.target) == ("no_effect", None)
    assert note.reason.startswith("value used by")


# ---- the JSON -------------------------------------------------------------------------------------


class OneAxis:
    """As much of DeepSpeed's mpu as its configuration asks for."""

    def __init__(self, data: int):
        self.data = data

    def get_data_parallel_world_size(self) -> int:
        return self.data


@pytest.fixture
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda *args, **kwargs: 0)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("config", "world_size"), [("7b", 8), ("20b", 32), ("20b", 4), ("debug_cpu", 1), ("debug_cpu", 6), ("demo", 2)]
)
def test_deepspeed_accepts_the_json(spec_of: SpecOf, rank_zero: None, config: str, world_size: int, dtype: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    spec = spec_of(f"model.dtype={dtype}", config=config, world_size=world_size)
    ds_config = json.loads(json.dumps(translate(spec).ds_config, allow_nan=False))
    read = DeepSpeedConfig(ds_config, OneAxis(spec.layout.data))
    assert read.train_batch_size == spec.batch.sequences_per_step
    assert read.train_micro_batch_size_per_gpu == spec.config.data.micro_bsz
    assert read.gradient_accumulation_steps == spec.config.data.micro_num
    assert read.zero_optimization_stage == 1
    assert not read.zero_config.overlap_comm
    assert read.pipeline["use_reentrant"] is False
    assert read.pipeline["pipe_partitioned"] is False and read.pipeline["grad_partitioned"] is False
    assert isinstance(read.steps_per_print, int)
    assert read.optimizer_name is None and read.scheduler_name is None
    assert read.wall_clock_breakdown is False
    assert read.float16_config.enabled == (dtype == "torch.float16")
    assert read.bfloat16_config.enabled == (dtype == "torch.bfloat16")


def test_nothing_of_ours_reaches_the_json(spec_of: SpecOf) -> None:
    from internlm_ds.translate import ds_schema

    spec = spec_of(
        "internlm_ds.guard={'max_bad_steps': 3, 'drift_every': 5}", "internlm_ds.compat.no_clip_in_fp32=True"
    )
    assert note_of(spec, "internlm_ds.guard.drift_every").fidelity == "native"
    assert set(translate(spec).ds_config) <= set(ds_schema.KEYS)


def test_fp16_numbers(spec_of: SpecOf) -> None:
    spec = spec_of(
        "model.dtype=torch.float16",
        "grad_scaler.fp16.initial_scale=1000",
        "grad_scaler.fp16.min_scale=None",
        "grad_scaler.fp16.growth_interval=7",
        "grad_scaler.hysteresis=0",
    )
    fp16 = translate(spec).ds_config["fp16"]
    assert fp16["initial_scale_power"] == 10 and fp16["loss_scale"] == 0
    assert (fp16["loss_scale_window"], fp16["hysteresis"], fp16["min_loss_scale"]) == (7, 1, 1)
    assert note_of(spec, "grad_scaler.fp16.initial_scale").fidelity == "native"
    assert translate(spec).grad_accum_dtype == "fp16"


def test_bf16_has_no_loss_scale_and_fp32_sums(spec_of: SpecOf) -> None:
    spec = spec_of("model.dtype=torch.bfloat16")
    translation = translate(spec)
    assert translation.ds_config["bf16"] == {
        "enabled": True,
        "immediate_grad_update": True,
        "check_grad_overflow": True,
    }
    assert translation.grad_accum_dtype == "fp32" and "fp16" not in translation.ds_config
    assert "accumulate in fp32" in note_of(spec, "model.dtype").reason
    scalers = [note for note in translation.notes if note.source.startswith("grad_scaler.")]
    assert len(scalers) == 7 and {note.fidelity for note in scalers} == {"approximate"}


def test_fp32_needs_no_loss_scale(spec_of: SpecOf) -> None:
    spec = spec_of()
    assert note_of(spec, "grad_scaler.hysteresis").fidelity == "no_effect"
    assert not {"fp16", "bf16"} & set(translate(spec).ds_config)
    assert "tf32" in note_of(spec_of("model.dtype=torch.tf32"), "model.dtype").reason


def test_clipping(spec_of: SpecOf) -> None:
    key = "hybrid_zero_optimizer.clip_grad_norm"
    assert note_of(spec_of(), key).target == "gradient_clipping"
    assert note_of(spec_of(), key).fidelity == "exact"
    assert translate(spec_of()).ds_config["gradient_clipping"] == 1.0
    assert translate(spec_of(f"{key}=0")).ds_config["gradient_clipping"] == 0.0
    never = spec_of("internlm_ds.compat.no_clip_in_fp32=True")
    assert translate(never).ds_config["gradient_clipping"] == 0.0
    assert note_of(never, key).fidelity == "native"
    half = spec_of("internlm_ds.compat.no_clip_in_fp32=True", "model.dtype=torch.bfloat16")
    assert translate(half).ds_config["gradient_clipping"] == 1.0


def test_reduction_buffer_is_capped_at_the_largest_stage(spec_of: SpecOf) -> None:
    key, bf16 = "hybrid_zero_optimizer.reduce_bucket_size", "model.dtype=torch.bfloat16"
    spec = spec_of(f"{key}=1000000000", bf16)
    assert spec.arch is not None
    assert translate(spec).ds_config["zero_optimization"]["reduce_bucket_size"] == spec.arch.num_params
    assert note_of(spec, key).fidelity == "approximate"
    assert str(spec.arch.num_params) in note_of(spec, key).reason
    small = spec_of(f"{key}=1000", bf16)
    assert translate(small).ds_config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert note_of(small, key).fidelity == "exact"
    two = spec_of(f"{key}=1000000000", bf16, "parallel.pipeline=2", world_size=2)
    assert translate(two).ds_config["zero_optimization"]["reduce_bucket_size"] < spec.arch.num_params


def test_there_is_no_bucket_where_gradients_are_reduced_in_place(spec_of: SpecOf, tmp_path: Path) -> None:
    key = "hybrid_zero_optimizer.reduce_bucket_size"
    for dtype in ("torch.float32", "torch.float16"):
        assert note_of(spec_of(f"{key}=1000", f"model.dtype={dtype}"), key).fidelity == "no_effect"
    overlay = tmp_path / "offload.json"
    overlay.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    notes = {note.source: note for note in translate(spec_of(f"{key}=1000"), overlays=[overlay]).notes}
    assert notes[key].fidelity == "exact"


# ---- keys whose fidelity depends on others --------------------------------------------------------


def test_zero1(spec_of: SpecOf) -> None:
    key = "parallel.zero1"
    whole = note_of(spec_of(world_size=4), key)
    assert (whole.fidelity, whole.target) == ("exact", "zero_optimization.stage")
    none = note_of(spec_of("parallel.zero1=1", world_size=4), key)
    assert none.fidelity == "native" and "gradients averaged over the 4" in none.reason
    part = note_of(spec_of("parallel.zero1=2", world_size=4), key)
    assert part.fidelity == "native" and "groups of 2 ranks" in part.reason and "2 replicas" in part.reason
    dict_form = spec_of("parallel.zero1={'size': 2, 'fsdp': False}", world_size=4)
    assert note_of(dict_form, "parallel.zero1.size").fidelity == "native"


def test_saving_switched_off_leaves_addresses_alone(spec_of: SpecOf) -> None:
    off = spec_of("ckpt.save_ckpt_folder=boto3:s3://bucket/x", "ckpt.async_upload=True")
    assert note_of(off, "ckpt.save_ckpt_folder").fidelity == "no_effect"
    assert note_of(off, "ckpt.async_upload").fidelity == "no_effect"


@pytest.mark.parametrize("address", ["volc:vc://bucket.host/x", "oss2:ali://bucket.host/x"])
def test_stores_without_s3_are_refused_where_they_are_used(spec_of: SpecOf, address: str) -> None:
    message = refusal(spec_of(f"SAVE_CKPT_FOLDER={address}", config="demo"), "ckpt.save_ckpt_folder")
    assert "boto3:s3://" in message
    info = "ckpt.load_ckpt_info={'path': '" + address + "', 'content': ('model',), 'ckpt_type': 'internlm'}"
    refusal(spec_of(info), "ckpt.load_ckpt_info.path")


def test_asynchronous_saving_is_ours(spec_of: SpecOf) -> None:
    spec = spec_of("ckpt.async_upload=True", config="demo")
    note = note_of(spec, "ckpt.async_upload")
    assert note.fidelity == "native" and "by a thread while training goes on" in note.reason
    assert not any(warning.startswith("ckpt.async_upload: ") for warning in translate(spec).warnings)


def test_foreign_checkpoint_types(spec_of: SpecOf) -> None:
    info = "ckpt.load_ckpt_info={'path': 'local:x', 'content': ('model',), 'ckpt_type': '%s'}"
    for good in ("internlm", "internevo", "normal", "native", "llama", "hf"):
        assert note_of(spec_of(info % good), "ckpt.load_ckpt_info.ckpt_type").fidelity == "native"


def test_alerts_that_are_switched_on_are_said_to_be_inactive(spec_of: SpecOf) -> None:
    spec = spec_of(
        "monitor.alert.enable_feishu_alert=True",
        "monitor.alert.feishu_alert_address=http://x",
        "monitor.alert.light_monitor_address=http://y",
    )
    for name in ("enable_feishu_alert", "feishu_alert_address", "light_monitor_address"):
        note = note_of(spec, f"monitor.alert.{name}")
        assert note.fidelity == "approximate" and "not active in this version" in note.reason
    assert len([w for w in translate(spec).warnings if w.startswith("monitor.alert.")]) == 3
    off = spec_of("monitor.alert.feishu_alert_address=http://x")
    assert note_of(off, "monitor.alert.feishu_alert_address").fidelity == "no_effect"


def test_diagnosis_warns_only_of_what_was_written(spec_of: SpecOf) -> None:
    key = "data.diag_outlier_ratio"
    assert note_of(spec_of(), key).fidelity == "approximate"
    assert not [w for w in translate(spec_of()).warnings if w.startswith(key)]
    assert [w for w in translate(spec_of(f"{key}=1.5")).warnings if w.startswith(key)]


def test_flash_attention_in_fp32_stays_fp32(spec_of: SpecOf) -> None:
    assert note_of(spec_of(), "model.use_flash_attn").fidelity == "approximate"
    assert note_of(spec_of("model.dtype=torch.bfloat16"), "model.use_flash_attn").fidelity == "native"
    assert note_of(spec_of("model.use_flash_attn=False"), "model.use_flash_attn").fidelity == "native"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.apply_post_layer_norm", "True", "InternLM v1 has no such block"),
        ("model.is_reward", "True", "reward models"),
        ("parallel.zero1", "{'size': -1, 'fsdp': True}", "fsdp"),
        ("lr_scheduler.last_epoch", "3", "last_epoch=-1"),
    ],
)
def test_what_this_version_lacks_is_refused(spec_of: SpecOf, key: str, value: str, words: str) -> None:
    spec = spec_of(f"{key}={value}")
    source = f"{key}.fsdp" if key == "parallel.zero1" else key
    assert words in refusal(spec, source)


@pytest.mark.parametrize(
    ("overrides", "mode", "words"),
    [
        (["parallel.tensor=2"], "mtp", "whole on every rank"),
        (["parallel.tensor=2", "parallel.sequence_parallel=True"], "msp", "split along tokens"),
        (["parallel.tensor={'size': 2, 'mode': 'fsp'}"], "fsp", "runs as msp"),
    ],
)
def test_tensor_ranks_are_ours(spec_of: SpecOf, overrides: list[str], mode: str, words: str) -> None:
    spec = spec_of(*overrides, world_size=2)
    assert (spec.layout.tensor, spec.config.parallel.tensor.mode) == (2, mode)
    found = note_of(spec, "parallel.tensor.mode")
    assert found.fidelity == "native" and words in found.reason
    assert note_of(spec, "parallel.tensor.size" if mode == "fsp" else "parallel.tensor").fidelity == "native"
    assert note_of(spec, "model.parallel_output").fidelity == "native"
    sequence = note_of(spec, "parallel.sequence_parallel")
    assert sequence.fidelity == ("no_effect" if mode == "mtp" else "native")


def test_isp_is_refused_with_what_to_use_instead(spec_of: SpecOf) -> None:
    spec = spec_of("parallel.tensor={'size': 2, 'mode': 'isp'}", world_size=2)
    assert refusal(spec, "parallel.tensor.mode").endswith('write mode="msp"')


def test_neutral_modes_have_no_effect(spec_of: SpecOf) -> None:
    spec = spec_of("parallel.tensor={'size': 1, 'mode': 'msp'}")
    assert note_of(spec, "parallel.tensor.mode").fidelity == "no_effect"


@pytest.mark.parametrize(
    ("key", "overrides", "fidelity", "words"),
    [
        ("model.num_chunks", ["model.num_chunks=2"], "native", "2 runs of layers per stage"),
        ("model.num_chunks", ["model.num_chunks=1"], "no_effect", "one chunk per stage"),
        ("parallel.pipeline.interleaved_overlap", ["model.num_chunks=2"], "native", "one forward or backward pass"),
        ("parallel.pipeline.interleaved_overlap", ["model.num_chunks=1"], "no_effect", "one stage or one chunk"),
        ("internlm_ds.pipeline_schedule", ["internlm_ds.pipeline_schedule=1f1b"], "native", "our 1F1B"),
        ("internlm_ds.attention", ["internlm_ds.attention=auto"], "no_effect", "model.use_flash_attn says"),
        ("internlm_ds.attention", ["internlm_ds.attention=reference"], "native", "as its formula says"),
        (
            "internlm_ds.attention",
            ["internlm_ds.attention=varlen", "model.dtype=torch.bfloat16"],
            "native",
            "or an error at start",
        ),
        ("model.use_flash_attn", ["internlm_ds.attention=varlen"], "native", 'internlm_ds.attention = "varlen"'),
        ("internlm_ds.deterministic", ["internlm_ds.deterministic=True"], "native", "deterministic backward"),
        ("internlm_ds.chunked_loss", ["internlm_ds.chunked_loss=auto"], "native", "where they are many"),
        ("internlm_ds.chunked_loss", ["internlm_ds.chunked_loss=True"], "native", "a few rows at a time"),
        ("internlm_ds.chunked_loss", ["internlm_ds.chunked_loss=False"], "no_effect", "all logits"),
        (
            "internlm_ds.pipeline_schedule",
            ["internlm_ds.pipeline_schedule=1f1b", "model.num_chunks=2"],
            "native",
            "interleaved",
        ),
        ("internlm_ds.pipeline_schedule", ["internlm_ds.pipeline_schedule=zb-h1"], "native", "fill the gaps"),
        ("internlm_ds.pipeline_bounds", ["internlm_ds.pipeline_bounds=[0, 1, 4]"], "native", "cut at these blocks"),
        ("internlm_ds.pipeline_bounds", ["internlm_ds.pipeline_bounds=None"], "no_effect", "as InternLM cuts them"),
    ],
)
def test_two_stages_run_our_schedules(
    spec_of: SpecOf, key: str, overrides: list[str], fidelity: str, words: str
) -> None:
    pipeline = "parallel.pipeline={'size': 2, 'interleaved_overlap': True}"
    found = note_of(spec_of("model.num_layers=4", pipeline, *overrides, world_size=2), key)
    assert found.fidelity == fidelity and words in found.reason


def test_one_stage_needs_no_schedule(spec_of: SpecOf) -> None:
    spec = spec_of("model.num_layers=4", "model.num_chunks=2", "internlm_ds.pipeline_schedule=zb-h1")
    for key in ("model.num_chunks", "internlm_ds.pipeline_schedule"):
        found = note_of(spec, key)
        assert found.fidelity == "no_effect" and found.reason.startswith("a single stage")


def test_borders_need_a_blueprint(spec_of: SpecOf) -> None:
    spec = spec_of("model.num_layers=4", "internlm_ds.pipeline_bounds=[0, 1, 4]", "parallel.pipeline=2", world_size=2)
    assert refusal(replace(spec, arch=None), "internlm_ds.pipeline_bounds") == (
        "the layers of a registered model type are divided evenly over the stages; remove it"
    )


def test_zero_bubble_is_for_one_chunk(spec_of: SpecOf) -> None:
    asked = ("model.num_layers=4", "model.num_chunks=2", "internlm_ds.pipeline_schedule=zb-h1", "parallel.pipeline=2")
    assert refusal(spec_of(*asked, world_size=2), "internlm_ds.pipeline_schedule") == (
        'zb-h1 is for one chunk per stage, not model.num_chunks = 2; write "1f1b"'
    )


BF16, MOMENTS, MASTERS = "model.dtype=torch.bfloat16", "internlm_ds.moments_dtype", "internlm_ds.masters_dtype"


def test_states_in_bf16_are_ours_and_change_no_key_of_deepspeeds(spec_of: SpecOf) -> None:
    plain, ours = spec_of(BF16), spec_of(BF16, f"{MOMENTS}=bfloat16", f"{MASTERS}=bfloat16")
    for key in (MOMENTS, MASTERS):
        assert note_of(plain, key).fidelity == "no_effect" and "fp32" in note_of(plain, key).reason
        assert note_of(ours, key).fidelity == "native" and "at random" in note_of(ours, key).reason
    assert translate(ours).ds_config == translate(plain).ds_config


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_only_bf16_weights_are_their_own_masters(spec_of: SpecOf, dtype: str) -> None:
    spec = spec_of(f"model.dtype=torch.{dtype}", f"{MOMENTS}=bfloat16", f"{MASTERS}=bfloat16")
    message = refusal(spec, MASTERS)
    assert f"torch.{dtype}" in message and message.endswith('model.dtype="torch.bfloat16"')
    assert note_of(spec, MOMENTS).fidelity == "native"


@pytest.mark.parametrize(
    "keys",
    [{"data_types": {"grad_accum_dtype": "bf16"}}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}],
)
def test_bf16_masters_need_fp32_sums_on_the_device(spec_of: SpecOf, keys: dict[str, Any]) -> None:
    spec = spec_of(BF16, f"{MOMENTS}=bfloat16", f"{MASTERS}=bfloat16", f"deepspeed={keys}")
    assert 'write "float32", or remove' in refusal(spec, MASTERS)
    assert note_of(spec, MOMENTS).fidelity == "native"


def test_mixtures_of_experts_are_refused(spec_of: SpecOf) -> None:
    assert "mixtures of experts" in refusal(spec_of("model_type=INTERNLM_MoE"), "model_type")


@pytest.mark.parametrize("family", ["INTERNLM2_PUBLIC", "LLAMA2"])
def test_what_other_families_have(spec_of: SpecOf, family: str) -> None:
    keys = ("num_kv_attention_heads=2", "no_bias=True", "adapt_hf=False", "apply_post_layer_norm=True")
    spec = spec_of(f"model_type={family}", *(f"model.{key}" for key in keys), "model.attn_wqkv_init_std=0.01")
    for key in (*(key.partition("=")[0] for key in keys), "attn_wqkv_init_std"):
        assert note_of(spec, f"model.{key}").fidelity == "native", key
    assert note_of(spec, "model.num_kv_attention_heads").reason.startswith("groups of 2 query heads")


def test_uniform_initial_values_have_the_spread_that_is_given(spec_of: SpecOf) -> None:
    found = note_of(spec_of("model_type=LLAMA2", "model.init_type=uniform"), "model.init_type")
    assert found.fidelity == "approximate" and "sqrt(3*std)" in found.reason


def test_deepnorm_is_refused(spec_of: SpecOf) -> None:
    assert refusal(spec_of("model_type=INTERNLM2_PUBLIC", "model.deepnorm=True"), "model.deepnorm").endswith(
        "write False"
    )


def test_fp32_parts_of_a_half_precision_model(spec_of: SpecOf) -> None:
    assert note_of(spec_of("use_fp32_norm=True"), "use_fp32_norm").fidelity == "no_effect"
    half = "model.dtype=torch.bfloat16"
    assert "fp32 norm" in refusal(spec_of("use_fp32_norm=True", half), "use_fp32_norm")
    assert "fp32 head" in refusal(spec_of("output_tf32=True", half), "output_tf32")


def test_all_refusals_come_together_with_their_lines(spec_of: SpecOf) -> None:
    spec = spec_of("model.is_reward=True", "lr_scheduler.last_epoch=3", 'deepspeed={"gradient_clippin": 1}')
    with pytest.raises(TranslationError) as error:
        translate(spec)
    assert {problem.key for problem in error.value.problems} == {
        "model.is_reward",
        "lr_scheduler.last_epoch",
        "deepspeed.gradient_clippin",
    }
    assert str(spec.path) in str(error.value)
