"""This project's own side: bin/meta as source and target of a conversion.

What preprocessing noted beside a bin (`X.bin.json`) travels along as long as it fits the samples.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internlm_ds.data import kernels
from internlm_ds.data.binmeta import IntArray, Reader, Writer, encode_line, join_signed_tokens, split_signed_tokens
from internlm_ds.data.bintext import BinText
from internlm_ds.data.foreign.blocks import Block, Source, spans

# numba's start, and the first time its compiling, pay from here on
_KERNEL_BYTES, _KERNEL_TOKENS = 32_000_000, 4_000_000
_CHUNK_BYTES = 1 << 22


def read_internlm(path: str) -> Source:
    """
    Raises:
        DataFormatError: Bin or meta is missing, damaged, or they do not fit each other; here or when it is read.
    """
    reader = Reader(path)
    size = os.path.getsize(path)
    if size > _KERNEL_BYTES:
        kernels.load()
    masked = functools.cache(lambda: _has_minus(path))

    def blocks() -> Iterator[Block]:
        text = BinText(path)
        for first, last in spans(reader.lengths):
            raw = text.read_rows(reader.offsets[first:last], reader.lengths[first:last])
            tokens, learned = split_signed_tokens(raw)
            text.files.get(text.path).forget()
            yield Block(tokens, learned if masked() else None, reader.lengths[first:last])

    note = _note(path, samples=len(reader), tokens=reader.num_tokens)
    return Source(path, size, len(reader), masked, note, blocks)


class InternlmTarget:
    """A bin, its meta, and the note beside them if one came along and fits."""

    def __init__(self, path: str, *, note: dict[str, Any] | None, overwrite: bool):
        self._writer, self._note = Writer(path, overwrite=overwrite), note
        self._largest, self._tokens = -1, 0

    def write(self, block: Block) -> None:
        self._largest = max(self._largest, int(block.tokens.max(initial=-1)))
        signed = block.tokens if block.learned is None else join_signed_tokens(block.tokens, block.learned)
        self._tokens += len(signed)
        data, sizes = lines(signed, block.lengths, compiled=self._tokens > _KERNEL_TOKENS)
        self._writer.write_rows(data, sizes, block.lengths)

    def __enter__(self) -> InternlmTarget:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        beside = Path(f"{self._writer.path}.json")
        if kind is not None:
            pass
        elif not fits(self._note, self._writer.num_samples, self._writer.num_tokens):
            beside.unlink(missing_ok=True)  # one of an older bin says nothing about this one
        elif self._note:
            counts = {**self._note["counts"], "bytes": self._writer.num_bytes, "largest_id": self._largest}
            note = {**self._note, "counts": counts}
            self._writer.put_beside(".json", (json.dumps(note, indent=2, ensure_ascii=False) + "\n").encode())
        self._writer.__exit__(kind, *rest)


def lines(signed: IntArray, lengths: IntArray, *, compiled: bool) -> tuple[Any, IntArray]:
    """The lines of samples behind one another, and the bytes of each.

    Args:
        signed: int64 `(sum(lengths),)`, as on disk.
        compiled: By the kernel, if numba can be used.
    """
    kernel = _line_kernel() if compiled else None
    sizes = np.empty(len(lengths), dtype=np.int64)
    if kernel is not None:
        out = np.empty(kernel.LINE_BYTES * len(lengths) + kernel.TOKEN_BYTES * len(signed), dtype=np.uint8)
        return out[: kernel.format_rows(signed, np.ascontiguousarray(lengths), out, sizes)], sizes
    ends = np.cumsum(lengths)
    text = [encode_line(signed[end - length : end].tolist()) for end, length in zip(ends.tolist(), lengths.tolist())]
    sizes[:] = [len(line) for line in text]
    return b"".join(text), sizes


@functools.cache
def _line_kernel() -> Any:
    try:
        from internlm_ds.data.foreign import line_kernel
    except Exception:  # numba absent, too new for this Python, or without a place for its cache
        return None
    return line_kernel


def fits(note: Any, samples: int, tokens: int) -> bool:
    """A note that speaks of other samples is none."""
    counts = note.get("counts") if isinstance(note, dict) else None
    return isinstance(counts, dict) and (counts.get("samples"), counts.get("tokens")) == (samples, tokens)


def _note(path: str, *, samples: int, tokens: int) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if fits(note, samples, tokens) else None


def _has_minus(path: str) -> bool:
    """Whether any token is input only: in a bin a minus stands nowhere else."""
    with open(path, "rb") as file:
        return any(b"-" in chunk for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))
