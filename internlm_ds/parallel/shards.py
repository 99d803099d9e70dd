"""Cutting whole parameters into what a tensor rank holds, and putting them together again (`layout.shards` says where).

A parameter that is a shard carries its `Shard` as the attribute `tensor_shard`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from internlm_ds.layout.shards import Shard


def shard_of_parameter(parameter: Tensor) -> Shard | None:
    """The part of its logical parameter that a tensor holds; None: all of it."""
    return getattr(parameter, "tensor_shard", None)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the logical parameter that a tensor is, or is a shard of."""
    shard = shard_of_parameter(parameter)
    return tuple(parameter.shape) if shard is None else shard.whole_shape(tuple(parameter.shape))


def take(whole: Tensor, shard: Shard | None) -> Tensor:
    """A rank's part of a whole parameter: the parameter itself, a view, or a copy where the part is in pieces."""
    if shard is None:
        return whole
    assert whole.shape[shard.dim] == shard.length, f"{tuple(whole.shape)} is not what {shard} was cut from"
    pieces = [whole.narrow(shard.dim, start, stop - start) for start, stop in shard.spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=shard.dim)


def join(pieces: Mapping[Shard, Tensor]) -> Tensor:
    """The whole parameter from all its shards."""
    (first, tensor), *_ = pieces.items()
    whole = tensor.new_empty(first.whole_shape(tuple(tensor.shape)))
    for shard, piece in pieces.items():
        position = 0
        for start, stop in shard.spans:
            whole.narrow(shard.dim, start, stop - start).copy_(piece.narrow(shard.dim, position, stop - start))
            position += stop - start
    return whole
