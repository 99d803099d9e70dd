"""Which optimizer a DeepSpeed JSON leads to, and what becomes of gradients there: facts for the report and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def offloads(ds_config: Mapping[str, Any]) -> bool:
    """Optimizer states live in host memory."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device") == "cpu"


def uses_bf16_optimizer(ds_config: Mapping[str, Any]) -> bool:
    """DeepSpeed picks this class for bf16 weights with fp32 sums, unless the optimizer is offloaded."""
    bf16 = bool(ds_config.get("bf16", {}).get("enabled"))
    return bf16 and ds_config["data_types"]["grad_accum_dtype"] == "fp32" and not offloads(ds_config)


def block_numel(device: str) -> int:
    """Elements updated at a time where states are kept in bf16.

    Their fp32 copies, and the numbers that they are rounded with, are all that exists beside what is stored. Few fit
    into a processor's cache, many keep a GPU busy.
    """
    return 2**18 if device == "cpu" else 2**21


def sums_in_place(ds_config: Mapping[str, Any]) -> bool:
    """Gradients lie in one flat tensor and are reduced there, without a bucket: `engine.flat_gradients.possible`."""
    dtype = next((name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "fp32")
    zero = ds_config["zero_optimization"]
    return (
        ds_config["data_types"]["grad_accum_dtype"] == dtype
        and ds_config.get("communication_data_type", dtype) == dtype
        and bool(zero.get("reduce_scatter", True))
        and not zero.get("overlap_comm")
        and not offloads(ds_config)
    )
