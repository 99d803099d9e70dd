"""Bytes of weights, gradients and optimizer states on a rank, as DeepSpeed's stage-1 optimizers allocate them.

Fp32 masters exist even in fp32 training, unless `internlm_ds.masters_dtype` leaves them out; a reduction buffer, where
there is one, is made whole at every step. The letters are `memory`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from internlm_ds.arch.spec import LayerSpec
from internlm_ds.config.schema import ModelConfig, OwnConfig
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import local_numel
from internlm_ds.plan.component import BYTES, Component
from internlm_ds.translate.optimizer_kind import block_numel, offloads, sums_in_place, uses_bf16_optimizer

SUM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
# DeepSpeed's BF16_Optimizer reduces through flattened copies of about this many elements
BF16_FLATTEN_NUMEL = 500_000_000


def states(
    layers: list[LayerSpec],
    numel: int,
    model: ModelConfig,
    layout: Layout,
    *,
    ds_config: Mapping[str, Any],
    own: OwnConfig,
) -> tuple[list[Component], list[Component]]:
    """What a rank of a stage holds whatever its batch is, and what it holds in host memory.

    Args:
        layers: Of the stage.
        numel: P.
    """
    b, g = BYTES[model.dtype], SUM_BYTES[ds_config["data_types"]["grad_accum_dtype"]]
    share = math.ceil(numel / layout.zero)
    largest = max(local_numel(param, size=layout.tensor) for layer in layers for param in layer.params)
    components = [Component("weights", b * numel, "b·P"), Component("gradients", g * numel, "g·P")]
    if g != b:
        components.append(_unsummed_gradients(numel, largest, b, ds_config))
    moments = 2 * BYTES[own.moments_dtype]
    host = []
    if offloads(ds_config):
        inner = f"4 + {moments} + 4"
        host.append(Component("masters, moments, gradients", (4 + moments + 4) * share, f"({inner})·P/z"))
    else:
        if own.masters_dtype == "float32":
            components.append(Component("fp32 master weights", 4 * share, "4·P/z"))
        components.append(Component("Adam moments", moments * share, f"{moments}·P/z"))
        components += _update_in_blocks(share, own)
    if uses_bf16_optimizer(ds_config):
        bucket = min(numel, BF16_FLATTEN_NUMEL + largest)
        components.append(Component("reduction buffer", 4 * bucket, "4·min(P, 5e8 + largest parameter)", "reduce"))
        return components, host
    if sums_in_place(ds_config):
        # reduced where they lie: the optimizer's share is a slice of them
        if g != 4:
            components.append(Component("own gradients in fp32", 4 * share, "4·P/z", "step"))
        return components, host
    bucket = int(ds_config["zero_optimization"]["reduce_bucket_size"])
    components += [
        Component("reduction buffer", g * bucket, "g·reduce_bucket_size", "reduce"),
        Component("own averaged gradients", g * share, "g·P/z", "reduce"),
    ]
    if not offloads(ds_config):
        copies = (g + 4) * share if g != 4 else 4 * share
        formula = "(g + 4)·P/z" if g != 4 else "4·P/z"
        components.append(Component("own gradients in fp32", copies, formula, "step"))
    return components, host


def copy_of_saved(numel: int, model: ModelConfig, layout: Layout, own: OwnConfig) -> Component:
    """What saving in the background copies to host memory, on a rank that writes weights and optimizer states."""
    b, kept = BYTES[model.dtype], BYTES[own.masters_dtype] + 2 * BYTES[own.moments_dtype]
    nbytes = b * numel + kept * math.ceil(numel / layout.zero)
    return Component("copy of what is saved", nbytes, f"b·P + {kept}·P/z")


def _update_in_blocks(share: int, own: OwnConfig) -> list[Component]:
    """Fp32 copies of a block of what is stored in bf16, and the numbers that it is rounded with."""
    copied = 2 * (own.moments_dtype == "bfloat16") + (own.masters_dtype == "bfloat16")
    if not copied:
        return []
    block = min(share, block_numel("cuda"))
    return [Component("update in fp32", 4 * (copied + 2) * block, f"{4 * (copied + 2)}·min(P/z, 2²¹)", "step")]


def _unsummed_gradients(numel: int, largest: int, b: int, ds_config: Mapping[str, Any]) -> Component:
    """Gradients of the running micro-batch, where sums are kept in a wider dtype."""
    name = "gradients of one micro-batch"
    if uses_bf16_optimizer(ds_config) and ds_config["bf16"].get("immediate_grad_update"):
        return Component(name, b * largest, "b·largest parameter", "forward_backward")
    return Component(name, b * numel, "b·P", "forward_backward")
