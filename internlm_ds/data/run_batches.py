"""Batches of a run directory for people and programs: which documents they held, what it takes to leave them out.

Losses are read from metrics.jsonl, the rest follows from `record` and `trace`. Decoding is asked of the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from internlm_ds.data.record import Launch, UsedFile, launch_of, read_launches
from internlm_ds.data.trace import Piece, Trace, TracedBatch, skip_text
from internlm_ds.errors import DataFormatError
from internlm_ds.monitor.runs import read_run

Decode = Callable[[Sequence[int]], str]

SHOWN_CHARS = 160


class RunBatches:
    """The batches of a run directory.

    Attributes:
        launches: The oldest first.
        losses: Loss of each batch that was trained, by index; None where it was not finite.
        skip_batches: What the newest launch leaves out.

    Raises:
        DataFormatError: It is no run directory, or its note of the data is damaged.
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        self.run_dir = os.fspath(run_dir)
        self.launches = read_launches(run_dir)
        self.losses, self._times = _trained(self.run_dir)
        self.skip_batches = self.launches[-1].data.skip_batches
        self._traces: dict[int, Trace] = {}
        self._changes: dict[UsedFile, str] = {}

    def worst(self, count: int) -> list[int]:
        """The batches with the largest losses, the largest first; a loss that was not finite is larger than any."""
        known = [index for index in self.losses if index >= min(launch.first_batch for launch in self.launches)]
        return sorted(known, key=lambda index: (-_rank_of(self.losses[index]), index))[:count]

    def documents(self, index: int, *, decode: Decode | None = None) -> dict[str, Any]:
        """A batch as JSON data.

        Args:
            decode: Gives the text of ids, which may be negative.
        Raises:
            DataFormatError: This run directory knows nothing of it, or its files have changed too much.
        """
        launch = self._launch(index)
        trace = self._trace(launch)
        batch = trace.batch(index)
        return {
            "step": index,
            "epoch": batch.epoch,
            "loss": self.losses.get(index),
            "trained": index in self.losses,
            "skipped": batch.skipped,
            "ranks": [
                [
                    {"pack": pack.number, "documents": [_document(trace, piece, decode) for piece in pack.pieces]}
                    for pack in packs
                ]
                for packs in batch.ranks
            ],
            "changed_files": self._changes_in(batch, launch),
        }

    def provenance(self, index: int) -> Iterator[str]:
        """The bins that a batch was read from."""
        batch = self._trace(self._launch(index)).batch(index)
        yield from dict.fromkeys(piece.path for piece in batch.pieces if piece.path)

    def without(self, indices: Sequence[int]) -> str:
        """`data.skip_batches` that leaves these batches out too."""
        return skip_text(self.skip_batches, indices)

    def _launch(self, index: int) -> Launch:
        return launch_of(self.launches, index, trained_at=self._times.get(index))

    def _trace(self, launch: Launch) -> Trace:
        place = self.launches.index(launch)
        if place not in self._traces:
            self._traces[place] = launch.trace()
        return self._traces[place]

    def _changes_in(self, batch: TracedBatch, launch: Launch) -> dict[str, str]:
        """Of the files that a batch was read from, those that are not what they were."""
        here = {piece.path for piece in batch.pieces}
        used_here = [used for used in launch.files if used.file.path in here]
        for used in used_here:
            if used not in self._changes:
                self._changes[used] = used.change
        return {used.file.path: self._changes[used] for used in used_here if self._changes[used]}


def as_text(batch: Mapping[str, Any]) -> Iterator[str]:
    """A batch, as `documents` gives it, in lines."""
    ranks = batch["ranks"]
    count = sum(len(pack["documents"]) for packs in ranks for pack in packs)
    yield f"batch {batch['step']}: {_outcome(batch)}; epoch {batch['epoch']}, {_sizes(ranks)}, {count} documents"
    for path, how in batch["changed_files"].items():
        yield f"  warning: {path} {how}: what is shown of it may not be what was trained on"
    for rank, packs in enumerate(ranks):
        for number, pack in enumerate(packs):
            yield f"  rank {rank}, micro-batch {number} (pack {pack['pack']})"
            for document in pack["documents"]:
                where = f"{document['path']} line {document['line']}" if document["path"] else "a synthetic sample"
                span = f"tokens [{document['from']}, {document['to']}) of {document['length']}"
                yield f"    {where}, {span}, at {document['place']}"
                if document["text"] is not None:
                    yield f"      {_shortened(document['text'])}"


def _trained(run_dir: str) -> tuple[dict[int, float | None], dict[int, float | None]]:
    """Loss and time of each batch that was trained, by index."""
    try:
        run = read_run(run_dir)
    except DataFormatError:
        return {}, {}  # nothing trained yet
    indices = [int(step["step"]) for step in run.steps]
    return dict(zip(indices, run.column("loss"))), dict(zip(indices, run.column("time")))


def _rank_of(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def _document(trace: Trace, piece: Piece, decode: Decode | None) -> dict[str, Any]:
    return {
        "path": piece.path,
        "type": piece.type_name,
        "line": piece.line,
        "from": piece.start,
        "to": piece.stop,
        "length": piece.length,
        "place": piece.place,
        "text": None if decode is None else decode(trace.tokens(piece).tolist()),
    }


def _outcome(batch: Mapping[str, Any]) -> str:
    if batch["skipped"]:
        return "left out by skip_batches"
    if not batch["trained"]:
        return "not trained"
    return "loss not finite" if batch["loss"] is None else f"loss {batch['loss']:.4f}"


def _sizes(ranks: Sequence[Sequence[Any]]) -> str:
    each = len(ranks[0])
    return f"{len(ranks)} data-parallel {'rank' if len(ranks) == 1 else 'ranks'} x {each} micro-batches"


def _shortened(text: str) -> str:
    """The beginning of a text on one line."""
    line = text.replace("\n", "⏎").replace("\t", "⇥")
    return line if len(line) <= SHOWN_CHARS else f"{line[: SHOWN_CHARS - 1]}…"
