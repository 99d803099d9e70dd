"""Keys and values that the blocks of a model remember while one sequence grows."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Rotated keys and values of one block, `(s, n, D)` each, in buffers that double when they are full."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(t, n, D)` twice; return everything so far, `(s, n, D)` twice."""
        start, self.length = self.length, self.length + len(k)
        self._keys = _with_room(self._keys, k, start=start, length=self.length)
        self._values = _with_room(self._values, v, start=start, length=self.length)
        return self._keys[: self.length], self._values[: self.length]


def _with_room(buffer: Tensor | None, new: Tensor, *, start: int, length: int) -> Tensor:
    if buffer is None or length > len(buffer):
        larger = torch.empty(2 * length, *new.shape[1:], dtype=new.dtype, device=new.device)
        if buffer is not None:
            larger[:start] = buffer[:start]
        buffer = larger
    buffer[start:length] = new
    return buffer
