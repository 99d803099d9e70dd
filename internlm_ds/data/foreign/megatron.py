"""Megatron's indexed dataset: `PREFIX.bin` (ids, nothing else) and `PREFIX.idx` (how long each sequence is).

The index, little endian (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`; also read by GPT-NeoX, NeMo,
Megatron-DeepSpeed):

    offset  bytes  what
    0       9      "MMIDIDX" and two zero bytes
    9       8      uint64 version, 1
    17      1      uint8 type of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    18      8      uint64 n, number of sequences
    26      8      uint64 d, entries of the document index
    34      4n     int32 ids of each sequence
    …       8n     int64 byte in PREFIX.bin where each sequence begins
    …       8d     int64 document index: number of the sequence with which each document begins, and n at the end

Ids have no sign there. What is not learned stands in a second indexed dataset of uint8, `PREFIX_loss_mask.bin` and
`.idx`, with the same sequences: 1 where the token may be a target. It exists only if there is something to mask.
A sample is a document; one of several sequences is read as one sample.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()}
MASK = "_loss_mask"
PARTS = (".bin", ".idx", f"{MASK}.bin", f"{MASK}.idx", ABOUT)
_REMEDY = "copy both files again, or write them again with the tool that made them"


def prefix_of(path: str) -> str:
    """What the names of the files begin with: `PREFIX`, `PREFIX.idx` and `PREFIX.bin` all name it.

    >>> prefix_of("a/b.idx"), prefix_of("a/b")
    ('a/b', 'a/b')
    """
    stem, ending = os.path.splitext(path)
    return stem if ending in (".idx", ".bin") else path


class Index(NamedTuple):
    """What an .idx says: type of the ids, ids of each sequence, first sequence of each document and their number."""

    dtype: str
    lengths: IntArray
    documents: IntArray

    @property
    def sample_lengths(self) -> IntArray:
        """Ids of each document, int64."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        found: IntArray = np.diff(ends[self.documents])
        return found


def index_bytes(lengths: npt.ArrayLike, dtype: str) -> bytes:
    """An .idx whose every sequence is a document.

    >>> index_bytes([2], "int32")[:18]
    b'MMIDIDX\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x04'
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(sizes, dtype=np.int64)
    pointers = (ends - sizes) * np.dtype(dtype).itemsize
    documents = np.arange(len(sizes) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], len(sizes), len(documents))
    return header + sizes.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + documents.tobytes()


def read_index(path: str) -> Index:
    """
    Raises:
        DataFormatError: It is no index, one of another version or type, torn, or its parts contradict each other.
    """

    def bad(what: str, offset: int) -> DataFormatError:
        return DataFormatError(f"{what}; {_REMEDY}", path=path, offset_bytes=offset)

    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataFormatError(f"cannot be read: {error.strerror}", path=path) from None
    if len(content) < HEADER.size or content[:9] != MAGIC:
        raise bad(f"no Megatron index: it begins with {content[:9]!r}, not {MAGIC!r} and a header", 0)
    _, version, code, count, documents = HEADER.unpack_from(content)
    if version != VERSION:
        raise bad(f"version {version} of the index, this reads version {VERSION}", 9)
    if code not in DTYPES or DTYPES[code].startswith("float"):
        raise bad(f"type {code} ({DTYPES.get(code, 'unknown')}) of the ids; token ids are integers", 17)
    wanted = HEADER.size + 12 * count + 8 * documents
    if len(content) == wanted + count and count:
        raise bad("an index with a mode for each sequence (several modalities), which bin/meta cannot hold", wanted)
    if len(content) != wanted:
        what = f"{len(content)} bytes where {count} sequences and {documents} entries of documents need {wanted}"
        raise bad(f"torn or too long: {what}", min(len(content), wanted))
    lengths = np.frombuffer(content, "<i4", count, HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", count, HEADER.size + 4 * count)
    starts = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * count).astype(np.int64)
    if (lengths < 0).any():
        at = int(np.argmax(lengths < 0))
        raise bad(f"sequence {at + 1} has {int(lengths[at])} ids", HEADER.size + 4 * at)
    expected = (np.cumsum(lengths) - lengths) * np.dtype(DTYPES[code]).itemsize
    if (pointers != expected).any():
        at = int(np.argmax(pointers != expected))
        what = f"sequence {at + 1} begins at byte {int(pointers[at])} of the bin, those before it end at {expected[at]}"
        raise bad(what, HEADER.size + 4 * count + 8 * at)
    if not documents or starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
        raise bad(f"the document index does not run from 0 to {count}", HEADER.size + 12 * count)
    return Index(DTYPES[code], lengths, starts)


def read_megatron(path: str) -> Source:
    """
    Args:
        path: The prefix, or one of the two files.
    Raises:
        DataFormatError: A file is missing, damaged, or they do not fit each other; here or when it is read.
    """
    prefix = prefix_of(path)
    index = read_index(f"{prefix}.idx")
    _check_size(prefix, index)
    masked = os.path.exists(f"{prefix}{MASK}.idx") or os.path.exists(f"{prefix}{MASK}.bin")
    mask = read_index(f"{prefix}{MASK}.idx") if masked else None
    if mask is not None:
        _check_size(f"{prefix}{MASK}", mask)
        if not np.array_equal(mask.lengths, index.lengths):
            message = f"its sequences have other lengths than those of {prefix}.idx; {_REMEDY}, or remove the mask"
            raise DataFormatError(message, path=f"{prefix}{MASK}.idx")

    def blocks() -> Iterator[Block]:
        lengths = index.sample_lengths
        column = _column(f"{prefix}.bin", index)
        marks = None if mask is None else _column(f"{prefix}{MASK}.bin", mask)
        at = 0
        for first, last in spans(lengths):
            end = at + int(lengths[first:last].sum())
            ids = column.read(at, end)
            check_ids(ids, path=column.path, where=f"documents {first + 1} to {last}", base_bytes=column.offset(at))
            learned = None if marks is None else marks.read(at, end) != 0
            yield Block(ids.astype(np.int64), learned, lengths[first:last])
            at = end

    size = file_sizes(*(f"{prefix}{part}" for part in PARTS))
    return Source(prefix, size, len(index.documents) - 1, lambda: masked, read_note(f"{prefix}{ABOUT}"), blocks)


class MegatronTarget(FileTarget):
    """`PREFIX.bin`, `PREFIX.idx`, the mask if something is masked, and `PREFIX.about.json`, which says what it is."""

    def __init__(self, path: str, *, masked: bool, dtype: TokenDtype, note: dict[str, Any] | None, overwrite: bool):
        self._prefix, self._dtype, self._masked, self._note = prefix_of(path), dtype, masked, note
        names = [f"{MASK}.bin", f"{MASK}.idx"]
        own = [*(names if masked else []), ABOUT, ".bin", ".idx"]
        paths = [Path(f"{self._prefix}{name}") for name in own]
        super().__init__(
            WholeFiles(paths, optional=[Path(f"{self._prefix}{name}") for name in names], overwrite=overwrite)
        )
        self._lengths = array("q")

    def write(self, block: Block) -> None:
        if len(block.lengths) and int(block.lengths.max()) > np.iinfo(np.int32).max:
            raise DataFormatError("a sample has more than 2^31 - 1 tokens, Megatron's limit", path=self._prefix)
        ids = checked_ids(block, self._dtype, path=self._prefix, first_sample=len(self._lengths))
        self.files[-2].write(ids.tobytes())
        if self._masked:
            learned = np.ones(len(ids), np.uint8) if block.learned is None else block.learned.astype(np.uint8)
            self.files[0].write(learned.tobytes())
        self._lengths.extend(block.lengths.tolist())

    def finish(self) -> None:
        self.files[-1].write(index_bytes(self._lengths, self._dtype))
        if self._masked:
            self.files[1].write(index_bytes(self._lengths, "uint8"))
        self.files[-3].write(about_bytes("megatron", masked=self._masked, note=self._note, dtype=self._dtype))


def _check_size(prefix: str, index: Index) -> None:
    """Refuse a bin that its index does not describe."""
    path = f"{prefix}.bin"
    if not os.path.isfile(path):
        raise DataFormatError(f"no such file; {prefix}.idx describes it: {_REMEDY}", path=path)
    wanted = int(index.lengths.sum()) * np.dtype(index.dtype).itemsize
    found = os.path.getsize(path)
    if found != wanted:
        message = f"{found} bytes where {prefix}.idx describes {wanted}; {_REMEDY}"
        raise DataFormatError(message, path=path, offset_bytes=min(found, wanted))


def _column(path: str, index: Index) -> Column:
    return Column(path, np.dtype(index.dtype).newbyteorder("<").str)
