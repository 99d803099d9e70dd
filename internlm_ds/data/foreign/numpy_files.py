"""Plain numpy files: `PREFIX.tokens.npy` and `PREFIX.offsets.npy`, which `np.load(…, mmap_mode="r")` maps into memory.

`tokens` holds the ids of all samples behind one another, `offsets` where each sample begins and, as its last entry,
where the last one ends: sample k is `tokens[offsets[k]:offsets[k + 1]]`. `PREFIX.lengths.npy` instead of offsets is
read too. `PREFIX.loss_mask.npy` (bool, as long as tokens) is there if something is not learned: True where the token
may be a target.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binformat import IntArray
from internlm_ds.data.foreign.blocks import (
    ABOUT,
    Block,
    Column,
    FileTarget,
    Source,
    TokenDtype,
    WholeFiles,
    about_bytes,
    check_ids,
    checked_ids,
    file_sizes,
    read_note,
    spans,
)
from internlm_ds.errors import DataFormatError

TOKENS, OFFSETS, LENGTHS, MASK = ".tokens.npy", ".offsets.npy", ".lengths.npy", ".loss_mask.npy"
PARTS = (TOKENS, OFFSETS, LENGTHS, MASK, ABOUT)
_HEADER_BYTES = 128
_REMEDY = "write the files again, or copy them whole"


def prefix_of(path: str) -> str:
    """What the names of the files begin with; each of the files names it too.

    >>> prefix_of("a/b.tokens.npy"), prefix_of("a/b")
    ('a/b', 'a/b')
    """
    for ending in (TOKENS, OFFSETS, LENGTHS, MASK):
        if path.endswith(ending):
            return path[: -len(ending)]
    return path


def read_numpy(path: str) -> Source:
    """
    Raises:
        DataFormatError: A file is missing, damaged, or they do not fit each other; here or when it is read.
    """
    prefix = prefix_of(path)
    column, num_ids = _column(f"{prefix}{TOKENS}", kinds="iu", what="ids (integers)")
    lengths = _lengths(prefix, num_ids)
    marks = None
    if os.path.exists(f"{prefix}{MASK}"):
        marks, num_marks = _column(f"{prefix}{MASK}", kinds="biu", what="a mask (true or false, 1 or 0)")
        if num_marks != num_ids:
            message = f"{num_marks} entries for {num_ids} ids; {_REMEDY}, or remove the mask"
            raise DataFormatError(message, path=f"{prefix}{MASK}")

    def blocks() -> Iterator[Block]:
        at = 0
        for first, last in spans(lengths):
            end = at + int(lengths[first:last].sum())
            ids = column.read(at, end)
            check_ids(ids, path=column.path, where=f"samples {first + 1} to {last}", base_bytes=column.offset(at))
            learned = None if marks is None else marks.read(at, end) != 0
            yield Block(ids.astype(np.int64), learned, lengths[first:last])
            at = end

    size = file_sizes(*(f"{prefix}{part}" for part in PARTS))
    return Source(prefix, size, len(lengths), lambda: marks is not None, read_note(f"{prefix}{ABOUT}"), blocks)


class NumpyTarget(FileTarget):
    """The files of a prefix, and `PREFIX.about.json`, which says what they are."""

    def __init__(self, path: str, *, masked: bool, dtype: TokenDtype, note: dict[str, Any] | None, overwrite: bool):
        self._prefix, self._dtype, self._masked, self._note = prefix_of(path), dtype, masked, note
        names = [*([MASK] if masked else []), ABOUT, OFFSETS, TOKENS]
        paths = [Path(f"{self._prefix}{name}") for name in names]
        optional = [Path(f"{self._prefix}{name}") for name in (MASK, LENGTHS)]
        super().__init__(WholeFiles(paths, optional=optional, overwrite=overwrite))
        self._offsets = array("q", [0])
        for file in self._columns():
            file.write(bytes(_HEADER_BYTES))  # the length is known at the end

    def write(self, block: Block) -> None:
        ids = checked_ids(block, self._dtype, path=self._prefix, first_sample=len(self._offsets) - 1)
        self.files[-1].write(ids.tobytes())
        if self._masked:
            learned = np.ones(len(ids), np.bool_) if block.learned is None else block.learned
            self.files[0].write(learned.tobytes())
        self._offsets.extend((self._offsets[-1] + np.cumsum(block.lengths)).tolist())

    def finish(self) -> None:
        for file, dtype in zip(self._columns(), (self._dtype, "bool")):
            file.seek(0)
            file.write(npy_header(dtype, self._offsets[-1]))
        self.files[-2].write(npy_header("int64", len(self._offsets)) + self._offsets.tobytes())
        about = {"dtype": self._dtype, "samples": len(self._offsets) - 1, "tokens": self._offsets[-1]}
        self.files[-3].write(about_bytes("numpy", masked=self._masked, note=self._note, **about))

    def _columns(self) -> list[IO[bytes]]:
        """The files as long as the tokens: ids, and the mask if there is one."""
        return [self.files[-1], *([self.files[0]] if self._masked else [])]


def npy_header(dtype: str, count: int) -> bytes:
    """Header of a `.npy` file of one dimension, always 128 bytes, so that it can be written last.

    Source: numpy's "NPY format", version 1.0.
    """
    text = f"{{'descr': '{np.dtype(dtype).newbyteorder('<').str}', 'fortran_order': False, 'shape': ({count},), }}"
    body = text.encode("ascii").ljust(_HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _lengths(prefix: str, num_ids: int) -> IntArray:
    """Ids of each sample, from offsets or lengths."""
    if os.path.exists(f"{prefix}{OFFSETS}"):
        path, what = f"{prefix}{OFFSETS}", "offsets (integers)"
        offsets = _whole(path, what=what)
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != num_ids or (np.diff(offsets) < 0).any():
            shown = f"from {offsets[0]} to {offsets[-1]}" if len(offsets) else "and hold nothing"
            message = f"offsets rise from 0 to the number of ids, {num_ids}; these run {shown}; {_REMEDY}"
            raise DataFormatError(message, path=path)
        return np.diff(offsets)
    path = f"{prefix}{LENGTHS}"
    if not os.path.exists(path):
        raise DataFormatError(f"no such file, nor {prefix}{LENGTHS}: where does a sample begin?", path=prefix + OFFSETS)
    lengths = _whole(path, what="lengths (integers)")
    if (lengths < 0).any() or int(lengths.sum()) != num_ids:
        message = f"the lengths add up to {int(lengths.sum())}, there are {num_ids} ids; {_REMEDY}"
        raise DataFormatError(message, path=path)
    return lengths


def _whole(path: str, *, what: str) -> IntArray:
    column, count = _column(path, kinds="iu", what=what)
    return column.read(0, count).astype(np.int64)


def _column(path: str, *, kinds: str, what: str) -> tuple[Column, int]:
    """Where the numbers of a `.npy` file lie, and how many they are."""
    found = _mapped(path, kinds=kinds, what=what)
    # numpy has checked that the file holds them all, and nothing is known of what follows
    base = int(getattr(found, "offset", 0))
    return Column(path, found.dtype.str, base), len(found)


def _mapped(path: str, *, kinds: str, what: str) -> npt.NDArray[Any]:
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataFormatError("no such file", path=path) from None
    except (ValueError, EOFError, OSError) as error:
        size = os.path.getsize(path) if os.path.isfile(path) else None
        message = f"no numpy file, or a torn one ({error}); {_REMEDY}"
        raise DataFormatError(message, path=path, offset_bytes=size) from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in kinds:
        seen = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise DataFormatError(f"this is {seen}; {what} in one dimension are needed", path=path)
    return found
