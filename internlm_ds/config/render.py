"""A configuration for people and programs: every value with its origin, as a table or as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from internlm_ds.config.schema import Leaf


def json_value(value: Any) -> Any:
    """Strict JSON data: infinities and NaN become strings, tuples lists.

    >>> json_value({"every": float("inf"), "content": ("model",)})
    {'every': 'inf', 'content': ['model']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value


def as_json(leaf: Leaf, *, path: str) -> dict[str, Any]:
    """A leaf as JSON data; `file` and `line` are null unless a file wrote it."""
    return {
        "key": leaf.source,
        "value": json_value(leaf.value),
        "origin": leaf.origin,
        "file": (leaf.file or path) if leaf.line is not None else None,
        "line": leaf.line,
        "note": leaf.note,
    }


def origin(leaf: Leaf, *, path: str) -> str:
    """`file:line`, `override`, `default` or `derived`."""
    return f"{leaf.file or path}:{leaf.line}" if leaf.line is not None else leaf.origin


def table(leaves: Sequence[Leaf], *, path: str) -> str:
    """One line a value: key, value, origin and note, in columns; a blank line between sections."""
    rows = [(leaf.source, repr(leaf.value), origin(leaf, path=path), leaf.note) for leaf in leaves]
    key_width = max((len(row[0]) for row in rows), default=0)
    value_width = min(40, max((len(row[1]) for row in rows), default=0))
    lines, section = [], None
    for (key, value, where, note), leaf in zip(rows, leaves):
        here = "helper" if leaf.helper else key.partition(".")[0] if "." in key else ""
        if section is not None and here != section:
            lines.append("")
        section = here
        comment = f"  # {note}" if note else ""
        lines.append(f"{key:<{key_width}} = {value:<{value_width}}  {where}{comment}".rstrip())
    return "\n".join(lines)
