"""The rows of one meta that a data set keeps, and their order of packing, which is made once and then mapped.

Opening a large file the first time reads its meta in pieces: does every row lie in the bin, which are long enough.
Their shuffled order, where each ends in the stream of tokens and where it lies in the bin go into a cache file beside
the bin (`.X.bin.order-MIN_LENGTH`, 20 bytes a sample), which all ranks share and later runs open in no time. It is made
anew when the meta, the bin, `min_length` or the seed is another. Small files are not worth a cache file.

`catalog` asks for this, `samples` reads by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data import cachefile
from internlm_ds.data.binmeta import IntArray, Reader, meta_path, read_meta
from internlm_ds.data.bintext import BinText, FileState
from internlm_ds.errors import DataFormatError

PACKING_SEED = 1024
SAMPLES_TO_CACHE = 100_000
_PIECE = 1 << 18  # rows read, or written, at a time

Lengths = npt.NDArray[np.int32] | IntArray


@dataclass(frozen=True)
class Order:
    """Samples in some order: what reading them needs.

    Attributes:
        rows: int32 or int64 `(n,)`, row of each sample in the meta, from 0 (its line in the bin, but for odd metas).
        offsets: int64 `(n,)`, where each sample's line begins.
        ends: int64 `(n,)`, tokens of all samples up to and including each.
        cache: The file that the arrays are mapped from, if they are.
    """

    rows: npt.NDArray[Any]
    offsets: IntArray
    ends: IntArray
    cache: cachefile.CacheFile | None = None

    @classmethod
    def mapped(cls, cache: cachefile.CacheFile) -> Order:
        return cls(cache.arrays["rows"], cache.arrays["offsets"], cache.arrays["ends"], cache)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.cache is not None:
            return (Order.mapped, (self.cache,))  # another process maps the file itself
        return (Order, (self.rows, self.offsets, self.ends))

    def take(self, chosen: IntArray) -> Order:
        """The samples named, in that order."""
        lengths = np.diff(self.ends, prepend=0)[chosen]
        return Order(self.rows[chosen], self.offsets[chosen], np.cumsum(lengths, dtype=np.int64))


@dataclass(frozen=True)
class Counts:
    """Samples and tokens of a file, and of those that are long enough."""

    samples: int
    tokens: int
    kept_samples: int
    kept_tokens: int


class MetaRows:
    """Rows of one meta with at least `min_length` tokens.

    Opening checks, as `binmeta.Reader` does, that meta and bin fit each other; a cache file vouches for that too.

    Args:
        path: The bin.
        min_length: Rows with fewer tokens are left out; 0 keeps all.
        seed: Of the order of packing.
        samples_to_cache: Smaller files get no cache file.

    Attributes:
        state: The bin as it was when it was looked at.
        counts: What is in the file, and what is kept.

    Raises:
        DataFormatError: Bin or meta is missing, damaged, or they do not fit each other.
    """

    def __init__(
        self, path: str, *, min_length: int, seed: int = PACKING_SEED, samples_to_cache: int = SAMPLES_TO_CACHE
    ):
        self.path, self.min_length, self.seed = path, min_length, seed
        self.samples_to_cache = samples_to_cache
        self._places = cachefile.places(path, f".order-{min_length}")
        self._states = _states(path)
        self.state = self._states[0]
        self._cached = self._find()
        self._table = None if self._cached else _Table.read(path, size=self.state.size)
        self.counts = Counts(**self._cached.key["counts"]) if self._cached else self._count()

    @property
    def is_cached(self) -> bool:
        """The order of packing lies on disk: it costs nothing to ask for."""
        return self._cached is not None

    def some(self, count: int) -> list[tuple[int, int]]:
        """(offset, length) of at most `count` rows kept, spread over the file; nothing is read for it."""
        if self._cached is not None:
            arrays = self._cached.arrays
            ends, at = arrays["ends"], _spread(self.counts.kept_samples, count)
            return [(int(arrays["offsets"][i]), int(ends[i] - (ends[i - 1] if i else 0))) for i in at]
        table = self._table or _Table.read(self.path, size=self.state.size)
        rows = self._kept(table)
        return [(int(table.offsets[row]), int(table.lengths[row])) for row in rows[_spread(len(rows), count)]]

    @cached_property
    def in_file_order(self) -> Order:
        """The rows kept as they follow one another in the meta."""
        table = self._table or _Table.read(self.path, size=self.state.size)
        return table.ordered(self._kept(table))

    @cached_property
    def in_packing_order(self) -> Order:
        """The rows kept, shuffled by the seed; mapped where they are cached.

        Source: InternEvo `PackedDataset.accu_sample_len`: `RandomState(seed).shuffle` of the numbers of samples kept.
        """
        if self._cached is None and self.counts.kept_samples >= self.samples_to_cache:
            with cachefile.one_at_a_time(str(meta_path(self.path)), ready=self._find):
                self._cached = self._find() or self._make()
        if self._cached is not None:
            self._table = None
            return Order.mapped(self._cached)
        assert self._table is not None, "a file that is not cached has been read"
        order, self._table = self._table.ordered(self._shuffled(self._table)), None
        return order

    def _kept(self, table: _Table) -> npt.NDArray[Any]:
        kind = np.int32 if len(table.lengths) < 2**31 else np.int64
        if self.min_length <= 0:
            return np.arange(len(table.lengths), dtype=kind)
        return np.flatnonzero(table.lengths >= self.min_length).astype(kind)

    def _shuffled(self, table: _Table) -> npt.NDArray[Any]:
        rows = self._kept(table)
        # what is swapped with what depends on how many there are, not on what they are
        np.random.RandomState(self.seed).shuffle(rows)
        return rows

    def _count(self) -> Counts:
        assert self._table is not None
        lengths = self._table.lengths
        kept = lengths[lengths >= self.min_length] if self.min_length > 0 else lengths
        return Counts(len(lengths), int(lengths.sum(dtype=np.int64)), len(kept), int(kept.sum(dtype=np.int64)))

    def _key(self, digest: str) -> dict[str, Any]:
        binary, meta = self._states
        return {
            "seed": self.seed,
            "min_length": self.min_length,
            "bin": [binary.size, binary.mtime_ns],
            "meta": [meta.size, meta.mtime_ns],
            "meta_sha256": digest,
            "counts": vars(self.counts),
        }

    def _find(self) -> cachefile.CacheFile | None:
        for place in self._places:
            found = cachefile.read(place)
            if found is not None and self._is_fresh(found):
                return found
        return None

    def _is_fresh(self, found: cachefile.CacheFile) -> bool:
        """The cache was made from these files; of a meta with another time (a copy), the content decides."""
        key, (binary, meta) = found.key, self._states
        wanted = {"seed": self.seed, "min_length": self.min_length, "bin": [binary.size, binary.mtime_ns]}
        try:
            count, tokens = key["counts"]["kept_samples"], key["counts"]["kept_tokens"]
            rows, offsets, ends = (found.arrays[name] for name in ("rows", "offsets", "ends"))
            whole = len(rows) == len(offsets) == len(ends) == count > 0 and ends[-1] == tokens
            if not whole or any(key[name] != value for name, value in wanted.items()) or key["meta"][0] != meta.size:
                return False
            return bool(key["meta"][1] == meta.mtime_ns or key["meta_sha256"] == _digest(self.path))
        except (KeyError, TypeError, IndexError):
            return False

    def _make(self) -> cachefile.CacheFile | None:
        """Write the cache file; None if there is no place for it."""
        table = self._table
        assert table is not None
        rows = self._shuffled(table)

        def arrays() -> dict[str, cachefile.ArraySpec]:
            count = len(rows)
            return {
                "rows": cachefile.ArraySpec(rows.dtype.str, count, [rows]),
                "offsets": cachefile.ArraySpec("<i8", count, (table.offsets[some] for some in _pieces(rows))),
                "ends": cachefile.ArraySpec("<i8", count, _running_sums(table.lengths, rows)),
            }

        place = cachefile.write_somewhere(self._places, self._key(_digest(self.path)), arrays)
        return None if place is None else cachefile.read(place)


@dataclass(frozen=True)
class _Table:
    """A whole meta: offsets int64 `(n,)`, lengths `(n,)`, of the smaller type that holds them."""

    offsets: IntArray
    lengths: Lengths

    @classmethod
    def read(cls, path: str, *, size: int) -> _Table:
        """Read the meta of `path` and check it against a bin of `size` bytes."""
        table = cls(*(_columns(path) or read_meta(path)))
        if not _fits(path, table, size=size):
            Reader(path)  # the slow way, which says what is wrong
        return table

    def ordered(self, rows: npt.NDArray[Any]) -> Order:
        return Order(rows, self.offsets[rows], np.cumsum(self.lengths[rows], dtype=np.int64))


def _columns(path: str) -> tuple[IntArray, Lengths] | None:
    """Both columns of an ordinary meta in pieces: its whole table would take twice the room. None for any other."""
    try:
        table = np.load(meta_path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(table, np.memmap) or table.ndim != 2 or table.shape[1] < 2 or table.dtype.kind not in "iu":
        return None
    if not table.flags.c_contiguous:
        return None
    offsets, lengths = np.empty(len(table), dtype=np.int64), np.empty(len(table), dtype=np.int32)
    with open(meta_path(path), "rb") as file:
        file.seek(table.offset)
        for at in range(0, len(table), _PIECE):
            count = min(_PIECE, len(table) - at) * table.shape[1]
            piece = np.fromfile(file, dtype=table.dtype, count=count).reshape(-1, table.shape[1])
            if piece[:, -1].max() >= 2**31 or piece[:, -1].min() < -(2**31):
                return None
            offsets[at : at + len(piece)], lengths[at : at + len(piece)] = piece[:, 0], piece[:, -1]
    return offsets, lengths


def _fits(path: str, table: _Table, *, size: int) -> bool:
    """All rows lie in the bin, and the last is its last line, whole: there an interrupted writer leaves its trace."""
    offsets, lengths = table.offsets, table.lengths
    if not len(offsets):
        return size == 0
    if offsets.min() < 0 or offsets.max() >= size or lengths.min() < 0:
        return False
    last = int(np.argmax(offsets))
    try:
        text = BinText(path)
        text.read(int(offsets[last]), int(lengths[last]))
        return text.end_of_line(int(offsets[last])) == size
    except DataFormatError:
        return False


def _states(path: str) -> tuple[FileState, FileState]:
    """Bin and meta as they are now."""
    try:
        return FileState.of(path), FileState.of(str(meta_path(path)))
    except OSError as error:
        Reader(path)  # says which is missing
        raise DataFormatError(f"the file cannot be looked at ({error})", path=path) from None


def _digest(path: str) -> str:
    with open(meta_path(path), "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _spread(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, the first and the last among them."""
    return sorted({int(each) for each in np.linspace(0, total - 1, num=min(count, total))})


def _pieces(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (rows[at : at + _PIECE] for at in range(0, len(rows), _PIECE))


def _running_sums(lengths: Lengths, rows: npt.NDArray[Any]) -> Iterator[IntArray]:
    total = 0
    for some in _pieces(rows):
        sums = np.cumsum(lengths[some], dtype=np.int64) + total
        total = int(sums[-1])
        yield sums
