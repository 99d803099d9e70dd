"""Every key of a configuration: its section, its rule, and the families of models that know it.

Defaults stand in `schema`; this table adds what a value may be. Keys that InternLM accepts and that have no field of
their own (old names, internal ones) are listed as legacy: they are read, shown with a note, and mapped in `validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from internlm_ds.config import rules, schema
from internlm_ds.config.rules import Rule


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""The default of a key that has none."""


@dataclass(frozen=True)
class Legacy:
    """A key without a field: its rule, and the note that is shown with its value."""

    rule: Rule
    note: str


@dataclass(frozen=True)
class Section:
    """A dict of the configuration.

    Attributes:
        schema: The dataclass with its defaults.
        rules: Rule of each plain key.
        nested: Sections inside it, by key.
        legacy: Accepted keys that have no field.
        optional: Keys of `nested` that may be missing or None, and are None then.
    """

    schema: type
    rules: Mapping[str, Rule]
    nested: Mapping[str, Section] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    legacy: Mapping[str, Legacy] = field(default_factory=dict)

    def default(self, key: str) -> Any:
        """Default of a key, `REQUIRED` if it has none."""
        return _defaults(self.schema)[key]

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.rules, *self.nested, *self.legacy)


def _defaults(cls: type) -> dict[str, Any]:
    cached = _DEFAULTS.get(cls)
    if cached is None:
        cached = {}
        for one in fields(cls):
            if one.default is not MISSING:
                cached[one.name] = one.default
            elif one.default_factory is not MISSING:
                cached[one.name] = one.default_factory()
            else:
                cached[one.name] = REQUIRED
        _DEFAULTS[cls] = cached
    return cached


_DEFAULTS: dict[type, dict[str, Any]] = {}

_flag, _text = rules.boolean(), rules.text()
_folder = rules.location()
_at_least_1, _at_least_0, _any_integer = rules.integer(1), rules.integer(0), rules.integer()
_not_negative, _positive, _any_number = rules.number(0), rules.number(above=0), rules.number()
_share = rules.number(0, below=1)

LOAD_INFO = Section(schema.LoadInfo, {"path": _text, "content": rules.load_content(), "ckpt_type": rules.ckpt_type()})

CKPT = Section(
    schema.CkptConfig,
    {
        "enable_save_ckpt": _flag,
        "save_ckpt_folder": _folder,
        "checkpoint_every": rules.steps(),
        "async_upload": _flag,
        "async_upload_tmp_folder": _folder,
        "oss_snapshot_freq": rules.optional(rules.steps(0), default=float("inf")),
        "snapshot_ckpt_folder": _folder,
        "load_ckpt_folder": _folder,
        "load_model_only_folder": _folder,
        "load_optimizer": _flag,
        "auto_resume": _flag,
        "stop_file_path": _folder,
    },
    nested={"load_ckpt_info": LOAD_INFO},
    optional=("load_ckpt_info",),
    legacy={"load_given_ckpt": Legacy(_flag, "old name; ckpt.auto_resume is its opposite")},
)

DATA = Section(
    schema.DataConfig,
    {
        "type": rules.choice("tokenized"),
        "seq_len": _at_least_1,
        "micro_num": _at_least_1,
        "micro_bsz": _at_least_1,
        "packed_length": _at_least_1,
        "gradient_accumulation": _at_least_1,
        "total_steps": _at_least_1,
        "skip_batches": rules.skip_batches(),
        "rampup_batch_size": rules.rampup(),
        "pack_sample_into_one": _flag,
        "min_length": _at_least_0,
        "min_length_dict": rules.optional(rules.mapping_of(_at_least_0, '{"en": 50, "cn": 20}')),
        "train_folder": _folder,
        "valid_folder": _folder,
        "valid_micro_num": _at_least_1,
        "valid_every": _any_integer,
        "empty_cache_and_diag_interval": _any_integer,
        "diag_outlier_ratio": _any_number,
        "use_packed_dataset": _flag,
        "fixed_random_dataset_seqlen": _flag,
        "seed": _at_least_0,
        "num_worker": _at_least_0,
    },
    legacy={"batch_size": Legacy(rules.anything(), "internal to InternLM: always data.micro_num, whatever is written")},
)

GRAD_SCALER = Section(
    schema.GradScalerConfig,
    {
        "growth_factor": rules.number(above=1),
        "backoff_factor": rules.number(above=0, below=1),
        "max_scale": rules.optional(_not_negative),
        "hysteresis": _at_least_0,
    },
    nested={
        "fp16": Section(
            schema.Fp16Config,
            {
                "initial_scale": _positive,
                "min_scale": rules.optional(_not_negative),
                "growth_interval": rules.whole(1),
            },
        )
    },
)

HYBRID_ZERO_OPTIMIZER = Section(
    schema.HybridZeroOptimizerConfig,
    {
        "reduce_bucket_size": rules.whole(1),
        "clip_grad_norm": _not_negative,
        "overlap_sync_grad": _flag,
        "overlap_sync_param": _flag,
    },
    legacy={"zero_overlap_communication": Legacy(_flag, "old name of hybrid_zero_optimizer.overlap_sync_grad")},
)

LOSS = Section(
    schema.LossConfig,
    {"label_smoothing": rules.optional(_share, default=0.0), "moe_loss_coeff": _not_negative},
)

ADAM = Section(
    schema.AdamConfig,
    {
        "lr": _not_negative,
        "adam_beta1": _share,
        "adam_beta2": _share,
        "adam_beta2_c": _any_number,
        "adam_eps": _not_negative,
        "weight_decay": _not_negative,
    },
)

LR_SCHEDULER = Section(
    schema.LrSchedulerConfig,
    {
        "total_steps": _at_least_1,
        "init_steps": _at_least_0,
        "warmup_ratio": rules.number(0, high=1),
        "eta_min": _not_negative,
        "last_epoch": rules.integer(-1),
    },
)

BETA2_SCHEDULER = Section(
    schema.Beta2SchedulerConfig,
    {"init_beta2": _share, "c": _any_number, "cur_iter": rules.integer(-1)},
)

_INIT_STDS = (
    "embedding_init_std",
    "attn_wqkv_init_std",
    "attn_other_init_std",
    "ffn_uplayer_init_std",
    "ffn_other_init_std",
    "out_head_init_std",
)

_MODEL_RULES: dict[str, Rule] = {
    "num_layers": _at_least_1,
    "hidden_size": _at_least_1,
    "vocab_size": _at_least_1,
    "num_attention_heads": _at_least_1,
    "num_kv_attention_heads": rules.optional(_at_least_1),
    "mlp_ratio": _positive,
    "checkpoint": rules.fraction_or_flag(),
    "dtype": rules.dtype(),
    "embed_split_hidden": _flag,
    "embed_grad_scale": _not_negative,
    "parallel_output": _flag,
    "apply_post_layer_norm": _flag,
    "norm_type": rules.choice("rmsnorm", "layernorm"),
    "layer_norm_epsilon": _positive,
    "drop_rate": _share,
    "attn_drop_rate": _share,
    "residual_in_fp32": _flag,
    "use_scaled_init": _flag,
    "use_swiglu": _flag,
    "use_flash_attn": _flag,
    "dropout_selective_checkpoint": _flag,
    "rope_base": _positive,
    "max_position_embeddings": _at_least_1,
    "use_dynamic_ntk_rope": _flag,
    "num_chunks": _at_least_1,
    "is_reward": _flag,
    "no_bias": _flag,
    "adapt_hf": _flag,
    "norm_head": _flag,
    "deepnorm": _flag,
    "init_type": rules.text(),
    **dict.fromkeys(_INIT_STDS, _not_negative),
    "num_experts": _at_least_1,
    "moe_use_residual": _flag,
    "moe_type": rules.choice("GShard"),
}

_GQA = ("num_kv_attention_heads", "no_bias", "adapt_hf", "deepnorm", "init_type", *_INIT_STDS)
_MOE = ("num_experts", "moe_use_residual", "moe_type")
_NOT_V1 = frozenset({*_GQA, *_MOE, "norm_head"})
_V1 = tuple(key for key in _MODEL_RULES if key not in _NOT_V1)

MODEL_FAMILIES: dict[str, tuple[str, ...]] = {
    "INTERNLM": _V1,
    "INTERNLM2_PUBLIC": (*_V1, *_GQA, "norm_head"),
    "LLAMA2": (*(key for key in _V1 if key != "use_dynamic_ntk_rope"), *_GQA),
    "INTERNLM_MoE": (*_V1, *_MOE),
}
"""Keys of `model` that the builder of each model type takes."""

READ_BESIDE_BUILDER = (
    "dtype",
    "checkpoint",
    "use_flash_attn",
    "parallel_output",
    "num_chunks",
    "mlp_ratio",
    "hidden_size",
    "num_layers",
    "vocab_size",
)
"""Keys of `model` that are read whatever the builder is."""

MODEL = Section(schema.ModelConfig, _MODEL_RULES)

MOE = Section(
    schema.MoeConfig,
    {
        "top_k": _at_least_1,
        "capacity_factor": _positive,
        "eval_capacity_factor": _positive,
        "min_capacity": _at_least_0,
        "noisy_gate_policy": rules.optional(rules.choice("Jitter", "RSample")),
        "drop_tokens": _flag,
        "use_rts": _flag,
    },
)

PARALLEL = Section(
    schema.ParallelConfig,
    {"sequence_parallel": _flag, "gqa": _flag},
    nested={
        "zero1": Section(schema.Zero1Config, {"size": _any_integer, "fsdp": _flag}),
        "tensor": Section(schema.TensorConfig, {"size": _at_least_1, "mode": rules.choice("mtp", "msp", "fsp", "isp")}),
        "pipeline": Section(schema.PipelineConfig, {"size": _at_least_1, "interleaved_overlap": _flag}),
        "weight": Section(schema.WeightConfig, {"size": _at_least_1, "overlap": _flag, "memory_pool": _flag}),
    },
)

MONITOR = Section(
    schema.MonitorConfig,
    {},
    nested={
        "alert": Section(
            schema.AlertConfig,
            {
                "enable_feishu_alert": _flag,
                "feishu_alert_address": _folder,
                "light_monitor_address": _folder,
                "alert_file_path": _folder,
            },
        )
    },
    legacy={
        "tensorboard": Legacy(
            rules.anything(), "read at the top level only; inside monitor it has no effect, as in InternLM"
        )
    },
)

TENSORBOARD = Section(schema.TensorboardConfig, {"queue_max_length": _at_least_1})

OWN = Section(
    schema.OwnConfig,
    {
        "keep_checkpoints": _at_least_0,
        "attention": rules.choice("auto", "flash", "varlen", "sdpa", "reference"),
        "deterministic": _flag,
        "compile": _flag,
        "chunked_loss": rules.flag_or("auto"),
        "moments_dtype": rules.choice("float32", "bfloat16"),
        "masters_dtype": rules.choice("float32", "bfloat16"),
        "pipeline_schedule": rules.choice("1f1b", "zb-h1"),
        "pipeline_bounds": rules.optional(rules.bounds()),
        "side_file": _flag,
        "data_weights": rules.optional(rules.mapping_of(_not_negative, '{"en": 1.0, "code": 0.5}')),
    },
    nested={
        "compat": Section(
            schema.CompatConfig,
            {"no_clip_in_fp32": _flag, "mlp_names": rules.optional(rules.choice("2023", "2024"))},
        ),
        "guard": Section(schema.GuardConfig, {"max_bad_steps": _at_least_0, "drift_every": _at_least_0}),
    },
)

SECTIONS: dict[str, Section] = {
    "ckpt": CKPT,
    "data": DATA,
    "grad_scaler": GRAD_SCALER,
    "hybrid_zero_optimizer": HYBRID_ZERO_OPTIMIZER,
    "loss": LOSS,
    "adam": ADAM,
    "lr_scheduler": LR_SCHEDULER,
    "beta2_scheduler": BETA2_SCHEDULER,
    "model": MODEL,
    "moe": MOE,
    "parallel": PARALLEL,
    "monitor": MONITOR,
    "tensorboard": TENSORBOARD,
    "internlm_ds": OWN,
}
"""Top-level dicts with known keys. `deepspeed` is the one whose keys are DeepSpeed's own."""

NEEDED_SECTIONS = ("data", "hybrid_zero_optimizer", "adam", "lr_scheduler", "beta2_scheduler", "model", "parallel")
"""Dicts that a configuration must have."""

TOP = Section(
    schema.Config,
    {
        "job_name": _text,
        "model_type": _text,
        "cudnn_benchmark": _flag,
        "cudnn_deterministic": _flag,
        "use_fp32_norm": _flag,
        "output_tf32": _flag,
        "metric_dtype": rules.optional(rules.text()),
        "enable_tb": _flag,
        "tensorboard_folder": _folder,
        "resume_tb_folder": _folder,
    },
)

TOP_NAMES = {"JOB_NAME": "job_name", **{name: name for name in TOP.rules if name != "job_name"}}
"""Top-level values as InternLM spells them, with the field that holds each."""

TOP_LEGACY = {
    "batch_count": Legacy(rules.anything(), "not used, neither here nor in InternLM"),
    "alert_address": Legacy(rules.anything(), "old key without effect; alerts are configured in monitor.alert"),
    "only_load_lr": Legacy(rules.anything(), "internal to InternLM, without effect here"),
    "TENSOR_SHAPE": Legacy(
        rules.anything(), "not needed: the shape of pipeline messages follows from the batch and the model"
    ),
}

STAND_INS: dict[str, Any] = {
    "ckpt.load_ckpt_info.path": "",
    "hybrid_zero_optimizer.reduce_bucket_size": 512 * 1024 * 1024,
    "hybrid_zero_optimizer.clip_grad_norm": 1.0,
    "adam.lr": 1e-4,
    "adam.adam_beta1": 0.9,
    "adam.adam_beta2": 0.95,
    "adam.adam_eps": 1e-8,
    "adam.weight_decay": 0.01,
    "lr_scheduler.total_steps": 50000,
    "beta2_scheduler.init_beta2": 0.95,
}
"""Values of missing required keys, so that later checks still run; the configuration is refused all the same."""


def all_keys() -> tuple[str, ...]:
    """Every known dotted key, as InternLM spells it."""
    found = [*TOP_NAMES, *TOP_LEGACY]
    for name, section in SECTIONS.items():
        found.extend(_below(name, section))
    return tuple(found)


def _below(prefix: str, section: Section) -> list[str]:
    found = [f"{prefix}.{key}" for key in (*section.rules, *section.legacy)]
    for key, inner in section.nested.items():
        found.extend(_below(f"{prefix}.{key}", inner))
    return found
