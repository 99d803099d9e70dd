"""Rules for what happens in a training step: loss scale, clipping, communication, optimizer, schedules, loss."""

from __future__ import annotations

from internlm_ds.config.schema import Leaf
from internlm_ds.translate.optimizer_kind import sums_in_place, uses_bf16_optimizer
from internlm_ds.translate.rules import (
    Facts,
    Rule,
    Verdict,
    always,
    approximate,
    exact,
    native,
    neutral,
    no_effect,
    refused,
)

EXACT_SCALER = (
    "InternLM's own rule is installed in the engine; DeepSpeed's scaler, which counts differently, is not used"
)


def _scaler(target: str | None, what: str) -> Rule:
    """Rule of a `grad_scaler` key: at work in fp16 only."""

    def rule(leaf: Leaf, facts: Facts) -> Verdict:
        dtype = facts.config.model.dtype
        if dtype == "float16":
            return native(f"{what}: {EXACT_SCALER}", target)
        if dtype == "bfloat16":
            return approximate(
                "bf16 trains without a loss scale here (logged as 1): its range needs none; InternLM uses one"
            )
        return no_effect("fp32 gradients are not scaled: InternLM keeps the scale at 1 there, too")

    return rule


def _clip(leaf: Leaf, facts: Facts) -> Verdict:
    config = facts.config
    if config.internlm_ds.compat.no_clip_in_fp32 and config.model.dtype == "float32" and leaf.value:
        return native("internlm_ds.compat.no_clip_in_fp32: fp32 gradients are not clipped", "gradient_clipping")
    return exact("gradient_clipping")


def _reduce_bucket(leaf: Leaf, facts: Facts) -> Verdict:
    if sums_in_place(facts.ds_config):
        return no_effect("gradients lie in one flat tensor and are reduced where they lie: there is no bucket to fill")
    target = "zero_optimization.reduce_bucket_size"
    size = facts.ds_config["zero_optimization"]["reduce_bucket_size"]
    if size != leaf.value:
        reason = (
            f"capped at {size} elements, the most that one rank has to reduce: DeepSpeed allocates the whole buffer at "
            f"every step, InternLM only what it fills; the gradients are the same"
        )
        return approximate(reason, target)
    return exact(target)


def _masters(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value == "float32":
        return no_effect("updates are made to fp32 copies of the weights")
    if facts.config.model.dtype != "bfloat16":
        dtype = facts.config.model.dtype
        return refused(
            f'only bf16 weights can be their own masters, and model.dtype is torch.{dtype}; write "float32", or '
            'model.dtype="torch.bfloat16"'
        )
    if not uses_bf16_optimizer(facts.ds_config):
        return refused(
            'it needs gradients that are summed in fp32 and an optimizer on the device; write "float32", or remove '
            "zero_optimization.offload_optimizer and data_types.grad_accum_dtype from deepspeed and overlays"
        )
    return native("the bf16 weights are updated in fp32 and rounded at random; there are no other masters")


BETA2_NOTE = "computed from the number of successful updates and given to the optimizer before each update"
LR_NOTE = "closed form of the number of successful updates, set before each update; no DeepSpeed scheduler runs"
ADAM_NOTE = "given to the AdamW that the engine passes to DeepSpeed, so the JSON needs no optimizer section"

RULES: dict[str, Rule] = {
    "grad_scaler.fp16.initial_scale": _scaler("fp16.initial_scale_power", "first loss scale, exactly this number"),
    "grad_scaler.fp16.min_scale": _scaler("fp16.min_loss_scale", "lower bound, None for none"),
    "grad_scaler.fp16.growth_interval": _scaler("fp16.loss_scale_window", "good steps before the scale grows"),
    "grad_scaler.growth_factor": _scaler(None, "factor of growth"),
    "grad_scaler.backoff_factor": _scaler(None, "factor of back-off"),
    "grad_scaler.max_scale": _scaler(None, "upper bound, None for none"),
    "grad_scaler.hysteresis": _scaler("fp16.hysteresis", "overflows before the scale backs off"),
    "hybrid_zero_optimizer.clip_grad_norm": _clip,
    "hybrid_zero_optimizer.reduce_bucket_size": _reduce_bucket,
    "hybrid_zero_optimizer.overlap_sync_grad": neutral(
        False,
        off="gradients are reduced after the last micro-batch, without overlap",
        on=no_effect(
            "gradients are reduced once a step, when the last micro-batch's are there (DeepSpeed forces overlap off in "
            "pipelines): they are the same, but their reduction is not hidden. Measured on two CPU ranks: 5 to 16 % of "
            "a step of 4 micro-batches, less with more; see docs/performance.md"
        ),
    ),
    "hybrid_zero_optimizer.zero_overlap_communication": always(
        no_effect("old name of overlap_sync_grad: gradients are reduced once a step, without overlap")
    ),
    "hybrid_zero_optimizer.overlap_sync_param": neutral(
        False,
        off="updated weights are gathered at the end of the step, without overlap",
        on=no_effect(
            "DeepSpeed gathers the updated weights in buckets at the end of the step: the weights are the same, but "
            "their exchange is not hidden behind the next forward pass. Measured on two CPU ranks: 3 to 13 % of a step "
            "of 4 micro-batches, less with more; see docs/performance.md"
        ),
    ),
    "loss.label_smoothing": always(native("our cross entropy")),
    "loss.moe_loss_coeff": always(no_effect("a dense model has no load-balancing loss")),
    "adam.lr": always(native(f"base rate of the schedule; {ADAM_NOTE}")),
    "adam.adam_beta1": always(native(ADAM_NOTE)),
    "adam.adam_beta2": always(native(f"until the beta2 schedule moves it; {ADAM_NOTE}")),
    "adam.adam_beta2_c": always(no_effect("only the configuration itself reads it, for beta2_scheduler.c")),
    "adam.adam_eps": always(native(ADAM_NOTE)),
    "adam.weight_decay": always(native(f"on every parameter, as InternLM has it; {ADAM_NOTE}")),
    "lr_scheduler.last_epoch": neutral(
        -1,
        None,
        off="the schedule starts at update 0, or where a checkpoint left it",
        on=refused("the schedule follows the number of updates that checkpoints carry; write last_epoch=-1"),
    ),
    "lr_scheduler.*": always(native(LR_NOTE)),
    "beta2_scheduler.cur_iter": always(native("count that the first update starts from; -1 means 0")),
    "beta2_scheduler.*": always(native(BETA2_NOTE)),
    "internlm_ds.moments_dtype": neutral(
        "float32",
        off="Adam's moments are kept in fp32",
        on=native("our AdamW keeps its moments in bf16, updates them in fp32 and rounds them at random"),
    ),
    "internlm_ds.masters_dtype": _masters,
    "cudnn_benchmark": always(native("sets torch.backends.cudnn.benchmark")),
    "cudnn_deterministic": always(native("sets torch.backends.cudnn.deterministic")),
    "metric_dtype": always(no_effect("sums behind perplexity are always fp32 here")),
}
