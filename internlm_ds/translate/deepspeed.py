"""From a `RunSpec` to DeepSpeed's JSON, with a note on every key; the interpreter between the two vocabularies.

What the engine itself must have (stage 1, no partitioned pipeline messages, …) is written here and guarded in `overlay`
where a user's own DeepSpeed keys are merged over the result. None of internlm-ds' own keys reaches the JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_ds.config.schema import Config, GradScalerConfig, Leaf
from internlm_ds.errors import Problem, TranslationError
from internlm_ds.layout.stages import stage_layers
from internlm_ds.runspec import RunSpec
from internlm_ds.translate import overlay, rules_data, rules_model, rules_train
from internlm_ds.translate.provenance import Note
from internlm_ds.translate.rules import Facts, Verdict, find, no_effect, refused

RULES = {**rules_data.RULES, **rules_train.RULES, **rules_model.RULES}

# InternLM's own log line tells the progress; DeepSpeed needs a number here, and prints at its multiples
STEPS_PER_PRINT = 1_000_000_000
ALLGATHER_BUCKET_NUMEL = 500_000_000
ACCUMULATION_DTYPE = {"float16": "fp16", "bfloat16": "fp32", "float32": "fp32"}


@dataclass(frozen=True)
class Translation:
    """What DeepSpeed gets, and what became of each key.

    Attributes:
        ds_config: DeepSpeed's configuration, strict JSON data.
        notes: One per leaf of the configuration, in its order.
        warnings: What a person should read before the run starts, beside `RunSpec.warnings`.
    """

    ds_config: dict[str, Any]
    notes: tuple[Note, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def grad_accum_dtype(self) -> str:
        """`fp16`, `bf16` or `fp32`: what gradients of several micro-batches are summed in."""
        return str(self.ds_config["data_types"]["grad_accum_dtype"])

    @property
    def refused_sources(self) -> frozenset[str]:
        """Keys whose note is a refusal."""
        return frozenset(note.source for note in self.notes if note.fidelity == "refused")


def translate(spec: RunSpec, *, overlays: Sequence[str | Path] = ()) -> Translation:
    """The DeepSpeed configuration of a run.

    Args:
        spec: A resolved run.
        overlays: JSON or YAML files of DeepSpeed keys, merged one after the other over the translation, behind the
            configuration's own `deepspeed` dict.
    Raises:
        TranslationError: All keys that cannot be honoured, together.
    """
    translation, problems = examine(spec, overlays=overlays)
    if problems:
        raise TranslationError(problems, path=str(spec.path))
    return translation


def examine(spec: RunSpec, *, overlays: Sequence[str | Path] = ()) -> tuple[Translation, list[Problem]]:
    """As `translate`, but what is refused comes back beside the rest, for a report that shows both."""
    base = ds_config_of(spec)
    merged, overlay_problems = overlay.apply(base, spec=spec, files=overlays)
    facts = Facts(spec, merged)
    notes, warnings, problems = [], [], []
    for leaf in spec.leaves:
        clash = overlay.covering(overlay_problems, leaf.key)
        verdict = refused(clash.message) if clash else _verdict(leaf, facts)
        note = verdict.note(leaf)
        notes.append(note)
        if verdict.warn:
            warnings.append(f"{leaf.source}: {verdict.reason}")
        if verdict.fidelity == "refused" and clash is None:
            problems.append(Problem(leaf.source, verdict.reason, leaf.value, leaf.line, leaf.file))
    return Translation(merged, tuple(notes), tuple(warnings)), [*problems, *overlay_problems]


def _verdict(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.helper and leaf.key not in RULES:
        return no_effect("value used by the file")
    rule = find(RULES, leaf.key)
    if rule is None:
        return refused("known to InternLM, but this version does not know what to do with it; remove it")
    return rule(leaf, facts)


def ds_config_of(spec: RunSpec) -> dict[str, Any]:
    """What InternLM's keys and our engine need, before any overlay."""
    config = spec.config
    assert config is not None, "translation needs a configuration that loaded"
    return {
        "train_batch_size": spec.batch.sequences_per_step,
        "train_micro_batch_size_per_gpu": spec.batch.micro_bsz,
        "gradient_accumulation_steps": spec.batch.micro_num,
        "steps_per_print": STEPS_PER_PRINT,
        "wall_clock_breakdown": False,
        "gradient_clipping": gradient_clipping(config),
        **precision(config),
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": reduce_bucket_numel(spec),
            "allgather_bucket_size": ALLGATHER_BUCKET_NUMEL,
            "contiguous_gradients": True,
            "overlap_comm": False,
        },
        "pipeline": {
            "activation_checkpoint_interval": 0,
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "use_reentrant": False,
        },
    }


def gradient_clipping(config: Config) -> float:
    """`clip_grad_norm`; 0, which is none, where the reference's fp32 is asked for."""
    if config.internlm_ds.compat.no_clip_in_fp32 and config.model.dtype == "float32":
        return 0.0
    return float(config.hybrid_zero_optimizer.clip_grad_norm)


def precision(config: Config) -> dict[str, Any]:
    """Precision sections, and the dtype that gradients are summed in.

    fp16 sums in fp16 as InternLM does; bf16, whose 8 bits lose small summands, in fp32.
    """
    dtype = config.model.dtype
    sums = {"data_types": {"grad_accum_dtype": ACCUMULATION_DTYPE[dtype]}}
    if dtype == "float16":
        return {"fp16": fp16(config.grad_scaler), **sums}
    if dtype == "bfloat16":
        return {"bf16": {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}, **sums}
    return sums


def fp16(scaler: GradScalerConfig) -> dict[str, Any]:
    """DeepSpeed's dynamic loss scale with the numbers nearest to InternLM's; the engine replaces the scaler itself."""
    return {
        "enabled": True,
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": max(0, round(math.log2(scaler.fp16.initial_scale))),
        "loss_scale_window": scaler.fp16.growth_interval,
        "hysteresis": max(1, scaler.hysteresis),
        "min_loss_scale": max(1, int(scaler.fp16.min_scale or 1)),
    }


def reduce_bucket_numel(spec: RunSpec) -> int:
    """Elements of the reduction buffer: as configured, but no more than the largest stage has parameters."""
    asked = int(spec.config.hybrid_zero_optimizer.reduce_bucket_size)
    return asked if spec.arch is None else min(asked, largest_stage_numel(spec))


def largest_stage_numel(spec: RunSpec) -> int:
    """Parameters of the stage that has most of them."""
    assert spec.arch is not None, "a registered model type has no blueprint"
    layers = spec.arch.layers
    return max(
        sum(param.numel for start, stop in stage for layer in layers[start:stop] for param in layer.params)
        for stage in stage_layers(spec.arch, spec.layout, borders=spec.config.internlm_ds.pipeline_bounds)
    )
