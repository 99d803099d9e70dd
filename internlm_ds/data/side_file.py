"""`X.bin.ids`: the ids of a bin as numbers of four bytes, beside the text that stays the truth.

Reading it needs no parsing: a long sample is not read whole for a piece of it, and batches come faster by another half.
It takes about 0.6 of the bin's size. It is a cache file (`cachefile`): two arrays behind one line of JSON, `starts`
(int64, samples + 1) and `ids` (int32, signed as in the bin). One that was made from another bin or meta is not used:
size and time of both are noted in it, and a few samples are compared with the text at every opening.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data import cachefile, kernels
from internlm_ds.data.binmeta import IntArray, Reader, meta_path
from internlm_ds.data.bintext import BinText, FileState
from internlm_ds.errors import DataFormatError

logger = logging.getLogger(__name__)

SUFFIX = ".ids"
_TOKENS_AT_ONCE = 1 << 20
_SAMPLES_TO_COMPARE = 8


class SideFile:
    """An open side file that fits its bin.

    Attributes:
        starts: int64 `(samples + 1,)`; sample i of the meta is `ids[starts[i]:starts[i + 1]]`.
        ids: int32 `(tokens,)`, signed as in the bin.
    """

    def __init__(self, cache: cachefile.CacheFile):
        self.cache = cache
        self.starts, self.ids = cache.arrays["starts"], cache.arrays["ids"]
        self._state = FileState.of(cache.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SideFile, (self.cache,))  # another process maps the file itself

    def read_rows(self, rows: npt.NDArray[np.integer], *, vocab_size: int | None) -> IntArray | None:
        """Ids of samples behind one another, int64; None if one is beyond the vocabulary, which the text names better.

        Raises:
            DataFormatError: The file has changed since it was opened.
        """
        self._check()
        begins, stops = self.starts[rows].tolist(), self.starts[rows + 1].tolist()
        if not begins:
            return np.zeros(0, dtype=np.int64)
        found = np.concatenate([self.ids[begin:stop] for begin, stop in zip(begins, stops)], dtype=np.int64)
        beyond = vocab_size is not None and len(found) and max(found.max(), -found.min()) >= vocab_size
        return None if beyond else found

    def _check(self) -> None:
        try:
            if FileState.of(self.cache.path) == self._state:
                return
        except OSError:
            pass
        message = "the side file has changed under this run; start the run again, with this file deleted if it is"
        raise DataFormatError(f"{message} not whole (it is made from the bin)", path=self.cache.path)


def find(path: str) -> SideFile | None:
    """The side file of the bin `path`, if there is one that fits; one that does not is named in the log."""
    place = path + SUFFIX
    found = cachefile.read(place)
    if found is None:
        return None
    try:
        if found.key["made_from"] == _made_from(path) and _equals_text(found, path):
            return SideFile(found)
    except (KeyError, IndexError, DataFormatError, OSError):
        pass
    logger.warning("%s was made from another bin or meta and is not used", place)
    return None


def find_or_make(path: str) -> SideFile | None:
    """The side file of a bin, made if there is none that fits; None, and a line in the log, where it cannot be.

    Processes that ask at once make it once.

    Raises:
        DataFormatError: The bin is damaged.
    """
    with cachefile.one_at_a_time(path, ready=lambda: cachefile.read(path + SUFFIX)):
        found = find(path)
        if found is None:
            try:
                make(path)
            except OSError as error:
                logger.warning("no side file for %s (%s): its text is read", path, error.strerror or error)
                return None
            found = find(path)
    return found


def make(path: str) -> int:
    """Write the side file of a bin, whole or not at all; returns the number of ids.

    Raises:
        DataFormatError: The bin is damaged, has changed meanwhile, or holds an id that needs more than four bytes.
        OSError: The folder cannot be written, or the disk is full.
    """
    made_from = _made_from(path)
    reader = Reader(path)
    kernels.load()
    starts = np.concatenate([[0], np.cumsum(reader.lengths, dtype=np.int64)])
    arrays = {
        "starts": cachefile.ArraySpec("<i8", len(starts), [starts]),
        "ids": cachefile.ArraySpec("<i4", int(starts[-1]), _blocks(path, reader, starts)),
    }
    cachefile.write(path + SUFFIX, {"made_from": made_from}, arrays)
    if _made_from(path) != made_from:
        raise DataFormatError("the bin or its meta was written to while its side file was made; do it again", path=path)
    return int(starts[-1])


def _blocks(path: str, reader: Reader, starts: IntArray) -> Iterator[npt.NDArray[np.int32]]:
    """All ids of a bin, in the order of its meta, a few megabytes at a time."""
    text = BinText(path)
    first = 0
    while first < len(reader):
        stop = max(first + 1, int(starts.searchsorted(starts[first] + _TOKENS_AT_ONCE, side="right")) - 1)
        ids = text.read_rows(reader.offsets[first:stop], reader.lengths[first:stop])
        text.files.get(path).forget()
        if len(ids) and max(ids.max(), -ids.min()) >= 2**31:
            raise DataFormatError("an id needs more than four bytes; such a bin has no side file", path=path)
        yield ids.astype(np.int32)
        first = stop


def _made_from(path: str) -> list[list[int]]:
    """Size and time of bin and meta."""
    states = FileState.of(path), FileState.of(str(meta_path(path)))
    return [[state.size, state.mtime_ns] for state in states]


def _equals_text(found: cachefile.CacheFile, path: str) -> bool:
    """A few samples, spread over the file, are those of the text."""
    meta = np.load(meta_path(path), mmap_mode="r", allow_pickle=False)
    starts, ids = found.arrays["starts"], found.arrays["ids"]
    if len(starts) != len(meta) + 1 or starts[-1] != len(ids):
        return False
    text = BinText(path)
    for row in {int(each) for each in np.linspace(0, len(meta) - 1, num=min(_SAMPLES_TO_COMPARE, len(meta)))}:
        if not np.array_equal(text.read(int(meta[row, 0]), int(meta[row, -1])), ids[starts[row] : starts[row + 1]]):
            return False
    return True
