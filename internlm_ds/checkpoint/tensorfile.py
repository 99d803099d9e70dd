"""Safetensors files: written in one pass together with their checksum, read slice by slice.

Owns bytes of tensors on disk and nothing about what they mean. Writing is our own, because the library keeps a second
copy of everything in memory, refuses slices of one flat buffer that it takes for shared tensors, and would have the
file read again for its checksum; so is reading, because the library maps the file. How a file gets to the disk is
`diskfile`'s, its header `header`'s.

Source: the safetensors format: 8 bytes little-endian header length, a JSON header padded with blanks to a multiple of
8, the data.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm_ds.checkpoint import header
from internlm_ds.checkpoint.diskfile import FileRecord, Flush, HashedFile
from internlm_ds.checkpoint.header import Entry
from internlm_ds.checkpoint.names import is_plain
from internlm_ds.errors import CheckpointDamagedError, CheckpointError

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
SHARD_BYTES = 4 * 2**30
_READ_BYTES = 2**30


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name in the file, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Deferred:
    """A tensor to be written that is made when its turn comes, and forgotten after it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


Writable = torch.Tensor | Deferred


def write(
    path: Path,
    tensors: Mapping[str, Writable],
    *,
    metadata: Mapping[str, str] | None = None,
    flush: Flush | None = None,
) -> FileRecord:
    """Write one safetensors file through to the disk; tensors may lie on any device and share storage.

    Args:
        flush: See `diskfile.HashedFile`.
    """
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return write_stream(path, specs, tensors.values(), metadata=metadata, flush=flush)


def write_stream(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Writable],
    *,
    metadata: Mapping[str, str] | None = None,
    flush: Flush | None = None,
) -> FileRecord:
    """As `write`, with tensors that are made one at a time, in the order of `specs`."""
    text = _header(specs, metadata=metadata)
    size = 8 + len(text) + sum(spec.size for spec in specs)
    with HashedFile(path, size=size, flush=flush) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for spec, item in zip(specs, tensors, strict=True):
            tensor = item.make() if isinstance(item, Deferred) else item
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{spec}: got {tensor.shape}"
            if spec.size:
                file.write(memoryview(raw_bytes(tensor).numpy()))
    return file.record


def _header(specs: Sequence[TensorSpec], *, metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.size
        entries[spec.name] = {
            "dtype": DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as uint8 `(numel * element_size,)` on the host."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def shards(tensors: Iterable[tuple[str, Writable]], *, max_bytes: int = SHARD_BYTES) -> Iterator[dict[str, Writable]]:
    """Group a stream of named tensors into files of at most `max_bytes` (a larger single tensor gets its own file)."""
    shard: dict[str, Writable] = {}
    filled = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = {}, 0
        assert name not in shard, f"tensor {name!r} is written twice"
        shard[name] = tensor
        filled += size
    if shard:
        yield shard


class TensorReader:
    """Reads tensors, or rows of them, of the safetensors files of one folder into memory of their own.

    Files are opened once. They are not mapped: pages of a mapped file count as this process's memory, and reading is
    as fast.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, tuple[int, dict[str, Entry]]] = {}
        weakref.finalize(self, _close_all, self._open)

    def names(self, file: str) -> list[str]:
        return list(self._file(file)[1])

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        return self._entry(file, name).shape

    def dtype(self, file: str, name: str) -> torch.dtype:
        code = self._entry(file, name).dtype
        if code not in _DTYPES:
            raise CheckpointError(f"{self._folder / file}: {name!r} is of type {code}, which is not read")
        return _DTYPES[code]

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """A whole tensor on the host."""
        entry = self._entry(file, name)
        return self._read(file, name, entry.shape, entry.start)

    def range(self, file: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Indices `[start, stop)` of dimension 0; only these are read."""
        entry = self._entry(file, name)
        rows, rest = entry.shape[0], entry.shape[1:]
        start, stop = min(start, rows), min(stop, rows)
        row_bytes = (entry.stop - entry.start) // max(1, rows)
        return self._read(file, name, (stop - start, *rest), entry.start + start * row_bytes)

    def _read(self, file: str, name: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        descriptor, _ = self._file(file)
        tensor = torch.empty(shape, dtype=self.dtype(file, name))
        if tensor.numel():
            target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            while target:
                count = os.preadv(descriptor, [target[:_READ_BYTES]], offset)
                if count == 0:
                    raise CheckpointDamagedError(f"{self._folder / file}: it has become shorter while it was read")
                target, offset = target[count:], offset + count
        return tensor

    def _entry(self, file: str, name: str) -> Entry:
        entries = self._file(file)[1]
        if name not in entries:
            raise CheckpointDamagedError(f"{self._folder / file}: holds no tensor {name!r}")
        return entries[name]

    def _file(self, file: str) -> tuple[int, dict[str, Entry]]:
        if file not in self._open:
            if not is_plain(file):
                raise CheckpointError(f"{self._folder} is refused: {file!r} is no name of a file in that folder")
            entries = header.read(self._folder / file)
            self._open[file] = os.open(self._folder / file, os.O_RDONLY), entries
        return self._open[file]


def _close_all(opened: dict[str, tuple[int, dict[str, Entry]]]) -> None:
    for descriptor, _ in opened.values():
        os.close(descriptor)
