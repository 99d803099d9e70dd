"""A run on paper, as one value and as text: layout, batch, parameters and memory per rank, and what would fit.

The numbers come from `layout`, `memory` and `compute`; whether this machine can run it is `machine`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from internlm_ds.config.schema import Config
from internlm_ds.layout.batch import BatchPlan
from internlm_ds.layout.ranks import Layout
from internlm_ds.plan import compute, memory
from internlm_ds.plan.component import PHASES, Component
from internlm_ds.plan.memory import StageMemory
from internlm_ds.runspec import RunSpec
from internlm_ds.translate import Translation
from internlm_ds.translate.optimizer_kind import offloads
from internlm_ds.translate.overlay import merge

CARD_BYTES = 80_000_000_000
PHASE_WORDS = {
    "always": "",
    "forward_backward": "forward and backward",
    "reduce": "gradient reduction",
    "step": "update",
}


@dataclass(frozen=True)
class Alternative:
    """A change that makes a run smaller.

    Attributes:
        change: What to write.
        peak_bytes: Peak of the fullest rank then.
    """

    change: str
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will be, before any process starts.

    Attributes:
        path: The configuration file.
        layout, batch: As resolved.
        model: Family, sizes and precision, ready to show.
        num_params: Of the whole model; None for a registered model type, whose sizes are not known on paper.
        stages: Memory of one rank of each pipeline stage; empty when unknown.
        flops_per_step: On all ranks together, by InternLM's formula.
        total_steps: Batches of the run.
        ds_config: What DeepSpeed gets; sizes of buffers and dtypes of sums follow from it.
        limit_bytes: Memory of the card it is held against.
        alternatives: Changes that need less, for a run that does not fit.
    """

    path: str
    layout: Layout
    batch: BatchPlan
    model: dict[str, Any]
    num_params: int | None
    stages: tuple[StageMemory, ...]
    flops_per_step: float
    total_steps: int
    ds_config: Mapping[str, Any]
    limit_bytes: int = CARD_BYTES
    alternatives: tuple[Alternative, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank; 0 when unknown."""
        return max((stage.peak_bytes for stage in self.stages), default=0)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes


def describe(spec: RunSpec, translation: Translation, *, limit_bytes: int = CARD_BYTES) -> Plan:
    """The plan of a resolved and translated run."""
    config = spec.config
    assert config is not None, "a plan needs a configuration that loaded"
    plan = Plan(
        path=str(spec.path),
        layout=spec.layout,
        batch=spec.batch,
        model=_model(config, translation),
        num_params=spec.arch.num_params if spec.arch else None,
        stages=stage_memory(spec, config, translation.ds_config),
        flops_per_step=_flops(config, spec.batch),
        total_steps=config.data.total_steps,
        ds_config=translation.ds_config,
        limit_bytes=limit_bytes,
    )
    return plan if plan.fits else replace(plan, alternatives=tuple(_alternatives(spec, translation)))


def stage_memory(
    spec: RunSpec, config: Config, ds_config: Mapping[str, Any], *, layout: Layout | None = None
) -> tuple[StageMemory, ...]:
    """Memory of every stage, on the run's own layout or another one; empty for a registered model type."""
    if spec.arch is None:
        return ()
    layout, own = layout or spec.layout, config.internlm_ds
    step = memory.Step(config.data.micro_bsz * config.data.seq_len, config.data.micro_num, own.chunked_loss)
    # the user's borders are for the layout of the file
    fits = own.pipeline_bounds is not None and len(own.pipeline_bounds) == layout.pipe * layout.chunks + 1
    return memory.stages(
        spec.arch,
        config.model,
        layout,
        step=step,
        ds_config=ds_config,
        borders=own.pipeline_bounds if fits else None,
        own=own,
        saves_in_background=config.ckpt.enable_save_ckpt and config.ckpt.async_upload,
    )


def _model(config: Config, translation: Translation) -> dict[str, Any]:
    model = config.model
    return {
        "model_type": config.model_type,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "dtype": "tf32" if model.tf32 else model.dtype,
        "grad_accum_dtype": translation.grad_accum_dtype,
        "recomputed_fraction": model.checkpoint,
    }


def _flops(config: Config, batch: BatchPlan) -> float:
    model = config.model
    return compute.flops_per_step(
        checkpoint=model.checkpoint,
        seq_len=config.data.seq_len,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        global_batch_size=batch.sequences_per_step,
        mlp_ratio=model.mlp_ratio,
        use_swiglu=model.use_swiglu,
    )


def _alternatives(spec: RunSpec, translation: Translation) -> Iterator[Alternative]:
    """Single changes and what the fullest rank needs then, in the order they cost least."""
    config = spec.config
    assert config is not None, "a plan needs a configuration that loaded"
    ds_config = translation.ds_config
    short = {"float16": "fp16", "bfloat16": "bf16"}.get(config.model.dtype)
    own = config.internlm_ds
    masters = own.masters_dtype == "float32"  # others need fp32 sums, and an optimizer on the device
    if short and masters and ds_config["data_types"]["grad_accum_dtype"] == "fp32":
        other = merge(ds_config, {"data_types": {"grad_accum_dtype": short}})
        change = f'deepspeed = dict(data_types=dict(grad_accum_dtype="{short}"))'
        yield Alternative(change, _peak(spec, config, other))
    if config.model.checkpoint < 1:
        other_config = replace(config, model=replace(config.model, checkpoint=1.0))
        yield Alternative("--set model.checkpoint=True", _peak(spec, other_config, ds_config))
    if config.data.micro_bsz > 1:
        data = replace(config.data, micro_bsz=1, micro_num=config.data.micro_num * config.data.micro_bsz)
        change = f"--set data.micro_bsz=1 --set data.micro_num={data.micro_num}"
        yield Alternative(change, _peak(spec, replace(config, data=data), ds_config))
    if own.moments_dtype == "float32":
        other_config = replace(config, internlm_ds=replace(own, moments_dtype="bfloat16"))
        yield Alternative("--set internlm_ds.moments_dtype=bfloat16", _peak(spec, other_config, ds_config))
    if masters and not offloads(ds_config):
        other = merge(ds_config, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
        yield Alternative("--overlay ds_configs/overlays/offload_optimizer_cpu.json", _peak(spec, config, other))


def _peak(spec: RunSpec, config: Config, ds_config: Mapping[str, Any]) -> int:
    return max(stage.peak_bytes for stage in stage_memory(spec, config, ds_config))


# ---- as text and as data --------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """The plan as a page of plain text."""
    lines = [*_head(plan), ""]
    for stage in plan.stages:
        lines += [*_stage(plan, stage), ""]
    if not plan.stages:
        lines += ["memory: unknown, this model type is built by a registered function", ""]
    for alternative in plan.alternatives:
        verdict = "fits" if alternative.peak_bytes <= plan.limit_bytes else "does not fit either"
        lines.append(f"with {alternative.change}: {gigabytes(alternative.peak_bytes)} ({verdict})")
    return "\n".join(lines).rstrip() + "\n"


def gigabytes(nbytes: float) -> str:
    """Decimal gigabytes, as cards are sold; small sizes in megabytes.

    >>> gigabytes(14_640_000_000), gigabytes(3_200_000)
    ('14.64 GB', '3.2 MB')
    """
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _head(plan: Plan) -> Iterator[str]:
    layout, batch, model = plan.layout, plan.batch, plan.model
    shared = {layout.data: f"all {layout.data}", 1: "no two"}.get(layout.zero, f"groups of {layout.zero}")
    shared = "one" if layout.data == 1 else shared
    yield f"{os.path.basename(plan.path)} on {layout.world_size} rank{'s' * (layout.world_size > 1)}"
    yield (
        f"layout    pipeline {layout.pipe} x data {layout.data} x tensor {layout.tensor}; "
        f"optimizer states shared by {shared} data-parallel rank{'s' * (shared != 'one')}"
    )
    params = f"{plan.num_params:,} parameters" if plan.num_params else "parameters unknown"
    yield (
        f"model     {model['model_type']}: {model['num_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads, vocabulary {model['vocab_size']}; {params}"
    )
    yield (
        f"precision {model['dtype']}; gradients of several micro-batches are summed in {model['grad_accum_dtype']}; "
        f"{model['recomputed_fraction']:.0%} of the blocks recompute"
    )
    yield (
        f"batch     {batch.micro_bsz} x {batch.seq_len} = {batch.packed_length:,} tokens a micro-batch, "
        f"{batch.micro_num} micro-batches x {batch.data} data-parallel ranks = {batch.sequences_per_step} sequences = "
        f"{batch.tokens_per_step:,} tokens a step"
    )
    if batch.rampup_steps:
        sizes = ", ".join(map(str, batch.sizes))
        yield f"ramp-up   {sizes} micro-batches, full size after {batch.rampup_steps} steps"
    yield f"run       {plan.total_steps:,} steps = {plan.total_steps * batch.tokens_per_step:,} tokens at full size"
    per_rank = plan.flops_per_step / layout.world_size / 1e12
    yield f"compute   {per_rank:,.1f} TFLOP a step and rank"


def _stage(plan: Plan, stage: StageMemory) -> Iterator[str]:
    start, stop = stage.layers
    yield f"stage {stage.stage}: layers {start} to {stop - 1}, {stage.numel:,} parameters on a rank"
    width = max(len(component.name) for component in (*stage.components, *stage.host))
    for component in stage.components:
        when = PHASE_WORDS[component.phase]
        text = f"  {component.name.ljust(width)}  {gigabytes(component.nbytes):>10}  {component.formula}"
        yield f"{text}  [{when}]" if when else text
    for phase in PHASES:
        marker = " <- peak" if phase == stage.peak_phase else ""
        yield f"  {PHASE_WORDS[phase].ljust(width)}  {gigabytes(stage.phase_bytes(phase)):>10}{marker}"
    for component in stage.host:
        text = f"  {component.name.ljust(width)}  {gigabytes(component.nbytes):>10}  {component.formula}"
        yield f"{text}  [in host memory]"
    verdict = "fits" if stage.peak_bytes <= plan.limit_bytes else "does NOT fit"
    yield f"  {gigabytes(stage.peak_bytes)} of {gigabytes(plan.limit_bytes)}: {verdict}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as strict JSON data."""
    layout, batch = plan.layout, plan.batch
    return {
        "path": plan.path,
        "world_size": layout.world_size,
        "layout": {name: getattr(layout, name) for name in ("pipe", "data", "tensor", "zero", "chunks")},
        "batch": {
            "micro_bsz": batch.micro_bsz,
            "seq_len": batch.seq_len,
            "micro_num": batch.micro_num,
            "packed_length": batch.packed_length,
            "sequences_per_step": batch.sequences_per_step,
            "tokens_per_step": batch.tokens_per_step,
            "rampup_steps": batch.rampup_steps,
        },
        "model": plan.model,
        "num_params": plan.num_params,
        "total_steps": plan.total_steps,
        "flops_per_step": plan.flops_per_step,
        "stages": [_stage_json(stage) for stage in plan.stages],
        "peak_bytes": plan.peak_bytes,
        "limit_bytes": plan.limit_bytes,
        "fits": plan.fits,
        "alternatives": [{"change": a.change, "peak_bytes": a.peak_bytes} for a in plan.alternatives],
    }


def _stage_json(stage: StageMemory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": list(stage.layers),
        "params_per_rank": stage.numel,
        "components": [_component_json(component) for component in stage.components],
        "phases": {phase: stage.phase_bytes(phase) for phase in PHASES},
        "peak_bytes": stage.peak_bytes,
        "host_components": [_component_json(component) for component in stage.host],
        "host_bytes": stage.host_bytes,
    }


def _component_json(component: Component) -> dict[str, Any]:
    return {
        "name": component.name,
        "bytes": component.nbytes,
        "formula": component.formula,
        "phase": component.phase,
    }
