"""InternLM2 as a table of parameters, and what Llama has in common with it.

The rows of `wqkv` are, for every key/value head, its query heads, then its key, then its value: a plain slice of rows
is a slice of heads. Query heads are counted key/value head by key/value head. Initial standard deviations are keys of
the configuration; matrices that write to the residual stream get theirs divided by sqrt(2(l+1)).
"""

from __future__ import annotations

from collections.abc import Callable

from internlm_ds.arch import parts
from internlm_ds.arch.spec import LayerSpec, ModelArch, ParamSpec
from internlm_ds.config.schema import ModelConfig

Projections = Callable[[ModelConfig, str, int], tuple[ParamSpec, ...]]


def build(model: ModelConfig) -> ModelArch:
    """The blueprint of an InternLM2 model with these sizes."""
    return grouped(model, family="internlm2", projections=_packed, adapt_hf=model.adapt_hf is not False)


def grouped(model: ModelConfig, *, family: str, projections: Projections, adapt_hf: bool) -> ModelArch:
    """The blueprint of a family with InternLM2's names and grouped key/value heads.

    Args:
        projections: `(model, prefix, layer)` -> the matrices that make queries, keys and values.
        adapt_hf: Rotary pairs are halves of a head, as in Hugging Face's files; else neighbours.
    """
    uniform = model.init_type != "normal"
    embedding = parts.embedding(model, "tok_embeddings", model.embedding_init_std, uniform=uniform)
    final = () if model.apply_post_layer_norm else (LayerSpec("norm", "norm", parts.norm(model, "norm")),)
    blocks = (
        LayerSpec("block", f"layers.{i}", _block(model, i, projections), layer=i) for i in range(model.num_layers)
    )
    head = LayerSpec("head", "output", (parts.head(model, "output", model.out_head_init_std, uniform=uniform),))
    return ModelArch(
        family=family,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_kv_attention_heads=kv_heads(model),
        head_dim=head_dim(model),
        mlp_hidden_size=parts.mlp_width(model),
        layers=(LayerSpec("embedding", "tok_embeddings", (embedding,)), *blocks, *final, head),
        rotary_pairs="halves" if adapt_hf else "neighbours",
    )


def kv_heads(model: ModelConfig) -> int:
    """Key/value heads of a configuration; as many as query heads where it says nothing."""
    return model.num_kv_attention_heads or model.num_attention_heads


def head_dim(model: ModelConfig) -> int:
    """Width of a head."""
    return model.hidden_size // model.num_attention_heads


def projection(
    model: ModelConfig, name: str, rows: int, *, granule: int, std: float, layer: int
) -> tuple[ParamSpec, ...]:
    """A matrix `(rows, H)` of attention, with its bias unless `no_bias`."""
    uniform = model.init_type != "normal"
    weight = parts.linear(
        f"{name}.weight", (rows, model.hidden_size), std, 0, granule=granule, layer=layer, uniform=uniform
    )
    if model.no_bias:
        return (weight,)
    return (weight, ParamSpec(f"{name}.bias", (rows,), "bias", split_dim=0, granule=granule, layer=layer))


def _packed(model: ModelConfig, prefix: str, layer: int) -> tuple[ParamSpec, ...]:
    groups = kv_heads(model)
    rows = (model.num_attention_heads + 2 * groups) * head_dim(model)
    std = model.attn_wqkv_init_std
    return projection(model, f"{prefix}.wqkv", rows, granule=rows // groups, std=std, layer=layer)


def _block(model: ModelConfig, layer: int, projections: Projections) -> tuple[ParamSpec, ...]:
    h, prefix, uniform = model.hidden_size, f"layers.{layer}", model.init_type != "normal"
    scaled = (lambda std: parts.residual_std(std, layer)) if model.use_scaled_init else (lambda std: std)
    # a tensor rank holds whole groups of query heads
    columns = model.num_attention_heads // kv_heads(model) * head_dim(model)
    out = parts.linear(
        f"{prefix}.attention.wo.weight",
        (h, h),
        scaled(model.attn_other_init_std),
        1,
        granule=columns,
        layer=layer,
        uniform=uniform,
    )
    name = f"{prefix}.attention.wo.bias"
    bias = () if model.no_bias else (ParamSpec(name, (h,), "bias", on_first_tensor_rank_only=True, layer=layer),)
    norms = (
        *parts.norm(model, f"{prefix}.attention_norm", layer=layer),
        *parts.norm(model, f"{prefix}.ffn_norm", layer=layer),
    )
    feed_forward = parts.mlp(
        model,
        f"{prefix}.feed_forward",
        layer=layer,
        in_std=model.ffn_uplayer_init_std,
        out_std=scaled(model.ffn_other_init_std),
        uniform=uniform,
    )
    return (*projections(model, f"{prefix}.attention", layer), out, *bias, *norms, *feed_forward)
