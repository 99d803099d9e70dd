"""InternLM version 1 as a table of parameters.

Names, shapes and split dimensions are those of InternLM's own checkpoint files; see `docs/reference/families.md`.
Initial standard deviations: 0.006 for matrices that read the residual stream, 0.006/sqrt(2(l+1)) for those that write
to it (l is the global layer number), 0.0052 for embedding and head.
"""

from __future__ import annotations

from internlm_ds.arch import parts
from internlm_ds.arch.parts import mlp_hidden_size, mlp_width
from internlm_ds.arch.spec import LayerSpec, ModelArch, ParamSpec
from internlm_ds.config.schema import ModelConfig

__all__ = ["build", "mlp_hidden_size", "mlp_width"]

MATRIX_STD = 0.006
UNSCALED_OUTPUT_STD = 0.0015
EMBEDDING_STD = 0.0052


def build(model: ModelConfig) -> ModelArch:
    """The blueprint of an InternLM v1 model with these sizes."""
    h = model.hidden_size
    layers = [
        LayerSpec("embedding", "embedding", (parts.embedding(model, "embedding", EMBEDDING_STD),)),
        *(LayerSpec("block", f"blocks.{i}", _block(model, i), layer=i) for i in range(model.num_layers)),
        LayerSpec("norm", "norm", parts.norm(model, "norm")),
        LayerSpec("head", "head", (parts.head(model, "head", EMBEDDING_STD),)),
    ]
    return ModelArch(
        family="internlm",
        vocab_size=model.vocab_size,
        hidden_size=h,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_kv_attention_heads=model.num_attention_heads,
        head_dim=h // model.num_attention_heads,
        mlp_hidden_size=mlp_width(model),
        layers=tuple(layers),
    )


def _block(model: ModelConfig, layer: int) -> tuple[ParamSpec, ...]:
    h = model.hidden_size
    prefix, head_dim = f"blocks.{layer}", h // model.num_attention_heads
    out_std = parts.residual_std(MATRIX_STD, layer) if model.use_scaled_init else UNSCALED_OUTPUT_STD
    qkv = f"{prefix}.mixer.Wqkv"
    mixer = (
        parts.linear(f"{qkv}.weight", (3 * h, h), MATRIX_STD, 0, parts=3, granule=head_dim, layer=layer),
        ParamSpec(f"{qkv}.bias", (3 * h,), "bias", split_dim=0, parts=3, granule=head_dim, layer=layer),
        parts.linear(f"{prefix}.mixer.out_proj.weight", (h, h), out_std, 1, granule=head_dim, layer=layer),
        ParamSpec(f"{prefix}.mixer.out_proj.bias", (h,), "bias", on_first_tensor_rank_only=True, layer=layer),
    )
    norms = (*parts.norm(model, f"{prefix}.norm1", layer=layer), *parts.norm(model, f"{prefix}.norm2", layer=layer))
    return (*mixer, *norms, *parts.mlp(model, f"{prefix}.mlp", layer=layer, in_std=MATRIX_STD, out_std=out_std))
