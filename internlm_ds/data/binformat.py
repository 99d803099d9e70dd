"""The lines of a bin and the table of its meta, as bytes; files that appear whole or not at all.

`binmeta` reads and writes the pair with what stands here, and is what other rooms import.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from internlm_ds.errors import DataFormatError

IntArray = npt.NDArray[np.int64]
MetaDtype = Literal["int64", "int32"]

REMEDY = "tokenize the text again (internlm-ds preprocess … --overwrite), or write a sound copy with "
REMEDY += "internlm-ds data repair PATH -o OUT"


def meta_path(path: str | os.PathLike[str]) -> Path:
    """The meta file of a bin: its name with `.meta` behind it."""
    return Path(f"{os.fspath(path)}.meta")


def encode_line(tokens: Sequence[int]) -> bytes:
    """One line of a bin, blanks as `json.dumps` sets them.

    >>> encode_line([1, -2])
    b'{"tokens": [1, -2]}\\n'
    """
    return b'{"tokens": [' + ", ".join(map(str, tokens)).encode("ascii") + b"]}\n"


def decode_line(text: bytes, *, path: str, line: int, offset_bytes: int | None = None) -> IntArray:
    """Tokens of one line of a bin, int64, signed as on disk.

    Raises:
        DataFormatError: The line is no JSON object with a flat list of integers under "tokens".
    """

    def bad(what: str) -> DataFormatError:
        message = f'{what}; a line of a bin reads {{"tokens": [1, 2, 3]}}. To mend it: {REMEDY}'
        return DataFormatError(message, path=path, line=line, offset_bytes=offset_bytes)

    try:
        record = json.loads(text)
    except ValueError:
        raise bad(f"torn or damaged line {_shown(text)}") from None
    if not isinstance(record, dict) or not isinstance(record.get("tokens"), list):
        raise bad(f"no list of tokens in {_shown(text)}")
    values = record["tokens"]
    if not values:
        return np.zeros(0, dtype=np.int64)
    try:
        tokens = np.array(values)
    except ValueError:
        raise bad(f"tokens that are no flat list of integers in {_shown(text)}") from None
    if tokens.dtype != np.int64 or tokens.ndim != 1:
        raise bad(f"tokens that are no flat list of integers in {_shown(text)}")
    return tokens


def read_meta(path: str | os.PathLike[str]) -> tuple[IntArray, IntArray]:
    """Offsets and lengths (int64) from the meta of the bin `path`; int32 and int64 files are read.

    Lengths are the last column, as in InternEvo. An empty meta may have any shape and type: the reference writes some.

    Raises:
        DataFormatError: The meta is missing or is no `(n, 2)` table of integers.
    """
    target = meta_path(path)
    if not target.is_file():
        raise DataFormatError(f"the meta file {target} is missing. To mend it: {REMEDY}", path=os.fspath(path))
    try:
        with open(target, "rb") as file:
            table = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataFormatError(f"no numpy file of integers ({error}). To mend it: {REMEDY}", path=str(target)) from None
    if table.size == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if table.ndim != 2 or table.shape[1] < 2 or table.dtype.kind not in "iu":
        found = f"{table.dtype} of shape {table.shape}"
        message = f"a meta is a table of integers of shape (n, 2), this is {found}. To mend it: {REMEDY}"
        raise DataFormatError(message, path=str(target))
    return table[:, 0].astype(np.int64), table[:, -1].astype(np.int64)


def temporary_name(path: Path) -> Path:
    """Hidden neighbour of `path`: same file system, never taken for a bin by a reader of the folder."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, flush it to disk, rename it into place."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def meta_table(offsets: IntArray, lengths: IntArray, *, dtype: MetaDtype) -> npt.NDArray[Any]:
    return np.ascontiguousarray(np.stack([offsets, lengths], axis=1), dtype=dtype)


def npy_bytes(table: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _shown(text: bytes, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + b"...")
