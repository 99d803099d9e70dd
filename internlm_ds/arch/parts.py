"""Pieces that the tables of several families share: widths, norms, embedding, head, feed-forward layer."""

from __future__ import annotations

import math

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.config.schema import ModelConfig

MLP_WIDTH_MULTIPLE = 256
EMBEDDING_SPLIT = {
    f"{module}.{name}": dim
    for module in ("embedding", "tok_embeddings")
    for name, dim in (("weight", 1), ("word_embeddings.weight", 0))
}
"""Names of embeddings, and the dimension that files of this name split."""
EMBEDDINGS = {
    name: f"{name.partition('.')[0]}.{'word_embeddings.weight' if dim == 1 else 'weight'}"
    for name, dim in EMBEDDING_SPLIT.items()
}
"""An embedding's other name: whole, the two are the same matrix."""


def mlp_hidden_size(hidden_size: int, mlp_ratio: float, *, multiple_of: int = MLP_WIDTH_MULTIPLE) -> int:
    """Width of the MLP: `int(hidden * ratio)` rounded up to a multiple of 256.

    >>> mlp_hidden_size(4096, 8 / 3)
    11008
    """
    return multiple_of * math.ceil(int(hidden_size * mlp_ratio) / multiple_of)


def mlp_width(model: ModelConfig) -> int:
    """Width of the MLP of a configuration; the plain one of `use_swiglu=False` is not rounded."""
    if not model.use_swiglu:
        return int(model.hidden_size * model.mlp_ratio)
    return mlp_hidden_size(model.hidden_size, model.mlp_ratio)


def residual_std(std: float, layer: int) -> float:
    """Spread of a matrix that writes to the residual stream: std/sqrt(2(l+1)), l the global layer number."""
    return std / math.sqrt(2 * (layer + 1))


def embedding(model: ModelConfig, name: str, std: float, *, uniform: bool = False) -> ParamSpec:
    """`{name}.weight`, split along the hidden dimension, or `{name}.word_embeddings.weight`, along the vocabulary."""
    shape = (model.vocab_size, model.hidden_size)
    if model.embed_split_hidden or not model.use_flash_attn:
        return ParamSpec(f"{name}.weight", shape, "embedding", std, split_dim=1, init_uniform=uniform)
    name = f"{name}.word_embeddings.weight"
    return ParamSpec(name, shape, "embedding", std, split_dim=0, uneven=True, init_uniform=uniform)


def head(model: ModelConfig, name: str, std: float, *, uniform: bool = False) -> ParamSpec:
    """The matrix that makes logits; one output for a reward model."""
    shape = (1 if model.is_reward else model.vocab_size, model.hidden_size)
    return ParamSpec(f"{name}.weight", shape, "head", std, split_dim=0, uneven=True, init_uniform=uniform)


def norm(model: ModelConfig, prefix: str, *, layer: int | None = None) -> tuple[ParamSpec, ...]:
    """The weight of an RMSNorm, or weight and bias of a LayerNorm."""
    shape = (model.hidden_size,)
    weight = ParamSpec(f"{prefix}.weight", shape, "norm", init_value=1.0, layer=layer)
    if model.norm_type == "rmsnorm":
        return (weight,)
    return (weight, ParamSpec(f"{prefix}.bias", shape, "norm", init_value=0.0, layer=layer))


def linear(
    name: str,
    shape: tuple[int, ...],
    std: float,
    split_dim: int,
    *,
    layer: int,
    parts: int = 1,
    granule: int = 1,
    uniform: bool = False,
) -> ParamSpec:
    """A matrix of a block."""
    return ParamSpec(
        name,
        shape,
        "linear",
        std,
        split_dim=split_dim,
        parts=parts,
        granule=granule,
        layer=layer,
        init_uniform=uniform,
    )


def mlp(
    model: ModelConfig, prefix: str, *, layer: int, in_std: float, out_std: float, uniform: bool = False
) -> tuple[ParamSpec, ...]:
    """Matrices of a feed-forward layer: w1, w3 read the residual stream, w2 writes to it (fc1, fc2 without gate)."""
    h, width = model.hidden_size, mlp_width(model)
    reads, writes = ((width, h), in_std, 0), ((h, width), out_std, 1)
    named = {"w1": reads, "w2": writes, "w3": reads} if model.use_swiglu else {"fc1": reads, "fc2": writes}
    return tuple(
        linear(f"{prefix}.{name}.weight", *matrix, layer=layer, uniform=uniform) for name, matrix in named.items()
    )
