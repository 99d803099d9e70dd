"""Where a profiled step's time goes: events of torch's profiler, dealt to the rooms of a step.

An event belongs to the nearest range that `profile_ranges` laid around it, else to what its name says, else to that of
the event it happens in. An event of the backward pass belongs where the operation belongs that it is the derivative of.
A matrix product is a matrix product wherever it happens, but for those that attention consists of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

RANGE = "internlm_ds: "
STEP = "ProfilerStep"
WAITING = "waiting for other ranks"
DATA = "waiting for data"
REST, IDLE = "rest", "device idle"
ROOMS = ("attention", "matmul", "norm", "loss", "optimizer", "communication", WAITING, DATA, REST)

_NAMES = tuple(
    (room, re.compile(pattern))
    for room, pattern in (
        ("attention", r"scaled_dot_product|flash|varlen_attn|fmha|efficient_attention"),
        ("matmul", r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|_addmm_activation)$|^(Mm|Addmm|Bmm|Baddbmm)Backward"),
        ("norm", r"rms_norm|layer_norm|RmsNorm|RMSNorm|LayerNorm"),
        ("loss", r"cross_entropy|nll_loss|log_softmax|CrossEntropy|NllLoss|LogSoftmax"),
        ("optimizer", r"Optimizer\.step|_fused_adam|_multi_tensor_adam"),
        ("communication", r"^(c10d::|gloo:|nccl:)|record_param_comms"),
    )
)


@dataclass(frozen=True)
class Span:
    """An event without what happened inside it.

    Attributes:
        name: Of the operation, function or range.
        self_us: Microseconds; of the processor, or of the device's kernels that it started.
        parent: Place of the event around it in the list of all; None at the top.
        sequence: Ties an operation to its derivative; negative for none.
        backward: Is it a derivative?
    """

    name: str
    self_us: float
    parent: int | None = None
    sequence: int = -1
    backward: bool = False


def shares(spans: Sequence[Span], *, total_us: float | None = None) -> dict[str, float]:
    """Microseconds of each room, all of them named.

    Args:
        spans: All events; a parent is named by its place.
        total_us: How long it took by the clock, where `spans` are a device's: what they leave is `device idle`.
    """
    found = dict.fromkeys(ROOMS, 0.0)
    derived_from = _rooms_of_operations(spans)
    for place in range(len(spans)):
        found[_room(place, spans, derived_from)] += max(0.0, spans[place].self_us)
    if total_us is not None:
        found[IDLE] = max(0.0, total_us - sum(found.values()))
    return found


def render(found: Mapping[str, float], *, steps: int) -> str:
    """A table of milliseconds a step and shares, which are 100 % together.

    >>> print(render({"matmul": 3000.0, "rest": 1000.0}, steps=2))
    where a step's time goes     ms      %
    matmul                      1.5   75.0
    rest                        0.5   25.0
    """
    total = sum(found.values()) or 1.0
    lines = [f"{'where a step’s time goes':24}{'ms':>7}{'%':>7}".replace("’", "'")]
    lines += [f"{room:24}{us / steps / 1000:>7.1f}{100 * us / total:>7.1f}" for room, us in found.items()]
    return "\n".join(lines)


def _rooms_of_operations(spans: Sequence[Span]) -> dict[int, str]:
    """Sequence number -> the range in which the operation of that number happened."""
    found: dict[int, str] = {}
    for span in spans:
        if span.sequence >= 0 and not span.backward and span.sequence not in found:
            room = next((e.name[len(RANGE) :] for e in _around(span, spans) if e.name.startswith(RANGE)), None)
            if room is not None:
                found[span.sequence] = room
    return found


def _room(place: int, spans: Sequence[Span], derived_from: Mapping[int, str]) -> str:
    by_name = None
    for event in _around(spans[place], spans):
        laid = event.name[len(RANGE) :] if event.name.startswith(RANGE) else None
        if laid is None and event.backward:
            laid = derived_from.get(event.sequence)
        if laid is not None:
            return by_name if by_name == "matmul" and laid != "attention" else laid
        by_name = by_name or named_room(event.name)
    return by_name or REST


def named_room(name: str) -> str | None:
    """What the name of an operation or kernel alone says."""
    return next((room for room, pattern in _NAMES if pattern.search(name)), None)


def _around(span: Span, spans: Sequence[Span]) -> Iterable[Span]:
    """The event itself, the one it happens in, and so on outwards."""
    while True:
        yield span
        if span.parent is None:
            return
        span = spans[span.parent]
