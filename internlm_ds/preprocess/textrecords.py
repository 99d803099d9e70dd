"""What a run over texts leaves in words: the provenance of each bin, the summary that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_ds.preprocess import provenance
from internlm_ds.preprocess.shards import ShardSize, Tally
from internlm_ds.preprocess.textrun import TextReader
from internlm_ds.preprocess.tokenizers import Tokenizer


@dataclass(frozen=True)
class Summary:
    """What a run wrote: samples and tokens of this run, empty texts left out, size of its bins.

    Attributes:
        path: The bin, the first of several.
        paths: All of them.
        was_complete: Nothing was left to be done.
    """

    path: str
    samples: int
    tokens: int
    empty: int
    num_bytes: int
    paths: tuple[str, ...] = ()
    was_complete: bool = False

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        complete = "complete already, " if self.was_complete else ""
        text = (
            f"{self.path}{more}: {complete}{self.samples} samples, {self.tokens} tokens ({self.num_bytes} bytes in all)"
        )
        return text + (f"; {self.empty} empty texts left out" if self.empty else "")


def summary_of(paths: Sequence[Path], tallies: Sequence[Tally], sizes: Sequence[ShardSize]) -> Summary:
    samples, tokens, empty = (sum(getattr(tally, name) for tally in tallies) for name in ("samples", "tokens", "empty"))
    return Summary(str(paths[0]), samples, tokens, empty, sum(size.num_bytes for size in sizes), _texts(paths))


def _texts(paths: Sequence[Path]) -> tuple[str, ...]:
    return tuple(map(str, paths))


def complete_summary(paths: Sequence[Path]) -> Summary:
    """What is said of an output that is whole, from its provenance files."""
    counts = [(provenance.read(path) or {"counts": {}})["counts"] for path in paths]
    samples, tokens, empty, size = (
        sum(count.get(key) or 0 for count in counts) for key in ("samples", "tokens", "empty", "bytes")
    )
    return Summary(str(paths[0]), samples, tokens, empty, size, _texts(paths), was_complete=True)


def records_of(
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    reader: TextReader,
    tallies: Sequence[Tally],
    sizes: Sequence[ShardSize],
    shard_bytes: int | None,
) -> list[dict[str, Any]]:
    """The provenance of each shard: the sources that brought something to it, and their counts there.

    A source that brought nothing to any stands in the last.
    """
    records = []
    brought = {tally.source for tally in tallies}
    nothing = [Tally(len(sizes) - 1, index) for index in range(len(reader.sources)) if index not in brought]
    for shard, size in enumerate(sizes):
        mine = sorted((t for t in (*tallies, *nothing) if t.shard == shard), key=lambda tally: tally.source)
        entries = [_entry(reader, tally) for tally in mine]
        counts = {key: sum(entry[key] for entry in entries) for key in ("samples", "tokens", "empty")}
        counts |= {"bytes": size.num_bytes, "largest_id": max((0, *(tally.largest_id for tally in mine)))}
        more = {} if shard_bytes is None else {"shard": {"index": shard, "count": len(sizes), "bytes": shard_bytes}}
        record = provenance.describe(
            tokenizer, kind="text", settings={**settings, **more}, sources=entries, counts=counts
        )
        records.append(record)
    return records


def _entry(reader: TextReader, tally: Tally) -> dict[str, Any]:
    known = reader.done[tally.source]
    return {
        "path": reader.sources[tally.source].path,
        "bytes": known["bytes"],
        "sha256": known["sha256"],
        "samples": tally.samples,
        "tokens": tally.tokens,
        "empty": tally.empty,
    }
