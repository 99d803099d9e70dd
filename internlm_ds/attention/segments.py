"""The borders of the samples inside one packed micro-batch, as a value that attention and rotary read.

`cu_seqlens` travels between pipeline stages beside the activations, padded to a fixed shape by repeating its last
value. `Segments.of` reads it once per stage and micro-batch (one copy to the host) and keeps what follows from it:
host borders, positions, and the tables that layers of one stage share. How the segments are attended is the backends'
business.

Legend: T tokens of the micro-batch, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")
_MEMO = "_internlm_ds_segments"


class Segments:
    """Contiguous segments that cover the T tokens of a micro-batch.

    Attributes:
        borders: Host integers `(S + 1)`: first 0, last T, strictly rising.
        cu_seqlens: The same on the device, int32 `(S + 1,)`, without padding.
    """

    def __init__(self, cu_seqlens: Tensor, *, values: list[int] | None = None):
        """`values`: what `cu_seqlens` holds, where the host knows it: a GPU need not be waited for."""
        values = cu_seqlens.tolist() if values is None else values
        count = values.index(values[-1]) if values else -1
        self.borders: tuple[int, ...] = tuple(values[: count + 1])
        rising = all(a < b for a, b in zip(self.borders, self.borders[1:]))
        if count < 1 or values[0] != 0 or not rising or any(v != values[-1] for v in values[count:]):
            raise ValueError(f"cu_seqlens must rise from 0 and end in repetitions of its last value, got {values}")
        self.cu_seqlens = cu_seqlens[: count + 1]
        self._shared: dict[Any, Any] = {}

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> Segments:
        """The segments of an int32 `cu_seqlens`, padded or not; layers that are handed the same tensor share them."""
        # remembered on the tensor: it lives as long as its micro-batch, and its version tells an overwritten buffer
        version = None if cu_seqlens.is_inference() else cu_seqlens._version
        known = getattr(cu_seqlens, _MEMO, None)
        if known is not None and known[0] == version:
            return known[1]
        segments = cls(cu_seqlens)
        setattr(cu_seqlens, _MEMO, (version, segments))
        return segments

    @classmethod
    def know(cls, cu_seqlens: Tensor, host: Tensor) -> None:
        """Let `of(cu_seqlens)` take the borders from the copy that it was made of, on the host."""
        version = None if cu_seqlens.is_inference() else cu_seqlens._version
        setattr(cu_seqlens, _MEMO, (version, cls(cu_seqlens, values=host.tolist())))

    @classmethod
    def single(cls, num_tokens: int, *, device: torch.device | str = "cpu") -> Segments:
        """One segment of `num_tokens` tokens."""
        return cls(torch.tensor([0, num_tokens], dtype=torch.int32, device=device))

    @cached_property
    def num_tokens(self) -> int:
        return self.borders[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.borders, self.borders[1:]))

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    @cached_property
    def equal_length(self) -> int | None:
        """The common length when all segments are equally long, else None."""
        lengths = self.lengths
        return lengths[0] if all(n == lengths[0] for n in lengths) else None

    @property
    def positions(self) -> Tensor:
        """int64 `(T,)` on the device: place of each token within its own segment."""
        return self.shared("positions", self._positions)

    def shared(self, key: Any, make: Callable[[], Value]) -> Value:
        """`make()` the first time, the same value afterwards; for tables that all layers of a stage need."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _positions(self) -> Tensor:
        borders = self.cu_seqlens.long()
        starts = torch.repeat_interleave(borders[:-1], borders.diff(), output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=borders.device) - starts
