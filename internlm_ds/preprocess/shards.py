"""The bins of a run while they grow: which row goes into which, who brought what, what a later process needs to go on.

Without a shard size there is one bin, `OUT.bin`. With one, `OUT-00000.bin`, `OUT-00001.bin`, …: a bin is closed by the
row with which it reaches the size, so which row goes where depends on the rows alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm_ds.data.binformat import MetaDtype, meta_path
from internlm_ds.data.binwriter import ROWS_NAME, open_rows, write_new
from internlm_ds.data.partial import PartialOutput
from internlm_ds.data.rowfile import RowFile
from internlm_ds.preprocess.pipeline import largest_id
from internlm_ds.preprocess.provenance import provenance_path
from internlm_ds.preprocess.rows import Rows


def shard_path(output: Path, index: int) -> Path:
    """The name of a shard.

    >>> shard_path(Path("cn/web.bin"), 3).as_posix()
    'cn/web-00003.bin'
    """
    return output.with_name(f"{output.stem}-{index:05d}{output.suffix}")


def existing_outputs(output: Path) -> list[Path]:
    """The bin and the shards of an output that are there."""
    pattern = re.compile(re.escape(output.stem) + r"-\d{5}" + re.escape(output.suffix))
    try:
        names = sorted(path.name for path in output.parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [output.with_name(name) for name in names if name == output.name or pattern.fullmatch(name)]


@dataclass
class Tally:
    """What one source brought to one shard."""

    shard: int
    source: int
    samples: int = 0
    tokens: int = 0
    empty: int = 0
    largest_id: int = -1


@dataclass
class ShardSize:
    """How far a shard has grown."""

    num_bytes: int
    num_samples: int
    num_tokens: int


class Shards:
    """Writes rows to the bins of an output.

    Attributes:
        tallies: One for each shard and source, in their order.
    """

    def __init__(
        self,
        partial: PartialOutput,
        *,
        shard_bytes: int | None,
        meta_dtype: MetaDtype,
        empty_meta: str | None,
        append: bool = False,
        state: dict[str, Any] | None = None,
    ):
        self._partial, self._shard_bytes = partial, shard_bytes
        self._kinds: dict[str, Any] = {"meta_dtype": meta_dtype, "empty_meta": empty_meta}
        self.tallies: list[Tally] = [Tally(**tally) for tally in state["tallies"]] if state else []
        self._closed: list[ShardSize] = []
        if state:
            *closed, current = [ShardSize(**shard) for shard in state["shards"]]
            self._closed = closed
            self._file = self._opened(len(closed), current)
        else:
            self._file = open_rows(partial, partial.output, append=append, **self._kinds)
        self.kept = ShardSize(0, 0, 0) if state else self._size()  # what was there before an append

    def add(self, rows: Rows, *, source: int, empty: int) -> None:
        """Write rows of a source, and count the texts that were left out of it."""
        for part in self._by_room(rows):
            self._file.write_rows(part.data, part.sizes, part.lengths)
            tally = self._tally(source)
            tally.samples += len(part.sizes)
            tally.tokens += int(part.lengths.sum())
            tally.largest_id = max(tally.largest_id, part.largest_id)
        self._tally(source).empty += empty

    def add_part(self, data: bytes, *, source: int, begins: bool, largest: int) -> None:
        """Write a part of a row."""
        if begins and self._is_full():
            self._roll()
        self._file.write_part(data)
        tally = self._tally(source)
        tally.largest_id = max(tally.largest_id, largest)

    def end_row(self, num_tokens: int, *, source: int) -> None:
        """The parts so far are a row."""
        self._file.end_row(num_tokens)
        tally = self._tally(source)
        tally.samples, tally.tokens = tally.samples + 1, tally.tokens + num_tokens

    def state(self) -> dict[str, Any]:
        """What `__init__` takes to go on from here."""
        shards = [asdict(size) for size in [*self._closed, self._size()]]
        return {"shards": shards, "tallies": [asdict(tally) for tally in self.tallies]}

    def handles(self) -> tuple[int, ...]:
        """Descriptors of what `state` speaks of and is not on disk yet; the caller closes them."""
        return self._file.handles()

    def finish(self) -> list[ShardSize]:
        """Close the last bin; returns the sizes of all."""
        self._file.finish()
        return [*self._closed, self._size()]

    def close(self) -> None:
        self._file.close()

    def _tally(self, source: int) -> Tally:
        shard = len(self._closed)
        if not self.tallies or (self.tallies[-1].shard, self.tallies[-1].source) != (shard, source):
            self.tallies.append(Tally(shard, source))
        return self.tallies[-1]

    def _by_room(self, rows: Rows) -> Iterator[Rows]:
        """The rows, those of each shard together; opens the next shard where one is full."""
        if self._shard_bytes is None:
            yield rows
            return
        ends, begin, data = np.cumsum(rows.sizes), 0, memoryview(rows.data)
        while begin < len(ends):
            if self._is_full():
                self._roll()
            at = int(ends[begin] - rows.sizes[begin])
            stop = int(np.searchsorted(ends, at + self._shard_bytes - self._file.num_bytes)) + 1
            if begin == 0 and stop >= len(ends):
                yield rows
                return
            stop = min(stop, len(ends))
            chosen = bytes(data[at : int(ends[stop - 1])])
            yield Rows(chosen, rows.sizes[begin:stop], rows.lengths[begin:stop], largest_id(chosen))
            begin = stop

    def _is_full(self) -> bool:
        return self._shard_bytes is not None and self._file.num_samples > 0 and self._size_reached()

    def _size_reached(self) -> bool:
        return self._file.num_bytes >= (self._shard_bytes or 0)

    def _roll(self) -> None:
        self._file.finish()
        self._closed.append(self._size())
        self._file = self._opened(len(self._closed), ShardSize(0, 0, 0))

    def _opened(self, index: int, size: ShardSize) -> RowFile:
        rows, table, _ = part_names(index)
        shown = str(self._partial.output)
        grown, kinds = asdict(size), self._kinds
        return RowFile(self._partial.path(rows), self._partial.path(table), shown=shown, **grown, **kinds)

    def _size(self) -> ShardSize:
        return ShardSize(self._file.num_bytes, self._file.num_samples, self._file.num_tokens)


def part_names(index: int) -> tuple[str, str, str]:
    """Names of a shard's rows, table and provenance in the hidden folder."""
    number = f"{index:05d}"
    assert index or f"{number}.rows" == ROWS_NAME
    return f"{number}.rows", f"{number}.table", f"{number}.json"


def publish(partial: PartialOutput, *, count: int, sharded: bool) -> None:
    """Move the finished parts into place: what stands beside the bins, then the bins; older bins of the output go.

    May be called again when it was interrupted.
    """
    targets = [shard_path(partial.output, i) if sharded else partial.output for i in range(count)]
    moves: list[tuple[str, Path]] = []
    for index, target in enumerate(targets):
        _, table, record = part_names(index)
        moves += [(record, provenance_path(target)), (table, meta_path(target))]
    moves += [(part_names(index)[0], target) for index, target in enumerate(targets)]
    partial.move(moves)
    for old in existing_outputs(partial.output):
        if old not in targets:
            for path in (old, meta_path(old), provenance_path(old)):
                path.unlink(missing_ok=True)


def write_records(partial: PartialOutput, records: Sequence[bytes]) -> None:
    """Put the provenance of each shard among the parts."""
    for index, record in enumerate(records):
        write_new(partial.path(part_names(index)[2]), record)
