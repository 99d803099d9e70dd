"""What a value may be: one small rule per kind of value, with the words that tell a user what would work.

A rule turns the value of a file into the typed one of `schema`, or says why it cannot. Which key has which rule stands
in `keys`; what several values must be together is `validate`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

DTYPES = {
    "torch.float16": ("float16", False),
    "torch.half": ("float16", False),
    "torch.bfloat16": ("bfloat16", False),
    "torch.float32": ("float32", False),
    "torch.tf32": ("float32", True),
}
"""InternLM's dtype names: (dtype, whether matrix products use tf32)."""

LOAD_CONTENTS = ("model", "sampler", "optimizer", "scheduler", "all")
CKPT_TYPES = {
    "native": "native",
    "internlm": "internlm",
    "internevo": "internlm",
    "normal": "internlm",
    "llama": "llama",
    "hf": "hf",
    "hf_llama": "hf",
}


class Refused(ValueError):
    """A value breaks its rule; the text says what would work."""


@dataclass(frozen=True)
class Rule:
    """Attributes:
    expected: The values that are good, to be read behind "must be".
    read: Turns a value into the typed one.

    Raises (from `read`):
        Refused: The value is not one of them.
    """

    expected: str
    read: Callable[[Any], Any]


def boolean() -> Rule:
    def read(value: Any) -> bool:
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise Refused(f"must be True or False{_unquoted(value, ('True', 'False'))}")

    return Rule("True or False", read)


def flag_or(word: str) -> Rule:
    """True, False, or the word that leaves it to us."""
    expected = f"{word!r}, True or False"

    def read(value: Any) -> bool | str:
        if value == word or (isinstance(value, int) and value in (0, 1)):
            return value if isinstance(value, str) else bool(value)
        raise Refused(f"must be {expected}{_unquoted(value, ('True', 'False'))}")

    return Rule(expected, read)


def integer(low: int | None = None, *, high: int | None = None) -> Rule:
    """A whole number within bounds, both included."""
    expected = f"an integer{_bounds(low, high)}"

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refused(f"must be {expected}{_number_hint(value, whole=True)}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise Refused(f"must be {expected}")
        return value

    return Rule(expected, read)


def whole(low: int | None = None) -> Rule:
    """A whole number that may be written as a float, such as `5e8`: only ever compared, never used as a count."""
    rule = integer(low)
    return Rule(rule.expected, lambda value: rule.read(int(value) if _is_integral_float(value) else value))


def number(
    low: float | None = None, *, high: float | None = None, above: float | None = None, below: float | None = None
) -> Rule:
    """A finite number, `low <= x <= high` and `above < x < below`."""
    expected = f"a number{_bounds(low, high, above, below)}"

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"must be {expected}{_number_hint(value, whole=False)}")
        if not math.isfinite(value):
            raise Refused(f"must be {expected}, and finite")
        outside = (
            (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
            or (below is not None and value >= below)
        )
        if outside:
            raise Refused(f"must be {expected}")
        return float(value)

    return Rule(expected, read)


def steps(low: int = 1) -> Rule:
    """A number of steps, or infinity for never."""
    expected = f'an integer{_bounds(low, None)}, or float("inf") for never'

    def read(value: Any) -> float:
        if isinstance(value, float) and value == math.inf:
            return math.inf
        try:
            return int(whole(low).read(value))
        except Refused:
            raise Refused(f"must be {expected}{_number_hint(value, whole=True)}") from None

    return Rule(expected, read)


def text(*, empty: bool = False) -> Rule:
    expected = "a string" if empty else "a string that is not empty"

    def read(value: Any) -> str:
        if not isinstance(value, str) or not (value or empty):
            raise Refused(f"must be {expected}")
        return value

    return Rule(expected, read)


def location() -> Rule:
    """A folder, file or address; None and "" both mean none."""

    def read(value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value or None
        raise Refused("must be None or a string")

    return Rule("None or a string", read)


def choice(*values: Any) -> Rule:
    expected = f"one of {', '.join(map(repr, values))}"

    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise Refused(f"must be {expected}{_nearest_hint(value, values)}")
        return value

    return Rule(expected, read)


def optional(rule: Rule, *, default: Any = None) -> Rule:
    """The rule, or None, which stands for `default`."""
    expected = f"None or {rule.expected}"

    def read(value: Any) -> Any:
        if value is None:
            return default
        try:
            return rule.read(value)
        except Refused as refused:
            raise Refused(str(refused).replace(f"must be {rule.expected}", f"must be {expected}", 1)) from None

    return Rule(expected, read)


def dtype() -> Rule:
    """One of InternLM's dtype names, or the torch dtype itself (which arrives here as its name)."""
    expected = f"one of {', '.join(map(repr, DTYPES))}"

    def read(value: Any) -> tuple[str, bool]:
        if isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
        short = isinstance(value, str) and f"torch.{value}" in DTYPES
        raise Refused(f"must be {expected}" + (f"; did you mean 'torch.{value}'?" if short else ""))

    return Rule(expected, read)


def fraction_or_flag() -> Rule:
    """`model.checkpoint`: True, False, or a fraction of the layers."""
    expected = "True, False or a number from 0 to 1"

    def read(value: Any) -> float:
        if isinstance(value, int | float) and 0 <= value <= 1:
            return float(value)
        raise Refused(f"must be {expected}: the share of layers whose activations are recomputed")

    return Rule(expected, read)


def skip_batches() -> Rule:
    """`"3,10-20"`: batch indices and inclusive ranges, rising; "" for none."""
    expected = 'a string of batch indices and ranges in rising order, e.g. "3,10-20", or "" for none'

    def read(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise Refused(f"must be {expected}")
        _check_ranges(value, expected)
        return value

    return Rule(expected, read)


def _check_ranges(value: str, expected: str) -> None:
    before = -1
    for part in value.split(",") if value.strip() else ():
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise Refused(f"{part.strip()!r} is neither an index nor a range; write {expected}")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise Refused(f'a range runs from low to high; write "{high}-{low}"')
        if low <= before:
            raise Refused(f"indices rise: {part.strip()} must come after {before}")
        before = high


def rampup() -> Rule:
    """`"start increment every"`: three integers of at least 1; "" or None for none."""
    expected = 'three integers "start increment every", each at least 1, e.g. "2 2 100", or "" for none'

    def read(value: Any) -> str:
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        parts = value.split() if isinstance(value, str) else ()
        if len(parts) != 3 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
            raise Refused(f"must be {expected}")
        return str(value)

    return Rule(expected, read)


def mapping_of(rule: Rule, example: str) -> Rule:
    """A dict with free keys and values of one kind."""
    expected = f"a dict such as {example}"

    def read(value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise Refused(f"must be {expected}")
        typed = {}
        for key, item in value.items():
            try:
                typed[str(key)] = rule.read(item)
            except Refused as refused:
                raise Refused(f"the value of {key!r} {refused}") from None
        return typed

    return Rule(expected, read)


def bounds() -> Rule:
    """Stage bounds: integers that rise from 0."""
    expected = "a list of rising integers that starts with 0, e.g. [0, 16, 32]"

    def read(value: Any) -> tuple[int, ...]:
        good = isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not good or len(value) < 2 or value[0] != 0 or any(a >= b for a, b in pairwise(value)):
            raise Refused(f"must be {expected}")
        return tuple(value)

    return Rule(expected, read)


def load_content() -> Rule:
    expected = f"a tuple of {', '.join(map(repr, LOAD_CONTENTS))}"

    def read(value: Any) -> tuple[str, ...]:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
            raise Refused(f'must be {expected}, e.g. ("model",)')
        for item in items:
            if item.lower() not in LOAD_CONTENTS:
                raise Refused(f"must be {expected}; {item!r} is none of them{_nearest_hint(item, LOAD_CONTENTS)}")
        return tuple(item.lower() for item in items)

    return Rule(expected, read)


def ckpt_type() -> Rule:
    expected = f"one of {', '.join(map(repr, CKPT_TYPES))}"

    def read(value: Any) -> str:
        if isinstance(value, str) and value in CKPT_TYPES:
            return CKPT_TYPES[value]
        raise Refused(f"must be {expected}{_nearest_hint(value, CKPT_TYPES)}")

    return Rule(expected, read)


def anything() -> Rule:
    return Rule("anything", lambda value: value)


def _bounds(low: float | None, high: float | None, above: float | None = None, below: float | None = None) -> str:
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None and below is not None:
        return f" of at least {low:g} and below {below:g}"
    if above is not None and below is not None:
        return f" above {above:g} and below {below:g}"
    parts = ((" of at least {:g}", low), (" of at most {:g}", high), (" above {:g}", above), (" below {:g}", below))
    return "".join(words.format(bound) for words, bound in parts if bound is not None)


def _is_integral_float(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _number_hint(value: Any, *, whole: bool) -> str:
    """Tell somebody who wrote `"4"` or `4.0` to write 4."""
    if not isinstance(value, str | float):
        return ""
    try:
        meant = float(value)
    except ValueError:
        return ""
    if not math.isfinite(meant):
        return ""
    if meant.is_integer():
        return f"; write {int(meant)}"
    return "" if whole else f"; write {meant!r}"


def _unquoted(value: Any, words: tuple[str, ...]) -> str:
    """Tell somebody who wrote `"true"` to write True."""
    found = [word for word in words if isinstance(value, str) and value.lower() == word.lower()]
    return f"; write {found[0]} without quotes" if found else ""


def _nearest_hint(value: Any, words: Any) -> str:
    from internlm_ds.config.names import nearest

    found = nearest(value, words) if isinstance(value, str) else None
    return f"; did you mean {found!r}?" if found else ""
