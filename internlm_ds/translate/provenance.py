"""What became of each configuration key: one `Note` per leaf, no key silently dropped.

Which note a key gets is decided in `rules_*`; how notes are shown, in `render`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Fidelity = Literal["exact", "native", "approximate", "no_effect", "refused"]

MEANING: dict[Fidelity, str] = {
    "exact": "DeepSpeed does it",
    "native": "internlm-ds does it exactly",
    "approximate": "done with a difference",
    "no_effect": "not needed here",
    "refused": "cannot be honoured",
}


@dataclass(frozen=True)
class Note:
    """What one key of the resolved configuration turned into.

    Attributes:
        source: Dotted key, as in the leaf it explains.
        value: Its resolved value, plain data.
        target: Dotted key of the DeepSpeed JSON that carries it; None when none does.
        fidelity: See `MEANING`.
        reason: True and complete for everything but `exact`, where it may be empty.
        line: Line of the configuration file; None for defaults, overrides and derived values.
    """

    source: str
    value: Any
    target: str | None
    fidelity: Fidelity
    reason: str = ""
    line: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The note as strict JSON data."""
        return {
            "source": self.source,
            "value": plain(self.value),
            "target": self.target,
            "fidelity": self.fidelity,
            "reason": self.reason,
            "line": self.line,
        }


def plain(value: Any) -> Any:
    """Strict JSON data: infinities and NaN become the strings `inf`, `-inf`, `nan`; tuples become lists.

    >>> plain({"every": float("inf"), "content": ("model",)})
    {'every': 'inf', 'content': ['model']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
