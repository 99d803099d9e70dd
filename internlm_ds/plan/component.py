"""One thing that takes memory, and when it exists: what `memory` and `optimizer_memory` count in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["always", "forward_backward", "reduce", "step"]
PHASES: tuple[Phase, ...] = ("forward_backward", "reduce", "step")
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Component:
    """One thing that takes memory.

    Attributes:
        name: What it is.
        nbytes: Its size on the device.
        formula: How it was computed, in the letters of `memory`.
        phase: When it exists; `always`, or one phase of a step.
    """

    name: str
    nbytes: int
    formula: str
    phase: Phase = "always"
