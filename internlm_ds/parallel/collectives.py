"""Collectives over one tensor axis, with their gradients, as layers use them.

An axis of size 1 is the identity: no group, no communication. Larger axes are refused by `require_single` until their
autograd pairs exist here.
"""

from __future__ import annotations

from torch import Tensor

from internlm_ds.errors import LayoutError
from internlm_ds.parallel.context import Axis


def require_single(tensor: Axis) -> None:
    """Refuse a tensor axis that layers cannot split over yet.

    Raises:
        LayoutError: The axis has more than one rank.
    """
    if tensor.size != 1:
        raise LayoutError(
            f"parallel.tensor = {tensor.size}: this version does not split layers over tensor ranks; use tensor=1"
        )


def share(width: int, tensor: Axis, *, what: str) -> int:
    """This rank's part of a width that is split evenly.

    Raises:
        LayoutError: The width does not divide by the axis' size.
    """
    if width % tensor.size:
        raise LayoutError(f"{what} = {width} does not divide by parallel.tensor = {tensor.size}")
    return width // tensor.size


def copy_to_tensor_ranks(x: Tensor, tensor: Axis) -> Tensor:
    """Identity forward, sum of gradients over the axis backward: the entry of a column-parallel layer."""
    require_single(tensor)
    return x


def sum_over_tensor_ranks(x: Tensor, tensor: Axis) -> Tensor:
    """Sum over the axis forward, identity backward: the exit of a row-parallel layer."""
    require_single(tensor)
    return x


def gather_from_tensor_ranks(x: Tensor, tensor: Axis) -> Tensor:
    """Join the last dimension over the axis: logits with `parallel_output=False`, split embeddings."""
    require_single(tensor)
    return x
