"""Writing a bin, sample by sample: it and its meta grow under hidden names until both are whole.

What goes to disk is `rowfile`'s, the hidden folder `partial`'s; an existing bin that is to grow is copied here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binformat import IntArray, MetaDtype, encode_line, meta_path, meta_table
from internlm_ds.data.binreader import Reader, scan
from internlm_ds.data.partial import PartialOutput
from internlm_ds.data.rowfile import HEADER_BYTES, RowFile
from internlm_ds.errors import DataFormatError

ROWS_NAME, TABLE_NAME = "00000.rows", "00000.table"  # of the first bin of an output, in its hidden folder
_PENDING_SAMPLES = 1024


class Writer:
    """Writes a bin and its meta under hidden names; both appear whole on `commit`, or not at all.

    Used as a context manager it commits at the end and discards on an exception.

    Args:
        path: The bin to make; its folder is created.
        append: Keep the samples of an existing bin before the new ones (the reference's habit).
        overwrite: Replace an existing bin. With neither, an existing bin is an error.
        meta_dtype: "int64"; "int32" as the reference's text tool writes it, which limits the bin to 2 GiB.
        empty_meta: Type of the meta of shape (0,) that is written where there is no sample, as the reference's tools
            do; None writes shape (0, 2).

    Raises:
        DataFormatError: The output exists, cannot be appended to, or is being written by another process.
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
        self._beside: list[tuple[str, bytes]] = []
        check_output(self.path, append=append, overwrite=overwrite)
        self._partial = PartialOutput(self.path)
        self._pending: list[bytes] = []
        self._pending_tokens: list[int] = []
        self._pending_bytes = 0
        self._partial.open()
        try:
            self._partial.clear()
            check_output(self.path, append=append, overwrite=overwrite)  # another may have finished it meanwhile
            self._file = open_rows(
                self._partial, self.path, append=append, meta_dtype=meta_dtype, empty_meta=empty_meta
            )
        except BaseException:
            self._partial.discard()
            raise

    @property
    def num_samples(self) -> int:
        """Samples in the bin so far, those that were appended to included."""
        return self._file.num_samples + len(self._pending)

    @property
    def num_tokens(self) -> int:
        return self._file.num_tokens + sum(self._pending_tokens)

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes + self._pending_bytes

    def write(self, tokens: Sequence[int]) -> None:
        """Add one sample; ids signed as they shall stand on disk."""
        self.write_line(encode_line(tokens), len(tokens))

    def write_line(self, line: bytes, num_tokens: int) -> None:
        """Add one sample that is a line of a bin already, of so many tokens."""
        self._pending.append(line)
        self._pending_tokens.append(num_tokens)
        self._pending_bytes += len(line)
        if len(self._pending) >= _PENDING_SAMPLES or self._pending_bytes >= 1 << 20:
            self._flush()

    def write_rows(self, data: Any, sizes: IntArray, lengths: IntArray) -> None:
        """Add finished lines, see `RowFile.write_rows`."""
        self._flush()
        self._file.write_rows(data, sizes, lengths)

    def put_beside(self, suffix: str, content: bytes) -> None:
        """A file `BIN + suffix` that appears together with the bin."""
        self._beside.append((suffix, content))

    def commit(self) -> None:
        """Flush to disk, rename what belongs beside the bin, the meta, then the bin into place."""
        self._flush()
        self._file.finish()
        for suffix, content in self._beside:
            write_new(self._partial.path(f"beside{suffix}"), content)
        moves = [(f"beside{suffix}", Path(f"{self.path}{suffix}")) for suffix, _ in self._beside]
        self._partial.move([*moves, (TABLE_NAME, meta_path(self.path)), (ROWS_NAME, self.path)])
        self._partial.discard()

    def discard(self) -> None:
        """Leave the disk as it was."""
        self._file.close()
        self._partial.discard()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()  # nothing is left of a commit that succeeded

    def _flush(self) -> None:
        if self._pending:
            sizes = np.array([len(line) for line in self._pending], dtype=np.int64)
            data, lengths = b"".join(self._pending), np.array(self._pending_tokens, dtype=np.int64)
            self._pending, self._pending_tokens, self._pending_bytes = [], [], 0
            self._file.write_rows(data, sizes, lengths)


def open_rows(
    partial: PartialOutput, path: Path, *, append: bool, meta_dtype: MetaDtype, empty_meta: str | None
) -> RowFile:
    """The one bin of an output, begun with a copy of the existing one for an append."""
    rows, table = partial.path(ROWS_NAME), partial.path(TABLE_NAME)
    kinds: Any = {"shown": str(path), "meta_dtype": meta_dtype, "empty_meta": empty_meta}
    if not (append and path.exists()):
        return RowFile(rows, table, **kinds)
    offsets, lengths = _existing(path)
    shutil.copyfile(path, rows)
    size = os.path.getsize(path)
    with open(table, "wb") as file:
        file.write(b"\0" * HEADER_BYTES)
        file.write(meta_table(offsets, lengths, dtype=meta_dtype).data)
    return RowFile(rows, table, num_bytes=size, num_samples=len(offsets), num_tokens=int(lengths.sum()), **kinds)


def _existing(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and lengths of a bin that is to grow; a meta that does not fit is made new, a torn bin is an error."""
    try:
        reader = Reader(path)
        offsets, lengths = reader.offsets, reader.lengths
    except DataFormatError:
        offsets, lengths = scan(path)
    with open(path, "rb") as file:
        if os.path.getsize(path) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            message = (
                "the last line lacks its end, so nothing can be appended; use --overwrite, or end it with a newline"
            )
            raise DataFormatError(message, path=str(path), line=len(offsets))
    return offsets, lengths


def write_new(path: Path, content: bytes) -> None:
    """A file that nobody looks at yet, on disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
