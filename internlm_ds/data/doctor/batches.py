"""A batch of a run for people to read: its micro-batches, the documents in each, what is learned of them.

Which documents these are is `data.trace`'s; how a document is shown is `display`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from internlm_ds.data.doctor import display
from internlm_ds.data.doctor.display import Decode, Run
from internlm_ds.data.packing import FixedSegmentPacker
from internlm_ds.data.trace import Piece, Trace, TracedBatch, TracedPack


def as_lines(
    trace: Trace,
    batch: TracedBatch,
    ranks: Sequence[int],
    decode: Decode | None,
    *,
    limit: int | None = None,
    color: bool = False,
) -> Iterator[str]:
    """The micro-batches of these data-parallel ranks, piece by piece.

    Args:
        decode: Ids to text; None shows ids.
        limit, color: As for `display.as_lines`.
    """
    yield f"batch {batch.index}, epoch {batch.epoch}{' (in skip_batches: never trained on)' if batch.skipped else ''}"
    for rank in ranks:
        for number, pack in enumerate(batch.ranks[rank]):
            tokens = sum(piece.stop - piece.start for piece in pack.pieces)
            documents = f"{tokens} tokens, {len(pack.pieces)} documents"
            yield f"rank {rank}, micro-batch {number} (pack {pack.number}): {documents}"
            for piece, runs in zip(pack.pieces, runs_of_pack(trace, pack)):
                yield f" {_where(piece)}"
                yield from display.as_lines(runs, decode, limit=limit, color=color)


def as_json(trace: Trace, batch: TracedBatch, ranks: Sequence[int], decode: Decode | None) -> dict[str, Any]:
    """`{"batch", "epoch", "skipped", "ranks": [{"rank", "micro_batches": [{"pack", "pieces": [...]}]}]}`."""
    found = [
        {
            "rank": rank,
            "micro_batches": [
                {"pack": pack.number, "pieces": _pieces(trace, pack, decode)} for pack in batch.ranks[rank]
            ],
        }
        for rank in ranks
    ]
    return {"batch": batch.index, "epoch": batch.epoch, "skipped": batch.skipped, "ranks": found}


def runs_of_pack(trace: Trace, pack: TracedPack) -> Iterator[list[Run]]:
    """The runs of each piece, segments numbered through the micro-batch."""
    packer, _ = trace.data.packs.locate(pack.number)
    rows = isinstance(packer, FixedSegmentPacker)
    segment = 0
    for piece in pack.pieces:
        tokens = trace.tokens(piece)
        if rows:
            segment = piece.place // trace.data.seq_len
        borders = display.segment_starts(len(tokens), seq_len=trace.data.seq_len, place=piece.place, rows=rows)
        yield display.runs_of(tokens, first=piece.start, borders=borders, segment=segment)
        segment += 1 + len(borders)


def _pieces(trace: Trace, pack: TracedPack, decode: Decode | None) -> list[dict[str, Any]]:
    return [
        {
            "file": piece.path,
            "line": piece.line,
            "type": piece.type_name,
            "start": piece.start,
            "stop": piece.stop,
            "length": piece.length,
            "place": piece.place,
            "runs": [run.as_json(decode) for run in runs],
        }
        for piece, runs in zip(pack.pieces, runs_of_pack(trace, pack))
    ]


def _where(piece: Piece) -> str:
    source = "synthetic sample" if piece.path is None else f"{piece.path}, line {piece.line}"
    part = "whole" if piece.stop - piece.start == piece.length else f"tokens {piece.start} to {piece.stop - 1}"
    return f"{source} ({piece.type_name}), {part} of {piece.length}, at {piece.place}"
