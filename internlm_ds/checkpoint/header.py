"""The header of a safetensors file: which tensor lies where. Without torch; nothing in the file is trusted.

Source: the safetensors format: 8 bytes little-endian header length, a JSON header, the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_ds.errors import CheckpointDamagedError

MAX_BYTES = 100_000_000  # as the library
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype's code, its shape, and its bytes `[start, stop)` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name.

    Raises:
        CheckpointDamagedError: It is no safetensors file, is cut, or its header does not fit it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_BYTES):
                raise ValueError(f"{size} bytes, its header alone would have {length}")
            entries = _parse(json.loads(file.read(length)), data_at=8 + length)
        end = max((entry.stop for entry in entries.values()), default=8 + length)
        if size != end:
            raise ValueError(f"{size} bytes, its header says {end}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise CheckpointDamagedError(f"{path}: not a readable safetensors file: {what}") from error
    return entries


def _parse(header: dict[str, Any], *, data_at: int) -> dict[str, Entry]:
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(value["shape"]), value["data_offsets"]
        entry = Entry(value["dtype"], shape, data_at + start, data_at + stop)
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"{name!r} has no place")
        item = ITEM_BYTES.get(entry.dtype)
        if item is not None and math.prod(shape) * item != stop - start:
            raise ValueError(f"{name!r}: {stop - start} bytes for {entry.dtype} {list(shape)}")
        entries[name] = entry
    return entries
