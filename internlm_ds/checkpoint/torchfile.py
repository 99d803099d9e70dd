"""Files as `torch.save` writes them for a state dict, made tensor by tensor: nothing but the one at hand is in memory.

`unpickle` is the reader. Source: the zip layout of `torch.save` since 1.6: `archive/data.pkl`, one uncompressed record
`archive/data/KEY` for each storage, which starts at a multiple of 64 bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_ds.checkpoint.tensorfile import TensorSpec, raw_bytes

ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA, _PADDING_HEADER = 30, 20, 4
_LARGE_BYTES = 2**31 - 2**27
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class StateFile:
    """A state dict that is written in order.

    Args:
        path: A new file.
        specs: Of all tensors, in the order in which `add` gets them.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]):
        self._specs, self._next = specs, 0
        self._file = path.open("xb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._record("data.pkl", _program(specs))
        self._record("byteorder", b"little")

    def add(self, tensor: torch.Tensor) -> None:
        """The next tensor."""
        spec = self._specs[self._next]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{spec}: got {tuple(tensor.shape)}"
        self._record(f"data/{self._next}", memoryview(raw_bytes(tensor).numpy()))
        self._next += 1

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                assert self._next == len(self._specs), f"{self._next} of {len(self._specs)} tensors were added"
                self._record("version", b"3\n")
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _record(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"archive/{name}")
        info.file_size = len(data)
        is_large = info.file_size > _LARGE_BYTES
        header = _LOCAL_HEADER + len(info.filename) + _PADDING_HEADER + (_ZIP64_EXTRA if is_large else 0)
        missing = -(self._file.tell() + header) % ALIGNMENT
        info.extra = b"FB" + missing.to_bytes(2, "little") + b"Z" * missing
        with self._archive.open(info, "w", force_zip64=is_large) as record:
            record.write(data)


@dataclass(frozen=True)
class _Storage:
    spec: TensorSpec
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage


class _Pickler(pickle.Pickler):
    """Writes the stand-ins as torch writes tensors and storages."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, _Storage):
            return None
        numel = torch.Size(value.spec.shape).numel()
        return ("storage", _STORAGES[value.spec.dtype], value.key, "cpu", numel)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Tensor):
            return NotImplemented
        shape = value.storage.spec.shape
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (value.storage, 0, shape, stride, False, OrderedDict())


def _program(specs: Sequence[TensorSpec]) -> bytes:
    buffer = io.BytesIO()
    state = OrderedDict((spec.name, _Tensor(_Storage(spec, str(key)))) for key, spec in enumerate(specs))
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()
