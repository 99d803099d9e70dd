"""A translation as text: DeepSpeed's JSON, and the report as table, JSON or Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from internlm_ds.translate.provenance import MEANING, Note, plain

FORMATS = ("table", "json", "markdown", "none")
_COLUMNS = ("line", "source", "value", "fidelity", "target", "reason")
_VALUE_WIDTH = 36


def ds_json(ds_config: dict[str, Any]) -> str:
    """The file DeepSpeed gets: strict JSON, keys in the order of the translation."""
    return json.dumps(plain(ds_config), indent=2, allow_nan=False) + "\n"


def report(notes: Sequence[Note], form: str) -> str:
    """All notes in one of `FORMATS`; empty for `none`."""
    if form == "json":
        return json.dumps([note.as_json() for note in notes], indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if form == "markdown":
        return _markdown(notes)
    if form == "table":
        return _table(notes)
    return ""


def summary(notes: Sequence[Note]) -> str:
    """One line: how many keys of each fidelity."""
    counts = Counter(note.fidelity for note in notes)
    parts = (f"{counts[fidelity]} {fidelity} ({meaning})" for fidelity, meaning in MEANING.items() if counts[fidelity])
    return f"{len(notes)} keys: {', '.join(parts)}"


def _cells(note: Note) -> tuple[str, ...]:
    value = json.dumps(plain(note.value), ensure_ascii=False)
    if len(value) > _VALUE_WIDTH:
        value = value[: _VALUE_WIDTH - 1] + "…"
    return (str(note.line or "-"), note.source, value, note.fidelity, note.target or "-", note.reason)


def _table(notes: Sequence[Note]) -> str:
    rows = [_COLUMNS, *map(_cells, notes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    return "\n".join([*lines, summary(notes)]) + "\n"


def _markdown(notes: Sequence[Note]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    body = [line(_COLUMNS), line(["---"] * len(_COLUMNS)), *(line(_cells(note)) for note in notes)]
    return "\n".join([*body, "", summary(notes)]) + "\n"
