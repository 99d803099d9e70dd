"""Llama as a table of parameters: InternLM2's, with queries, keys and values in matrices of their own.

Names and, without `adapt_hf`, the order of rows are those of Meta's files.
"""

from __future__ import annotations

from internlm_ds.arch.internlm2 import grouped, head_dim, kv_heads, projection
from internlm_ds.arch.spec import ModelArch, ParamSpec
from internlm_ds.config.schema import ModelConfig


def build(model: ModelConfig) -> ModelArch:
    """The blueprint of a Llama model with these sizes."""
    return grouped(model, family="llama", projections=_separate, adapt_hf=model.adapt_hf is True)


def _separate(model: ModelConfig, prefix: str, layer: int) -> tuple[ParamSpec, ...]:
    heads, groups, width = model.num_attention_heads, kv_heads(model), head_dim(model)
    std = model.attn_wqkv_init_std
    return (
        # a tensor rank holds the queries of whole groups
        *projection(model, f"{prefix}.wq", heads * width, granule=heads // groups * width, std=std, layer=layer),
        *projection(model, f"{prefix}.wk", groups * width, granule=width, std=std, layer=layer),
        *projection(model, f"{prefix}.wv", groups * width, granule=width, std=std, layer=layer),
    )
