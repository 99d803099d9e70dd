"""What all formats have in common: samples travel in blocks, and a set of files appears whole or not at all.

A `Source` says what is in a file and hands its samples out block by block; a `Target` takes them. So memory is a block
(about a million tokens, or one sample if that is longer) and eight bytes a sample, whatever the size of a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binformat import IntArray, sync_folder, temporary_name
from internlm_ds.errors import DataFormatError

BLOCK_TOKENS = 1 << 20
TokenDtype = Literal["uint16", "int32", "int64"]
TOKEN_DTYPES: tuple[TokenDtype, ...] = ("uint16", "int32", "int64")


@dataclass(frozen=True)
class Block:
    """Some samples behind one another.

    Attributes:
        tokens: int64 `(T,)`, ids, none negative.
        learned: bool `(T,)`, False where the token is input only; None: all are learned.
        lengths: int64 `(n,)`, tokens of each sample; their sum is T.
    """

    tokens: IntArray
    learned: npt.NDArray[np.bool_] | None
    lengths: IntArray


@dataclass(frozen=True)
class Source:
    """What a file of some format holds.

    Attributes:
        path: The file, or what its files' names begin with.
        num_bytes: Of all its files.
        num_samples: In it.
        masked: Are some tokens input only? (A callable: to know it, a bin is searched.)
        note: What preprocessing recorded about the samples, if that travelled with them.
        blocks: Hands out all samples, in order.
    """

    path: str
    num_bytes: int
    num_samples: int
    masked: Callable[[], bool]
    note: dict[str, Any] | None
    blocks: Callable[[], Iterator[Block]]


class Target(Protocol):
    """A file in the making: a context manager that commits at the end and discards on an exception."""

    def write(self, block: Block) -> None: ...
    def __enter__(self) -> Target: ...
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


def spans(lengths: IntArray, *, block_tokens: int | None = None) -> Iterator[tuple[int, int]]:
    """First and last + 1 sample of blocks of about `block_tokens` tokens, `BLOCK_TOKENS` by default.

    >>> list(spans(np.array([4, 4, 4, 20, 1]), block_tokens=8))
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    block_tokens = block_tokens or BLOCK_TOKENS
    ends = np.cumsum(lengths, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + block_tokens, side="right")))
        yield first, min(last, first + block_tokens)
        first = min(last, first + block_tokens)


def checked_ids(block: Block, dtype: TokenDtype, *, path: str, first_sample: int) -> npt.NDArray[Any]:
    """The ids in the type of the file.

    Args:
        first_sample: Number of samples before the block.
    Raises:
        DataFormatError: One does not fit.
    """
    most = int(np.iinfo(dtype).max)
    if len(block.tokens) and int(block.tokens.max()) > most:
        at = int(np.argmax(block.tokens > most))
        sample = first_sample + int(np.searchsorted(np.cumsum(block.lengths), at, side="right")) + 1
        wider = next(other for other in TOKEN_DTYPES if np.iinfo(other).max > most)
        message = f"sample {sample} has the id {int(block.tokens[at])}, {dtype} ends at {most}; use --dtype {wider}"
        raise DataFormatError(message, path=path)
    return block.tokens.astype(dtype)


def check_ids(ids: npt.NDArray[Any], *, path: str, where: str, base_bytes: int | None = None) -> None:
    """Refuse negative ids in a foreign file, where the sign means nothing.

    Args:
        where: What the ids are a part of, for the message.
        base_bytes: Byte of the file at which they begin, if that can be told.
    """
    if ids.dtype.kind == "i" and len(ids) and int(ids.min()) < 0:
        index = int(np.argmax(ids < 0))
        offset = None if base_bytes is None else base_bytes + index * ids.dtype.itemsize
        message = f"the id {int(ids[index])} in {where}; ids are 0 or more, what is not learned is marked by a mask"
        raise DataFormatError(f"{message}. Write the file again", path=path, offset_bytes=offset)


@dataclass(frozen=True)
class Column:
    """Numbers behind one another in a file, read piece by piece: unlike a mapping, what was read does not pile up.

    Attributes:
        path: The file.
        dtype: Type of a number, as numpy names it (with its byte order).
        base_bytes: Byte of the file at which they begin.
    """

    path: str
    dtype: str
    base_bytes: int = 0

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def offset(self, index: int) -> int:
        """Byte of a number."""
        return self.base_bytes + index * self.itemsize

    def read(self, first: int, last: int) -> npt.NDArray[Any]:
        """Numbers `first` to `last - 1`.

        Raises:
            DataFormatError: The file ends before them.
        """
        found = np.fromfile(self.path, dtype=self.dtype, count=last - first, offset=self.offset(first))
        if len(found) != last - first:
            message = "the file has become shorter while it was read; convert again"
            raise DataFormatError(message, path=self.path, offset_bytes=self.offset(first + len(found)))
        return found


class WholeFiles:
    """Several files that belong together: written under temporary names, then renamed in the order of `targets`.

    Args:
        targets: Their names, the one that makes the set valid last.
        optional: Names that an older set may have and this one has not: removed before the renames.
        overwrite: Replace what exists; else that is an error.
    """

    def __init__(self, targets: Sequence[Path], *, optional: Sequence[Path] = (), overwrite: bool):
        self._targets, self._optional = list(targets), [path for path in optional if path not in targets]
        for path in (*self._targets, *self._optional):
            if path.is_dir():
                raise DataFormatError("the output is a folder; name a file", path=str(path))
            if path.exists() and not overwrite:
                raise DataFormatError("the output exists; --overwrite replaces it", path=str(path))
        self._files: list[IO[bytes]] = []
        self._stack = contextlib.ExitStack()

    def open(self) -> list[IO[bytes]]:
        """The files, in the order of `targets`."""
        self._targets[0].parent.mkdir(parents=True, exist_ok=True)
        for path in self._targets:
            self._files.append(self._stack.enter_context(temporary_name(path).open("w+b")))
        return self._files

    def commit(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._stack.close()
        # a set without its last file is no set: never an old one's end with a new one's beginning
        if len(self._targets) > 1 and self._targets[-1].exists():
            self._targets[-1].unlink()
        for path in self._optional:
            path.unlink(missing_ok=True)
        for path in self._targets:
            os.replace(temporary_name(path), path)
        sync_folder(self._targets[0].parent)

    def discard(self) -> None:
        """Leave the disk as it was."""
        with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._stack.close()
        for path in self._targets:
            temporary_name(path).unlink(missing_ok=True)


class FileTarget:
    """The common part of targets that are sets of files: commit at the end, discard on an exception."""

    def __init__(self, files: WholeFiles):
        self._whole = files
        self.files = files.open()

    def write(self, block: Block) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write what can be written only at the end."""

    def __enter__(self) -> FileTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
                self._whole.commit()
        finally:
            self._whole.discard()  # nothing is left of a commit that succeeded


def file_sizes(*paths: str | os.PathLike[str]) -> int:
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


ABOUT = ".about.json"


def about_bytes(kind: str, *, masked: bool, note: dict[str, Any] | None, **more: Any) -> bytes:
    """The file beside a foreign one that says what it is and carries what preprocessing recorded."""
    about = {"format": kind, "loss_mask": masked, **more, "note": note}
    return (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()


def read_note(path: str) -> dict[str, Any] | None:
    """What preprocessing recorded, from such a file; None where there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    note = found.get("note") if isinstance(found, dict) else None
    return note if isinstance(note, dict) else None
