"""The byte format of token files: `X.bin`, `X.bin.meta`, and the sign of a token.

A bin holds one line `{"tokens": [1, 2, 3]}` per sample, ASCII. Its meta is a `numpy.save` of `(n, 2)` integers: byte
offset of the line, number of tokens. This file owns reading, writing and checking of the pair, `binformat` below it the
bytes of a line and a table; which files belong to a data set is `data.catalog`'s, what the tokens mean is
`preprocess`'s and `data.packing`'s business.

A meta is renamed into place before its bin: a bin without a meta that fits is a broken pair, never a fresh one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binformat import (
    REMEDY,
    IntArray,
    MetaDtype,
    decode_line,
    encode_line,
    meta_path,
    meta_table,
    npy_bytes,
    read_meta,
    sync_folder,
    temporary_name,
    write_whole,
)
from internlm_ds.errors import DataFormatError

__all__ = [
    "IntArray",
    "MetaDtype",
    "Reader",
    "Writer",
    "check_output",
    "decode_line",
    "encode_line",
    "join_signed_tokens",
    "meta_path",
    "read_meta",
    "rebuild_meta",
    "scan",
    "split_signed_tokens",
]


def split_signed_tokens(raw: npt.ArrayLike) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Tokens and loss mask of a sample as it stands on disk; nothing else looks at a sign.

    A negative id means: input, but no loss where it is the target. Zero carries no sign and never is a target.

    Returns:
        int64 tokens, all >= 0, and a bool mask, True where the token may be a target; both shaped like `raw`.

    >>> tokens, mask = split_signed_tokens([1, -5, 0, 7])
    >>> tokens.tolist(), mask.tolist()
    ([1, 5, 0, 7], [True, False, False, True])
    """
    signed = np.asarray(raw, dtype=np.int64)
    return np.abs(signed), signed > 0


def join_signed_tokens(tokens: IntArray, mask: npt.NDArray[np.bool_]) -> IntArray:
    """The other way round: ids as they stand on disk.

    >>> join_signed_tokens(np.array([1, 5, 0, 7]), np.array([True, False, False, True])).tolist()
    [1, -5, 0, 7]
    """
    return np.where(mask, tokens, -tokens)


def scan(path: str | os.PathLike[str]) -> tuple[IntArray, IntArray]:
    """Offsets and lengths (int64) read from the bin itself, line by line.

    Raises:
        DataFormatError: A line is damaged; the last one lacks its end.
    """
    offsets, lengths, position = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            tokens = decode_line(text, path=os.fspath(path), line=number, offset_bytes=position)
            offsets.append(position)
            lengths.append(len(tokens))
            position += len(text)
    return _as_int64(offsets), _as_int64(lengths)


def rebuild_meta(path: str | os.PathLike[str]) -> Path:
    """Write the meta (int64) that fits a bin, from the bin alone; returns its path."""
    offsets, lengths = scan(path)
    write_whole(meta_path(path), npy_bytes(meta_table(offsets, lengths, dtype="int64")))
    return meta_path(path)


class Reader:
    """Random access to the samples of one bin through its meta; memory is the meta's rows, the bin stays mapped.

    Attributes:
        path: The bin, as given.
        offsets: int64 `(n,)`, byte offset of each line.
        lengths: int64 `(n,)`, tokens of each sample.

    Opening checks that the meta exists and fits the bin's size and last line; `tokens` checks the line it reads.

    Raises:
        DataFormatError: Bin or meta is missing, damaged, or they do not fit each other.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise DataFormatError("no such bin file", path=self.path)
        self.offsets, self.lengths = read_meta(self.path)
        self._size = os.path.getsize(self.path)
        self._map = self._open_map()
        self._check_fit()

    def __len__(self) -> int:
        return len(self.offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapping cannot be pickled; worker processes map the file themselves
        return (Reader, (self.path,))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def tokens(self, index: int) -> IntArray:
        """Tokens of a sample, int64, signed as on disk.

        Raises:
            DataFormatError: The line is damaged, or is not the one the meta describes.
            IndexError: There is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.path}")
        offset = int(self.offsets[index])
        if offset and self._map[offset - 1] != 0x0A:
            raise self._misfit(index, f"meta row {index} points into the middle of a line")
        end = self._map.find(b"\n", offset) + 1
        text = self._map[offset : end or self._size]
        found = decode_line(text, path=self.path, line=index + 1, offset_bytes=offset)
        if len(found) != self.lengths[index]:
            raise self._misfit(index, f"{len(found)} tokens where the meta says {self.lengths[index]}")
        return found

    def __iter__(self) -> Iterator[IntArray]:
        return (self.tokens(index) for index in range(len(self)))

    def _open_map(self) -> mmap.mmap | bytes:
        if self._size == 0:
            return b""  # an empty file cannot be mapped
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_fit(self) -> None:
        """Cheap checks over all rows, and the last line whole: that is where an interrupted writer leaves its trace."""
        if len(self) == 0:
            if self._size:
                raise self._misfit(None, f"the meta is empty but the bin holds {self._size} bytes")
            return
        outside = np.flatnonzero((self.offsets < 0) | (self.offsets >= self._size) | (self.lengths < 0))
        if len(outside):
            row = int(outside[0])
            pair = (int(self.offsets[row]), int(self.lengths[row]))
            raise self._misfit(row, f"meta row {row} says {pair} (offset, tokens), the bin has {self._size} bytes")
        last = int(np.argmax(self.offsets))
        self.tokens(last)
        end = self._map.find(b"\n", int(self.offsets[last])) + 1
        if end and end != self._size:
            rest = self._size - end
            raise self._misfit(last, f"the bin goes on for {rest} bytes behind the last line that the meta knows")

    def _misfit(self, index: int | None, what: str) -> DataFormatError:
        return DataFormatError(
            f"{what}: {meta_path(self.path)} does not fit this bin. To mend it: {REMEDY}",
            path=self.path,
            line=None if index is None else index + 1,
            offset_bytes=None if index is None else int(self.offsets[index]),
        )


class Writer:
    """Writes a bin and its meta under temporary names; both appear whole on `commit`, or not at all.

    Used as a context manager it commits at the end and discards on an exception.

    Args:
        path: The bin to make; its folder is created.
        append: Keep the samples of an existing bin before the new ones (the reference's habit).
        overwrite: Replace an existing bin. With neither, an existing bin is an error.
        meta_dtype: "int64"; "int32" as the reference's text tool writes it, which limits the bin to 2 GiB.
        empty_meta: Type of the meta of shape (0,) that is written where there is no sample, as the reference's tools
            do; None writes shape (0, 2).

    Raises:
        DataFormatError: The output exists, or cannot be appended to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        append: bool = False,
        overwrite: bool = False,
        meta_dtype: MetaDtype = "int64",
        empty_meta: str | None = None,
    ):
        self.path = Path(path)
        self.meta_dtype: MetaDtype = meta_dtype
        self.empty_meta = empty_meta
        self._beside: dict[Path, bytes] = {}
        check_output(self.path, append=append, overwrite=overwrite)
        self._offsets, self._lengths = array("q"), array("q")
        self._size = 0
        self._temporary = temporary_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if append and self.path.exists():
                self._take_existing()
            self._file = open(self._temporary, "ab")  # noqa: SIM115 - lives until commit or discard
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise

    @property
    def num_samples(self) -> int:
        """Samples in the bin so far, those that were appended to included."""
        return len(self._offsets)

    @property
    def num_tokens(self) -> int:
        return int(_as_int64(self._lengths).sum())

    @property
    def num_bytes(self) -> int:
        return self._size

    def write(self, tokens: Sequence[int]) -> None:
        """Add one sample; ids signed as they shall stand on disk."""
        if self.meta_dtype == "int32" and self._size > np.iinfo(np.int32).max:
            message = "an int32 meta cannot address a bin beyond 2 GiB; write int64 (without --compat reference) "
            raise DataFormatError(message + "or split the input", path=str(self.path), line=self.num_samples + 1)
        line = encode_line(tokens)
        self._file.write(line)
        self._offsets.append(self._size)
        self._lengths.append(len(tokens))
        self._size += len(line)

    def put_beside(self, suffix: str, content: bytes) -> None:
        """A file `BIN + suffix` that appears together with the bin."""
        self._beside[Path(f"{self.path}{suffix}")] = content

    def commit(self) -> None:
        """Flush to disk, rename what belongs beside the bin, the meta, then the bin into place."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        table = meta_table(_as_int64(self._offsets), _as_int64(self._lengths), dtype=self.meta_dtype)
        if self.empty_meta and not len(table):
            table = np.zeros(0, dtype=self.empty_meta)
        for target, content in {**self._beside, meta_path(self.path): npy_bytes(table)}.items():
            write_whole(target, content)
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Leave the disk as it was."""
        with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()  # nothing is left of a commit that succeeded

    def _take_existing(self) -> None:
        """Start from a copy, so that a failed append leaves the old pair as it was."""
        try:
            reader = Reader(self.path)
            offsets, lengths = reader.offsets, reader.lengths
        except DataFormatError:
            offsets, lengths = scan(self.path)  # a meta that does not fit is made new, a torn bin is an error
        shutil.copyfile(self.path, self._temporary)
        self._offsets, self._lengths = array("q", offsets.tobytes()), array("q", lengths.tobytes())
        self._size = os.path.getsize(self.path)
        with open(self.path, "rb") as file:
            if self._size and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                message = (
                    "the last line lacks its end, so nothing can be appended; use --overwrite, or end it with a newline"
                )
                raise DataFormatError(message, path=str(self.path), line=len(offsets))


def check_output(path: str | os.PathLike[str], *, append: bool, overwrite: bool, can_append: bool = True) -> None:
    """Refuse an output that would be lost, or that cannot be a file.

    Args:
        can_append: The caller has an `--append` to offer.

    A meta without its bin is what an interrupted writer leaves: it is replaced.
    """
    if append and overwrite:
        raise DataFormatError("--append and --overwrite exclude each other", path=os.fspath(path))
    if os.path.isdir(path):
        raise DataFormatError("the output is a folder; name a file in it, such as out.bin", path=os.fspath(path))
    if os.path.exists(path) and not (append or overwrite):
        ways = "--append adds to it, --overwrite replaces it" if can_append else "--overwrite replaces it"
        raise DataFormatError(f"the output exists; {ways}", path=os.fspath(path))


def _as_int64(values: array[int]) -> IntArray:
    return np.frombuffer(values, dtype=np.int64).copy() if len(values) else np.zeros(0, dtype=np.int64)
