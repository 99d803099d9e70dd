"""Rules for the model, its precision, and how it is laid over ranks; and for the two dicts a user may add."""

from __future__ import annotations

from internlm_ds.config.schema import Leaf
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

FAMILIES_LATER = ("INTERNLM_MoE",)
ONE_TENSOR_RANK = "one tensor rank holds everything whole"
TENSOR_MODES = {
    "mtp": "activations between tensor regions are whole on every rank",
    "msp": "activations between tensor regions are split along tokens",
    "fsp": "runs as msp: the two compute the same and differ in how messages overlap with products",
}
DENSE = "a dense model has no experts"


MODEL_WORDS = {
    "num_layers": "blocks of our model, divided over stages as InternLM divides them",
    "hidden_size": "width of our model",
    "vocab_size": "rows of embedding and head",
    "num_attention_heads": "heads of our attention",
    "mlp_ratio": "width of the MLP, rounded up to a multiple of 256",
    "embed_split_hidden": "name and split of the embedding, as in InternLM's checkpoints",
    "embed_grad_scale": "shrinks the gradient of embedding and head alone",
    "norm_type": "our norms, computed in fp32",
    "layer_norm_epsilon": "epsilon of our norms",
    "drop_rate": "our dropout; masks come from this run's own seeded generator",
    "attn_drop_rate": "dropout of attention weights; masks come from this run's own seeded generator",
    "residual_in_fp32": "whether the residual stream is kept in fp32",
    "use_scaled_init": "spread of the initial output matrices",
    "use_swiglu": "SwiGLU, or the plain GELU MLP",
    "rope_base": "our rotary embedding",
    "max_position_embeddings": "length beyond which the dynamic rotary base grows",
    "use_dynamic_ntk_rope": "our rotary embedding",
}


# ---- model ----------------------------------------------------------------------------------------


def _model_type(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value in FAMILIES_LATER:
        return refused("mixtures of experts are not built in this version")
    if facts.spec.arch is None:
        return native("built by the function registered under this name")
    return native("our model, layer by layer a DeepSpeed PipelineModule")


def _dtype(leaf: Leaf, facts: Facts) -> Verdict:
    sums = facts.ds_config["data_types"]["grad_accum_dtype"]
    dtype = facts.config.model.dtype
    if dtype == "float16":
        return exact("fp16.enabled", f"gradients accumulate in {sums}")
    if dtype == "bfloat16":
        return exact("bf16.enabled", f"gradients accumulate in {sums}")
    tf32 = "with tf32 matrix products, " if facts.config.model.tf32 else ""
    return native(f"fp32 {tf32}needs no precision section; gradients accumulate in {sums}")


def _recompute(leaf: Leaf, facts: Facts) -> Verdict:
    if not leaf.value:
        return native("nothing is recomputed", "pipeline.activation_checkpoint_interval")
    return native(
        "the first int(blocks * fraction) blocks of each stage recompute inside themselves; DeepSpeed's interval, "
        "which knows no fraction, stays 0",
        "pipeline.activation_checkpoint_interval",
    )


def _flash(leaf: Leaf, facts: Facts) -> Verdict:
    named = facts.config.internlm_ds.attention
    if not leaf.value:
        which = "torch's own attention" if named == "auto" else f'internlm_ds.attention = "{named}"'
        return native(f"{which}; data is unpacked unless data.use_packed_dataset says otherwise")
    if named != "auto":
        return native(f'internlm_ds.attention = "{named}"; equal up to rounding')
    if facts.config.model.dtype == "float32":
        return approximate("attention stays fp32; InternLM's flash attention casts queries, keys and values to bf16")
    return native("the fastest attention at hand: flash-attn, else torch's own; equal up to rounding")


def _attention(leaf: Leaf, facts: Facts) -> Verdict:
    model, arch = facts.config.model, facts.spec.arch
    if leaf.value == "auto":
        return no_effect("model.use_flash_attn says which attention runs")
    if arch is None:
        return refused('a registered model brings its own attention; write "auto"')
    if leaf.value in ("sdpa", "reference"):
        return native("torch's own attention" if leaf.value == "sdpa" else "attention as its formula says, slow")
    anywhere = '"auto", "sdpa" and "reference" can'
    if model.dtype == "float32":
        return refused(f"flash kernels have no float32; {anywhere}")
    if arch.head_dim > 256:
        return refused(f"flash kernels take heads of up to 256, these have {arch.head_dim}; {anywhere}")
    if leaf.value == "varlen" and model.attn_drop_rate:
        return refused(f"it drops no attention weights (model.attn_drop_rate = {model.attn_drop_rate}); {anywhere}")
    what = "the package flash-attn" if leaf.value == "flash" else "torch's own flash kernels"
    return native(f"{what}, or an error at start where they cannot run")


def _selective(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.config.model.checkpoint == 1 and leaf.value:
        return no_effect("model.checkpoint recomputes whole blocks, norms and dropout among them")
    return native("dropout and norms recompute themselves" if leaf.value else "dropout and norms keep what they need")


def _size_or_switch(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.spec.arch is None:
        return native("keyword of the model's builder")
    return native(MODEL_WORDS.get(leaf.key.removeprefix("model."), "read by our model"))


def _not_v1(*values: object, what: str, words: str) -> Rule:
    """Rule of a key that InternLM v1's builder lacks: harmless there at these values."""

    def rule(leaf: Leaf, facts: Facts) -> Verdict:
        if facts.spec.arch is None:
            return native("given to the model's builder")
        if facts.spec.arch.family != "internlm":
            return native(words)
        if leaf.value in values:
            return no_effect(f"neutral; InternLM v1 has no {what}")
        return refused(f"InternLM v1 has no {what}")

    return rule


def _kv_heads(leaf: Leaf, facts: Facts) -> Verdict:
    heads = facts.config.model.num_attention_heads
    if facts.spec.arch is None:
        return native("given to the model's builder")
    if leaf.value in (None, heads):
        return no_effect("as many key/value heads as heads")
    if facts.spec.arch.family != "internlm":
        return native(f"groups of {heads // leaf.value} query heads share a key/value head")
    return refused(
        f"InternLM v1 has as many key/value heads as heads ({heads}); INTERNLM2_PUBLIC and LLAMA2 have grouped heads"
    )


def _post_norm(leaf: Leaf, facts: Facts) -> Verdict:
    if not leaf.value:
        return no_effect("norms come before attention and MLP")
    if facts.spec.arch is None:
        return native("given to the model's builder")
    if facts.spec.arch.family != "internlm":
        return native("our post-norm blocks, without a final norm")
    return refused("InternLM v1 has no such block (InternLM itself ignores the key there); write False")


def _deepnorm(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.spec.arch is None:
        return native("given to the model's builder")
    if not leaf.value:
        return no_effect("switched off")
    return refused("InternLM has no DeepNorm in its blocks either: it stops at this key; write False")


def _init_type(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.spec.arch is None or leaf.value == "normal" or facts.spec.arch.family == "internlm":
        return _not_v1("normal", what="other kind of initial values", words="drawn from normal distributions")(
            leaf, facts
        )
    return approximate(
        "drawn from uniform distributions of the standard deviations given; InternLM's bound sqrt(3*std) makes them "
        "sqrt(std)"
    )


_INIT_STD = _not_v1(
    0.02, what="such key: its standard deviations are fixed", words="standard deviation of initial values"
)


def _parallel_output(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.config.parallel.tensor.size == 1:
        return no_effect(ONE_TENSOR_RANK)
    if leaf.value:
        return native("logits stay split along the vocabulary; ranks exchange three numbers a token for the loss")
    return native("every tensor rank gets all logits")


def _moe(*values: object) -> Rule:
    return neutral(*values, off=DENSE, on=refused("mixtures of experts are not built in this version"))


def _fp32_part(what: str) -> Rule:
    def rule(leaf: Leaf, facts: Facts) -> Verdict:
        if not leaf.value:
            return no_effect("switched off")
        if facts.config.model.dtype == "float32" and not facts.config.model.tf32:
            return no_effect("the whole model is fp32")
        return refused(f"DeepSpeed casts every parameter to the training dtype, so {what} cannot be kept; write False")

    return rule


# ---- parallel -------------------------------------------------------------------------------------


def _zero1(leaf: Leaf, facts: Facts) -> Verdict:
    layout, target = facts.spec.layout, "zero_optimization.stage"
    if layout.zero == layout.data:
        return exact(target, f"stage 1 over all {layout.data} data-parallel ranks")
    if layout.zero == 1:
        return native(
            f"no sharding: stage 1 in groups of one rank, gradients averaged over the {layout.data} data-parallel "
            "ranks by our engine",
            target,
        )
    return native(
        f"zero1={layout.zero} of data={layout.data}: stage 1 within groups of {layout.zero} ranks, gradients averaged "
        f"across the {layout.data // layout.zero} replicas by our engine",
        target,
    )


def _tensor(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value in (None, 1):
        return no_effect(ONE_TENSOR_RANK)
    if facts.spec.arch is None:
        return native("the registered builder gets the axis as `tensor` and splits its layers over it")
    return native(
        f"our layers, split over {leaf.value} tensor ranks as InternLM splits them, and flagged for DeepSpeed's norm"
    )


def _tensor_mode(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.config.parallel.tensor.size == 1:
        return no_effect(ONE_TENSOR_RANK)
    if leaf.value == "isp":
        return refused('weights split over their own group (isp) are not built in this version; write mode="msp"')
    return native(TENSOR_MODES[leaf.value])


def _weight(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value in (None, 1):
        return no_effect("no weight parallelism")
    return refused("weight parallelism (isp) is not built in this version; write 1")


def _sequence_parallel(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.config.parallel.tensor.size == 1:
        return no_effect(f"{ONE_TENSOR_RANK}: there is nothing to split the sequence over")
    if not facts.config.parallel.sequence_parallel:
        return no_effect("activations between tensor regions are whole on every rank")
    return native(
        "activations between tensor regions are split along tokens; gradients of norms are summed by our engine"
    )


def _pipeline(leaf: Leaf, facts: Facts) -> Verdict:
    stages, cut = facts.spec.layout.pipe, facts.config.internlm_ds.pipeline_bounds
    borders = "bounds as InternLM's" if cut is None else "bounds as internlm_ds.pipeline_bounds says"
    return native(f"DeepSpeed's pipeline engine with our schedule, {stages} stage{'s' * (stages > 1)}, {borders}")


def _num_chunks(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value == 1:
        return no_effect("one chunk per stage")
    if facts.spec.layout.pipe == 1:
        return no_effect("a single stage computes its chunks one after the other")
    return native(f"{leaf.value} runs of layers per stage, cut as InternLM cuts them; our interleaved 1F1B schedule")


def _interleaved(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.spec.layout.pipe == 1 or facts.spec.layout.chunks == 1:
        return no_effect("it overlaps the messages of several chunks per stage; there is one stage or one chunk")
    if not leaf.value:
        return native("a message is received when it is needed")
    return native("each receive is posted one forward or backward pass before the one that needs it")


def _pipeline_schedule(leaf: Leaf, facts: Facts) -> Verdict:
    layout = facts.spec.layout
    if layout.pipe == 1:
        return no_effect("a single stage waits for nobody")
    if leaf.value == "zb-h1" and layout.chunks > 1:
        return refused(f'zb-h1 is for one chunk per stage, not model.num_chunks = {layout.chunks}; write "1f1b"')
    if leaf.value == "zb-h1":
        return native("our ZB-H1: the gradients of linear weights fill the gaps of 1F1B")
    return native("our interleaved 1F1B" if layout.chunks > 1 else "our 1F1B")


def _pipeline_bounds(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value is None:
        return no_effect("stages are cut as InternLM cuts them")
    if facts.spec.arch is None:
        return refused("the layers of a registered model type are divided evenly over the stages; remove it")
    return native("stages are cut at these blocks")


def _chunked_loss(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.spec.arch is None:
        return no_effect("a registered model type makes its own logits")
    if leaf.value is False:
        return no_effect("the head makes all logits of a micro-batch, as InternLM's")
    when = "" if leaf.value is True else " where they are many"
    return native(f"our loss computes the head's logits a few rows at a time{when}, and their gradients with them")


# ---- the two dicts a user may add -----------------------------------------------------------------


def deepspeed_rule(leaf: Leaf, facts: Facts) -> Verdict:
    return exact(leaf.key.removeprefix("deepspeed."), "DeepSpeed's own key, merged over the translation")


RULES: dict[str, Rule] = {
    "model_type": _model_type,
    "model.dtype": _dtype,
    "model.checkpoint": _recompute,
    "model.use_flash_attn": _flash,
    "model.parallel_output": _parallel_output,
    "model.num_chunks": _num_chunks,
    "model.apply_post_layer_norm": _post_norm,
    "model.is_reward": neutral(
        False, off="a language model", on=refused("reward models are not built in this version; write False")
    ),
    "model.dropout_selective_checkpoint": _selective,
    "model.num_kv_attention_heads": _kv_heads,
    "model.no_bias": _not_v1(False, None, what="switch for its attention biases", words="biases of attention"),
    "model.adapt_hf": _not_v1(
        None, True, what="other order of rotary pairs", words="order of the rows of q and k: halves, or neighbours"
    ),
    "model.norm_head": _not_v1(
        False, None, what="normalised head", words="rows of the head's matrix are divided by their length"
    ),
    "model.deepnorm": _deepnorm,
    "model.init_type": _init_type,
    "model.embedding_init_std": _INIT_STD,
    "model.attn_wqkv_init_std": _INIT_STD,
    "model.attn_other_init_std": _INIT_STD,
    "model.ffn_uplayer_init_std": _INIT_STD,
    "model.ffn_other_init_std": _INIT_STD,
    "model.out_head_init_std": _INIT_STD,
    "model.num_experts": _moe(1, None),
    "model.moe_use_residual": _moe(False, None),
    "model.moe_type": always(no_effect(DENSE)),
    "moe.*": always(no_effect(DENSE)),
    "moe": always(no_effect(DENSE)),
    "model.*": _size_or_switch,
    "use_fp32_norm": _fp32_part("an fp32 norm beside half-precision weights"),
    "output_tf32": _fp32_part("an fp32 head beside half-precision weights"),
    "parallel.zero1": _zero1,
    "parallel.zero1.size": _zero1,
    "parallel.zero1.fsdp": neutral(
        False, off="no fully sharded data parallelism", on=refused("fsdp is not built in this version; write False")
    ),
    "parallel.tensor": _tensor,
    "parallel.tensor.size": _tensor,
    "parallel.tensor.mode": _tensor_mode,
    "parallel.pipeline": _pipeline,
    "parallel.pipeline.size": _pipeline,
    "parallel.pipeline.interleaved_overlap": _interleaved,
    "parallel.weight": _weight,
    "parallel.weight.size": _weight,
    "parallel.weight.overlap": always(no_effect("no weight parallelism")),
    "parallel.weight.memory_pool": always(no_effect("no weight parallelism")),
    "parallel.sequence_parallel": _sequence_parallel,
    "parallel.gqa": always(no_effect("it only makes one more process group in InternLM")),
    "SEQ_LEN": always(no_effect("value used by the file; shapes of pipeline messages follow from data.*")),
    "HIDDEN_SIZE": always(no_effect("value used by the file; shapes of pipeline messages follow from model.*")),
    "TENSOR_SHAPE": always(no_effect("shapes of pipeline messages follow from data.* and model.*")),
    "deepspeed.*": deepspeed_rule,
    "internlm_ds.compat.*": always(native("our switch back to the reference's way")),
    "internlm_ds.guard.max_bad_steps": always(native("our training guard counts failed updates in a row")),
    "internlm_ds.guard.drift_every": always(native("our training guard compares the ranks' copies of each parameter")),
    "internlm_ds.keep_checkpoints": neutral(
        0, off="all checkpoints stay", on=native("older checkpoints go when a new one is complete")
    ),
    "internlm_ds.attention": _attention,
    "internlm_ds.deterministic": neutral(
        False,
        off="on a GPU sums may be formed in another order each time",
        on=native("torch.use_deterministic_algorithms, and flash-attn's deterministic backward"),
    ),
    "internlm_ds.compile": neutral(
        False, off="not compiled", on=native("torch.compile of each block, around attention, in the first step")
    ),
    "internlm_ds.chunked_loss": _chunked_loss,
    "internlm_ds.pipeline_schedule": _pipeline_schedule,
    "internlm_ds.side_file": neutral(
        False,
        off="ids are read from the text of the bins, or from side files that lie beside them",
        on=native("our loader writes ids as numbers beside each bin and reads those; the batches are the same"),
    ),
    "internlm_ds.data_weights": neutral(
        None,
        off="data types are mixed as they lie in data.train_folder",
        on=native("our sampler draws each type or file at its share; InternLM knows no weights"),
    ),
    "internlm_ds.pipeline_bounds": _pipeline_bounds,
}
