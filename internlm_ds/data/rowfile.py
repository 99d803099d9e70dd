"""Finished rows of a bin and of its meta as they go to disk, under names that the caller changes when all is whole.

Offsets are running sums of row sizes and are written as they come, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from internlm_ds.data.binformat import IntArray, MetaDtype, meta_table
from internlm_ds.errors import DataFormatError

HEADER_BYTES = 128  # of a numpy file with a table of two columns, however many rows


class RowFile:
    """One bin and its meta while they grow.

    Attributes:
        num_bytes, num_samples, num_tokens: What the bin holds so far.

    Args:
        bin_path, table_path: Where they grow; `finish` makes both whole, the caller moves them.
        shown: Name of the output in errors.
        meta_dtype: "int64", or "int32", which limits the bin to 2 GiB.
        empty_meta: Type of the meta of shape (0,) where there is no sample; None writes shape (0, 2).
        num_bytes, num_samples, num_tokens: Keep so much of what lies there and go on behind it.
    """

    def __init__(
        self,
        bin_path: Path,
        table_path: Path,
        *,
        shown: str,
        meta_dtype: MetaDtype = "int64",
        empty_meta: str | None = None,
        num_bytes: int = 0,
        num_samples: int = 0,
        num_tokens: int = 0,
    ):
        self.num_bytes, self.num_samples, self.num_tokens = num_bytes, num_samples, num_tokens
        self._shown, self._dtype, self._empty_meta = shown, np.dtype(meta_dtype), empty_meta
        self._open_row = 0  # bytes of a row whose end has not come
        self._bin = _opened(bin_path, num_bytes)
        self._table = _opened(table_path, HEADER_BYTES + num_samples * 2 * self._dtype.itemsize)

    def write_rows(self, data: Any, sizes: IntArray, lengths: IntArray) -> None:
        """Add whole lines: their bytes, and for each its size with the newline and its number of tokens."""
        if not len(sizes):
            return
        offsets = np.cumsum(sizes)
        offsets += self.num_bytes - sizes
        self._check_reach(offsets)
        self._write(self._bin, data)
        self._write(self._table, meta_table(offsets, lengths, dtype=self._dtype.name))
        self.num_bytes += int(sizes.sum())
        self.num_samples += len(sizes)
        self.num_tokens += int(lengths.sum())

    def write_part(self, data: Any) -> None:
        """Add a part of a line that is too long to be held; `end_row` closes it."""
        self._write(self._bin, data)
        self._open_row += len(data)

    def end_row(self, num_tokens: int) -> None:
        """Count the parts since the last row as one of so many tokens; the last part ended with a newline."""
        self._check_reach(np.array([self.num_bytes]))
        row = np.array([[self.num_bytes, num_tokens]], dtype=self._dtype)
        self._write(self._table, row)
        self.num_bytes, self._open_row = self.num_bytes + self._open_row, 0
        self.num_samples, self.num_tokens = self.num_samples + 1, self.num_tokens + num_tokens

    def handles(self) -> tuple[int, int]:
        """Duplicates of both descriptors, for a thread that brings them to disk and closes them."""
        return os.dup(self._bin.fileno()), os.dup(self._table.fileno())

    def finish(self) -> None:
        """Head of the table, all on disk, closed."""
        header = self._header()
        assert len(header) == HEADER_BYTES, len(header)
        self._table.seek(0)
        self._write(self._table, header)
        for file in (self._bin, self._table):
            os.fsync(file.fileno())
            file.close()

    def close(self) -> None:
        self._bin.close()
        self._table.close()

    def _header(self) -> bytes:
        if self._empty_meta and not self.num_samples:
            return _npy_header((0,), np.dtype(self._empty_meta))
        return _npy_header((self.num_samples, 2), self._dtype)

    def _check_reach(self, offsets: IntArray) -> None:
        largest = np.iinfo(self._dtype).max
        if offsets[-1] > largest:
            message = "an int32 meta cannot address a bin beyond 2 GiB; write int64 (without --compat reference) "
            line = self.num_samples + int(np.searchsorted(offsets, largest, side="right")) + 1
            raise DataFormatError(message + "or split the input", path=self._shown, line=line)

    def _write(self, file: IO[bytes], data: Any) -> None:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            # the system names no file here
            raise OSError(error.errno, f"cannot be written: {os.strerror(error.errno or 0)}", self._shown) from None


def _opened(path: Path, keep: int) -> IO[bytes]:
    """An unbuffered file that begins with the first `keep` bytes of what lies there."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    if keep > HEADER_BYTES and os.fstat(file.fileno()).st_size < keep:
        file.close()
        message = "shorter than the journal beside it says; start over without --resume"
        raise DataFormatError(message, path=str(path))
    file.truncate(keep)
    file.seek(keep)
    return file


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
