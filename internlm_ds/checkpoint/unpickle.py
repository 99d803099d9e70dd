"""Reads the `.pt` files of InternLM and PyTorch without running anything that is written in them.

A pickle is a program. This reader looks through its opcodes first, refuses whatever is not on the list below, and
then lets it build only inert stand-ins made for this one file: dicts, tuples, tensors that are not read yet.
InternLM's own classes become plain data (`Config` a dict, `ParallelMode` a string), so the reference need not be
installed. Which file holds what is the format's business.

Source: the zip layout of `torch.save` since 1.6: `NAME/data.pkl`, `NAME/data/KEY` one uncompressed record per
storage, `NAME/byteorder`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_ds.errors import CheckpointDamagedError, CheckpointError

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES.values()}
_DTYPES |= {"half": torch.float16, "float": torch.float32, "double": torch.float64, "long": torch.int64}
_OPCODES = {
    *("PROTO", "STOP", "FRAME", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}
_PIECE_BYTES = 1 << 20
_NAME_LENGTH_AT = 26
"""Of a zip file's local header: two bytes each for the lengths of name and extra field, the content behind both."""
# what zipfile raises on a broken archive, a flipped bit in a flag ("encrypted") or in a name included
_BROKEN_ZIP = (
    *(zipfile.BadZipFile, OSError, struct.error, zlib.error),
    *(ValueError, NotImplementedError, RuntimeError, EOFError, IndexError, OverflowError),
)
_MOST_INDICES = 2**40
_MOST_EXPANDED = 2**20
_MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT"}


def load(path: str | Path, *, lazy: bool = False) -> Any:
    """What `torch.save` wrote into a file, as plain data.

    Args:
        lazy: Leave tensors as `LazyTensor`s, to be read one at a time with `.load()`.
    Returns:
        Dicts, lists, tuples, numbers, strings, torch dtypes, numpy arrays and tensors on the host.
    Raises:
        CheckpointError: No such file, a format that is not read, or a file that wants something that is not allowed
            (its name is in the message; it was not run).
        CheckpointDamagedError: Not a readable archive.
    """
    path = Path(path)
    archive = _Archive(path)
    program = archive.program()
    _inspect(program, path=path)
    try:
        value = _Unpickler(program, archive).load()
        return _plain(value, lazy=lazy, seen={})
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle can fail in any way; nothing of it survives
        raise CheckpointDamagedError(f"{path}: cannot be unpickled: {type(error).__name__}: {error}") from error


def check(path: str | Path) -> None:
    """Read a file whole, against the checksums in it, and keep nothing.

    Raises:
        CheckpointError: As `load`.
        CheckpointDamagedError: A record differs from its checksum.
    """
    archive = _Archive(Path(path))
    _inspect(archive.program(), path=archive.path)
    for name in archive.sizes:
        archive.read_range(name.removeprefix(archive.prefix), 0, 0)


class _Archive:
    """The zip file of one `torch.save`; every record is checked against its CRC when it is read."""

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                self.sizes = {item.filename: item.file_size for item in archive.infolist()}
                claimed = sum(item.file_size for item in archive.infolist())
                packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except IsADirectoryError:
            raise CheckpointError(f"{path} is a folder, not a file of torch.save") from None
        except _BROKEN_ZIP as error:
            raise _not_an_archive(path, error) from error
        programs = [name for name in self.sizes if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(programs) != 1 or packed or any("/code/" in name for name in self.sizes):
            raise CheckpointError(f"{path} is a zip file, but not one that torch.save wrote")
        if claimed > path.stat().st_size:
            raise CheckpointError(
                f"{path} is refused: its records claim {claimed} bytes, the whole file has {path.stat().st_size}"
            )
        self.prefix = programs[0].removesuffix("data.pkl")
        if self.sizes.get(f"{self.prefix}byteorder") and self.read("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine; save it anew on a little-endian one")

    def program(self) -> bytes:
        return self.read("data.pkl")

    def read(self, name: str) -> bytes:
        """A record, CRC checked."""
        return bytes(self.read_buffer(name))

    def read_buffer(self, name: str) -> bytearray:
        """A record, CRC checked, in memory that may be changed; it is there once."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.prefix + name) as record:
                if self.sizes[self.prefix + name] > self.path.stat().st_size:
                    raise zipfile.BadZipFile("it claims to be larger than its file")
                buffer, done = bytearray(self.sizes[self.prefix + name]), 0
                while piece := record.read(_PIECE_BYTES):
                    buffer[done : done + len(piece)] = piece
                    done += len(piece)
                if done != len(buffer):
                    raise zipfile.BadZipFile(f"{done} of {len(buffer)} bytes")
                return buffer
        except KeyError:
            raise CheckpointDamagedError(f"{self.path}: its record {name!r} is missing") from None
        except _BROKEN_ZIP as error:
            raise CheckpointDamagedError(f"{self.path}: its record {name!r} is damaged: {error}") from error

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Part of a record; the whole record is compared with its CRC the first time."""
        if name not in self._places:
            self._places[name] = self._checked_place(name)
        with self.path.open("rb") as file:
            file.seek(self._places[name] + start)
            data = file.read(num_bytes)
        if start < 0 or start + num_bytes > self.sizes[self.prefix + name] or len(data) != num_bytes:
            raise CheckpointDamagedError(f"{self.path}: its record {name!r} ends before byte {start + num_bytes}")
        return data

    def _checked_place(self, name: str) -> int:
        """Byte of the file at which a record's content begins, once all of it was read against its CRC."""
        try:
            with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
                item = archive.getinfo(self.prefix + name)
                with archive.open(item) as record:
                    while record.read(_PIECE_BYTES):
                        pass
                file.seek(item.header_offset + _NAME_LENGTH_AT)
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                return item.header_offset + _NAME_LENGTH_AT + 4 + name_bytes + extra_bytes
        except KeyError:
            raise CheckpointDamagedError(f"{self.path}: its record {name!r} is missing") from None
        except _BROKEN_ZIP as error:
            raise CheckpointDamagedError(f"{self.path}: its record {name!r} is damaged: {error}") from error


def _not_an_archive(path: Path, error: Exception) -> CheckpointError:
    try:
        start = path.open("rb").read(2)
    except OSError:
        return CheckpointError(f"{path} cannot be read: {error}")
    if start == b"\x80\x02":
        return CheckpointError(
            f"{path} is in the format of torch before 1.6, which is not read; load it with torch once and save it "
            "anew: torch.save(torch.load(path), path)"
        )
    return CheckpointDamagedError(f"{path} is damaged, or no file of torch.save: {error}")


def _inspect(program: bytes, *, path: Path) -> None:
    """Refuse a pickle by its opcodes and globals, before anything of it runs."""
    try:
        for opcode, argument, position in pickletools.genops(program):
            if opcode.name not in _OPCODES:
                raise CheckpointError(
                    f"{path} is refused: its pickle uses {opcode.name} at byte {position}, which no checkpoint of "
                    "InternLM needs; nothing of it was run"
                )
            if opcode.name == "GLOBAL":
                module, name = argument.split(" ", 1)
                if not _is_allowed(module, name):
                    raise _refusal(path, module, name)
            if opcode.name in _MEMO_WRITES and argument > len(program):
                raise CheckpointDamagedError(f"{path}: memo index {argument} in a pickle of {len(program)} bytes")
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises ValueError, UnicodeDecodeError, … on garbage
        raise CheckpointDamagedError(f"{path}: its pickle is damaged: {error}") from error


def _refusal(path: Path, module: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: its pickle asks for {module}.{name}, which no checkpoint of InternLM needs; nothing of "
        "it was run"
    )


_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_FIXED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((core, name) for core in _NUMPY_CORES for name in ("_reconstruct", "scalar")),
}


def _is_allowed(module: str, name: str) -> bool:
    if (module, name) in _FIXED:
        return True
    if module == "torch":
        return name in STORAGE_DTYPES or name in _DTYPES
    return module.split(".")[0] == "internlm" and name in ("Config", "ParallelMode")


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that still lies in its file.

    Attributes:
        offset: First element within its storage; `stride` likewise counts elements.
    """

    archive: _Archive
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def load(self) -> torch.Tensor:
        """The tensor on the host, in memory of its own.

        Raises:
            CheckpointDamagedError: Its record is missing, damaged or too short.
        """
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        if self._is_part:
            size = self.dtype.itemsize
            key, numel = f"data/{self.storage.key}", math.prod(self.shape)
            data = self.archive.read_range(key, self.offset * size, numel * size)
            return torch.frombuffer(bytearray(data), dtype=self.dtype).view(self.shape)
        data = self.archive.read_buffer(f"data/{self.storage.key}")
        numel = len(data) // self.dtype.itemsize
        if min(self.offset, *self.shape, *self.stride, 0) < 0 or last >= numel:
            raise CheckpointDamagedError(
                f"{self.archive.path}: a tensor {list(self.shape)} does not fit its record of {len(data)} bytes"
            )
        flat = torch.frombuffer(data, dtype=self.dtype)
        view = flat.as_strided(self.shape, self.stride, self.offset)
        return (
            view
            if view.is_contiguous() and view.numel() == numel
            else view.clone(memory_format=torch.contiguous_format)
        )

    @property
    def _is_part(self) -> bool:
        """One run of elements, and not the whole storage: need not be read as a whole."""
        strides = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return self.stride == strides and self.offset >= 0 and math.prod(self.shape) < self.storage.numel

    @property
    def is_contiguous(self) -> bool:
        """Its elements are one run of its storage."""
        return self.stride == tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Indices `[start, stop)` of dimension 0 of a contiguous tensor, as a tensor that still lies in the file."""
        assert self.is_contiguous and 0 <= start <= stop <= self.shape[0], f"rows {start} to {stop} of {self.shape}"
        shape = (stop - start, *self.shape[1:])
        return LazyTensor(self.archive, self.storage, self.offset + start * self.stride[0], shape, self.stride)

    def part(self, start: int, shape: tuple[int, ...]) -> LazyTensor:
        """Elements from `start` on of a 1-D tensor, as a tensor of this shape that still lies in the file.

        Raises:
            CheckpointDamagedError: It has fewer elements.
        """
        assert len(self.shape) == 1 and self.stride == (1,), f"not 1-D and contiguous: {self.shape}, {self.stride}"
        if start + math.prod(shape) > self.shape[0]:
            raise CheckpointDamagedError(
                f"{self.archive.path}: {list(shape)} from element {start} on of a tensor of {self.shape[0]} elements"
            )
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return LazyTensor(self.archive, self.storage, self.offset + start, shape, strides)


@dataclass
class _ArrayType:
    code: str
    order: str = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])


@dataclass
class _Array:
    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def build(self) -> Any:
        _, shape, kind, is_fortran, raw = self.state
        return _array(kind, raw).reshape(shape, order="F" if is_fortran else "C").copy()


def _array(kind: _ArrayType, raw: bytes) -> Any:
    import numpy as np

    dtype = np.dtype(kind.code)
    if dtype.kind not in "biuf" or not isinstance(raw, bytes):
        raise ValueError(f"numpy data of type {kind.code!r}")
    return np.frombuffer(raw, dtype=dtype.newbyteorder(kind.order))


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins only. They are made anew for each file, so that a pickle cannot alter what the next one gets."""

    def __init__(self, program: bytes, archive: _Archive):
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._archive = archive
        self._stand_ins = self._make_stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if not _is_allowed(module, name):
            raise _refusal(self._archive.path, module, name)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        return self._stand_ins[name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not _text(key).isdigit():
            raise ValueError("a reference to something that is no storage")
        return _Storage(dtype, _text(key), int(numel))

    def _make_stand_ins(self) -> dict[str, Any]:
        archive = self._archive

        class PlainDict(dict):
            def __setstate__(self, state: Any) -> None:
                """Attributes (`_metadata` of a state dict) are dropped."""

        def rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> LazyTensor:
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor without storage")
            sizes, strides = tuple(map(int, size)), tuple(map(int, stride))
            # an expanded view of a small storage takes more memory than the file has: not by much, in good files
            if any(not 0 <= length < _MOST_INDICES for length in sizes) or (
                math.prod(sizes) > max(storage.numel, _MOST_EXPANDED)
            ):
                raise ValueError(f"a tensor of {len(sizes)} dimensions that its record of {storage.numel} cannot hold")
            return LazyTensor(archive, storage, int(offset), sizes, strides)

        def encode(text: str, encoding: str = "latin1") -> bytes:
            if encoding != "latin1":
                raise ValueError(f"encoding {encoding!r}")
            return text.encode("latin1")

        return {
            "OrderedDict": PlainDict,
            "Config": PlainDict,
            "ParallelMode": _text,
            "Size": lambda sizes: tuple(sizes),
            "device": lambda *parts: ":".join(map(_text, parts)),
            "_rebuild_tensor_v2": rebuild,
            "_rebuild_parameter": lambda data, requires_grad=True, hooks=None: data,
            "_reconstruct": lambda cls, shape, code: _Array(),
            "scalar": lambda kind, raw: _array(kind, raw)[0].item(),
            "ndarray": "ndarray",
            "dtype": lambda code, align=False, copy=True: _ArrayType(_text(code)),
            "encode": encode,
        }


def _text(value: Any) -> str:
    """A short value as text; of a list that holds itself many times over the text has no end."""
    if not isinstance(value, (str, int)):
        raise ValueError(f"a {type(value).__name__} where a name was expected")
    return str(value)


def _plain(value: Any, *, lazy: bool, seen: dict[int, Any]) -> Any:
    """The stand-ins replaced by plain data; what is shared stays shared."""
    if id(value) in seen:
        return seen[id(value)][1]
    if isinstance(value, dict):
        result: Any = {_plain(k, lazy=lazy, seen=seen): _plain(v, lazy=lazy, seen=seen) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(_plain(item, lazy=lazy, seen=seen) for item in value)
    elif isinstance(value, _Array):
        result = value.build()
    elif isinstance(value, LazyTensor):
        result = value if lazy else value.load()
    elif value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        return value
    else:
        raise ValueError(f"a bare {type(value).__name__} where data was expected")
    seen[id(value)] = (value, result)  # the first keeps the id from being used again
    return result
