"""InternLM version 1 as a table of parameters.

Names, shapes and split dimensions are those of InternLM's own checkpoint files; see `docs/reference/checkpoints.md`.
Initial standard deviations: 0.006 for matrices that read the residual stream, 0.006/sqrt(2(l+1)) for those that write
to it (l is the global layer number), 0.0052 for embedding and head.
"""

from __future__ import annotations

import math

from internlm_ds.arch.spec import LayerSpec, ModelArch, ParamSpec
from internlm_ds.config.schema import ModelConfig

MATRIX_STD = 0.006
UNSCALED_OUTPUT_STD = 0.0015
EMBEDDING_STD = 0.0052
MLP_WIDTH_MULTIPLE = 256


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


def build(model: ModelConfig) -> ModelArch:
    """The blueprint of an InternLM v1 model with these sizes."""
    h, width = model.hidden_size, mlp_width(model)
    layers = [
        LayerSpec("embedding", "embedding", (_embedding(model),)),
        *(
            LayerSpec("block", f"blocks.{i}", _block(model, i, mlp_width=width), layer=i)
            for i in range(model.num_layers)
        ),
        LayerSpec("norm", "norm", _norm(model, "norm")),
        LayerSpec("head", "head", (_head(model),)),
    ]
    return ModelArch(
        family="internlm",
        vocab_size=model.vocab_size,
        hidden_size=h,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_kv_attention_heads=model.num_attention_heads,
        head_dim=h // model.num_attention_heads,
        mlp_hidden_size=width,
        layers=tuple(layers),
    )


def _embedding(model: ModelConfig) -> ParamSpec:
    shape = (model.vocab_size, model.hidden_size)
    if model.embed_split_hidden or not model.use_flash_attn:
        return ParamSpec("embedding.weight", shape, "embedding", EMBEDDING_STD, split_dim=1)
    name = "embedding.word_embeddings.weight"
    return ParamSpec(name, shape, "embedding", EMBEDDING_STD, split_dim=0, uneven=True)


def _head(model: ModelConfig) -> ParamSpec:
    shape = (1 if model.is_reward else model.vocab_size, model.hidden_size)
    return ParamSpec("head.weight", shape, "head", EMBEDDING_STD, split_dim=0, uneven=True)


def _norm(model: ModelConfig, prefix: str, *, layer: int | None = None) -> tuple[ParamSpec, ...]:
    shape = (model.hidden_size,)
    weight = ParamSpec(f"{prefix}.weight", shape, "norm", init_value=1.0, layer=layer)
    if model.norm_type == "rmsnorm":
        return (weight,)
    return (weight, ParamSpec(f"{prefix}.bias", shape, "norm", init_value=0.0, layer=layer))


def _block(model: ModelConfig, layer: int, *, mlp_width: int) -> tuple[ParamSpec, ...]:
    h = model.hidden_size
    prefix, head_dim = f"blocks.{layer}", h // model.num_attention_heads
    output_std = MATRIX_STD / math.sqrt(2 * (layer + 1)) if model.use_scaled_init else UNSCALED_OUTPUT_STD

    def linear(
        name: str, shape: tuple[int, ...], std: float, split_dim: int, *, parts: int = 1, granule: int = 1
    ) -> ParamSpec:
        return ParamSpec(
            f"{prefix}.{name}", shape, "linear", std, split_dim=split_dim, parts=parts, granule=granule, layer=layer
        )

    mixer = (
        linear("mixer.Wqkv.weight", (3 * h, h), MATRIX_STD, 0, parts=3, granule=head_dim),
        ParamSpec(f"{prefix}.mixer.Wqkv.bias", (3 * h,), "bias", split_dim=0, parts=3, granule=head_dim, layer=layer),
        linear("mixer.out_proj.weight", (h, h), output_std, 1, granule=head_dim),
        ParamSpec(f"{prefix}.mixer.out_proj.bias", (h,), "bias", on_first_tensor_rank_only=True, layer=layer),
    )
    if model.use_swiglu:
        mlp: tuple[ParamSpec, ...] = (
            linear("mlp.w1.weight", (mlp_width, h), MATRIX_STD, 0),
            linear("mlp.w2.weight", (h, mlp_width), output_std, 1),
            linear("mlp.w3.weight", (mlp_width, h), MATRIX_STD, 0),
        )
    else:
        mlp = (
            linear("mlp.fc1.weight", (mlp_width, h), MATRIX_STD, 0),
            linear("mlp.fc2.weight", (h, mlp_width), output_std, 1),
        )
    norms = (*_norm(model, f"{prefix}.norm1", layer=layer), *_norm(model, f"{prefix}.norm2", layer=layer))
    return (*mixer, *norms, *mlp)
