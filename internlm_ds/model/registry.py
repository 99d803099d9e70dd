"""Model types that users bring: from a name or `module:function` to layer entries.

Names are kept by `internlm_ds.registry`, which imports no torch; here they are resolved, when a model is built. The
families of this package come from their blueprint (`arch`, `model.layers`) and do not pass here.

A builder gets the `model` dict as keywords (`dtype` as a torch dtype) and returns layer entries, or one plain
`nn.Module` with `forward(tokens (T,), cu_seqlens (S + 1,)) -> logits (T, V)`.

A builder whose layers can be split has a parameter `tensor`, and gets the axis there; `sequence_parallel` likewise.
Its shards carry what `model.init.name_parameters` writes, and its logits are split along the vocabulary, as
`layout.shards.bounds` says, unless `parallel_output` is False.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm_ds.config.schema import Leaf
from internlm_ds.errors import ConfigError, LayoutError
from internlm_ds.model.layers import LayerEntry
from internlm_ds.parallel.context import Axis
from internlm_ds.registry import MODEL_INITIALIZER


def model_keywords(leaves: Iterable[Leaf], *, dtype: torch.dtype) -> dict[str, Any]:
    """The `model` dict as the user wrote it: no defaults, and `dtype` (if written) as a torch dtype."""
    written = {leaf.key: leaf.value for leaf in leaves if leaf.origin in ("file", "override")}
    keywords = {key.removeprefix("model."): value for key, value in written.items() if key.startswith("model.")}
    return keywords | ({"dtype": dtype} if "dtype" in keywords else {})


def build_registered(
    model_type: str,
    keywords: Mapping[str, Any],
    *,
    tensor: Axis,
    sequence_parallel: bool = False,
    pipe_size: int = 1,
    seed: int,
) -> list[LayerEntry]:
    """The layer entries of a registered model type.

    Args:
        model_type: A registered name, or `module:function`.
        keywords: For the builder.
        tensor: The axis; a plain module cannot be split.
        sequence_parallel: Between tensor regions a rank has its share of the tokens.
        pipe_size: Pipeline stages; likewise.
        seed: torch's generator starts from it while the builder runs, on every rank.
    Raises:
        ConfigError: The builder does not take these keywords, or returns something else.
        LayoutError: A plain module with more than one tensor or pipeline rank, or a builder that takes no `tensor`
            with several tensor ranks.
    """
    builder = MODEL_INITIALIZER.get(model_type)
    keywords = {**keywords, **_axis_keywords(builder, tensor=tensor, sequence_parallel=sequence_parallel)}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = builder(**keywords)
    except TypeError as error:
        raise ConfigError(f"model_type = {model_type!r}: its builder failed on the model dict: {error}") from error
    if isinstance(built, nn.Module):
        return [_whole_module(built, model_type, tensor=tensor, pipe_size=pipe_size)]
    if not isinstance(built, (list, tuple)) or not built or not all(isinstance(e, LayerEntry) for e in built):
        raise ConfigError(
            f"model_type = {model_type!r}: its builder returned {_describe(built)}; "
            "it must return a list of internlm_ds.model.layers.LayerEntry, or a torch.nn.Module"
        )
    if tensor.size > 1 and "tensor" not in keywords:
        raise LayoutError(
            f"model_type = {model_type!r} cannot be split over parallel.tensor = {tensor.size}: its builder takes no "
            "parameter `tensor`; give it one, which gets the axis to split layers over, or set parallel.tensor = 1"
        )
    return [replace(entry, build=partial(_named, entry)) for entry in built]


def _axis_keywords(builder: Callable[..., Any], *, tensor: Axis, sequence_parallel: bool) -> dict[str, Any]:
    """What the builder asks for by the name of a parameter."""
    offered = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    try:
        wanted = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # a builder in C has no signature
        return {}
    return {name: value for name, value in offered.items() if name in wanted}


class WholeModel(nn.Module):
    """A user's module as the only entry of a layer list: `(tokens (T,), cu_seqlens) -> logits (T, V)`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, carried: tuple[Tensor, Tensor]) -> Tensor:
        return self.module(*carried)


def _whole_module(module: nn.Module, model_type: str, *, tensor: Axis, pipe_size: int) -> LayerEntry:
    if tensor.size > 1 or pipe_size > 1:
        raise LayoutError(
            f"model_type = {model_type!r} is one plain module, which cannot be split over "
            f"parallel.tensor = {tensor.size}, parallel.pipeline = {pipe_size}: "
            "set both to 1, or return layer entries from its builder"
        )
    for name, parameter in module.named_parameters():
        parameter.logical_name = name
    return LayerEntry("", None, lambda recompute: WholeModel(module))


def _named(entry: LayerEntry, recompute: bool) -> nn.Module:
    """Build a user's entry and name the parameters that it did not name itself."""
    module = entry.build(recompute)
    for local, parameter in module.named_parameters():
        if not hasattr(parameter, "logical_name"):
            parameter.logical_name = f"{entry.prefix}.{local}" if entry.prefix else local
    return module


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(e).__name__ for e in value})) or 'nothing'}"
    return f"a {type(value).__name__}"
