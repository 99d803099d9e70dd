"""Safetensors files: written in one pass together with their checksum, read slice by slice.

Owns bytes of tensors on disk and nothing about what they mean. Writing is our own, because the library keeps a second
copy of everything in memory, refuses slices of one flat buffer that it takes for shared tensors, and would have the
file read again for its checksum; reading is the library's. How a file gets to the disk is `diskfile`'s.

Source: the safetensors format: 8 bytes little-endian header length, a JSON header padded with blanks to a multiple of
8, the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from internlm_ds.checkpoint.diskfile import FileRecord, Flush, HashedFile
from internlm_ds.errors import CheckpointDamagedError

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
SHARD_BYTES = 4 * 2**30


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


def write(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
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
    tensors: Iterable[torch.Tensor],
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
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{spec}: got {tensor.shape}"
            if spec.size:
                file.write(memoryview(_raw(tensor).numpy()))
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


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as uint8 `(numel * element_size,)` on the host."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def shards(
    tensors: Iterable[tuple[str, torch.Tensor]], *, max_bytes: int = SHARD_BYTES
) -> Iterator[dict[str, torch.Tensor]]:
    """Group a stream of named tensors into files of at most `max_bytes` (a larger single tensor gets its own file)."""
    shard: dict[str, torch.Tensor] = {}
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
    """Reads tensors, or ranges of 1-D tensors, of the safetensors files of one folder; files are opened once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, object] = {}

    def names(self, file: str) -> list[str]:
        return list(self._file(file).keys())

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """A whole tensor on the host."""
        with _as_damage(self._folder / file):
            return self._file(file).get_tensor(name)

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        with _as_damage(self._folder / file):
            return tuple(self._file(file).get_slice(name).get_shape())

    def range(self, file: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Indices `[start, stop)` of dimension 0; only these are read."""
        with _as_damage(self._folder / file):
            return self._file(file).get_slice(name)[start:stop]

    def spans(self, file: str, name: str, *, dim: int, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Ranges of indices along one dimension, one after another; only these are read."""
        with _as_damage(self._folder / file):
            held = self._file(file).get_slice(name)
            pieces = [held[(slice(None),) * dim + (slice(start, stop),)] for start, stop in spans]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def _file(self, file: str):
        if file not in self._open:
            with _as_damage(self._folder / file):
                self._open[file] = safe_open(self._folder / file, framework="pt", device="cpu")
        return self._open[file]


class _as_damage:
    """What the library says about an unreadable file, as our error with the file's name."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (SafetensorError, FileNotFoundError)):
            raise CheckpointDamagedError(f"{self.path}: not a readable safetensors file: {error}") from error
