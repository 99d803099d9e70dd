"""The numbers of `stats` as text and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from internlm_ds.data.binformat import write_whole
from internlm_ds.data.doctor.stats import Bucket, Holdings, Packing
from internlm_ds.errors import MissingExtraError

BAR_WIDTH = 40


def as_text(types: Mapping[str, Holdings], total: Holdings, packing: Mapping[str, Packing] | None) -> str:
    """Tables: tokens by type, lengths, packing by type if there is a configuration."""
    rows = [["type", "samples", "tokens", "share", "learned", "mean", "median", "longest"]]
    for name, one in [*types.items(), ("all", total)]:
        share, learned = _share(one.tokens, total.tokens), _share(one.learned, one.tokens)
        median = str(one.quantiles.get("50%", 0))
        numbers = [f"{one.samples:,}", f"{one.tokens:,}", share, learned, f"{one.mean:.1f}", median, f"{one.longest:,}"]
        rows.append([name, *numbers])
    parts = [table(rows), "", "tokens of a sample", *_bars(total.histogram)]
    if total.bad_lines:
        parts += ["", f"{total.bad_lines} lines hold no sample: see `internlm-ds data check`"]
    if packing is not None:
        parts += ["", *_packing_rows(packing)]
    return "\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, numbers to the right.

    >>> print(table([["a", "n"], ["bb", "10"]]))
    a    n
    bb  10
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in shown)


def draw(path: str, types: Mapping[str, Holdings], total: Holdings) -> None:
    """Tokens by type and lengths of samples as a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", extra="plot", needed_for="data stats --plot") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(list(types), [one.tokens for one in types.values()], color="#9db7d5", label="tokens")
    left.bar(list(types), [one.learned for one in types.values()], color="#2f5d8c", label="learned")
    left.set_title("tokens by type")
    left.legend()
    right.bar(
        [f"{one.from_length}" for one in total.histogram], [one.samples for one in total.histogram], color="#2f5d8c"
    )
    right.set_title("samples by tokens (from)")
    right.tick_params(axis="x", rotation=60)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(Path(path), picture.getvalue())


def _bars(buckets: Sequence[Bucket]) -> list[str]:
    most = max((one.samples for one in buckets), default=1)
    names = [f"{one.from_length:,} to {one.to_length - 1:,}" if one.to_length > 1 else "0" for one in buckets]
    width = max(map(len, names), default=0)
    return [
        f"  {name.rjust(width)}  {one.samples:>11,}  {'█' * -(-one.samples * BAR_WIDTH // most)}".rstrip()
        for name, one in zip(names, buckets)
    ]


def _packing_rows(packing: Mapping[str, Packing]) -> list[str]:
    rows = [["packing", "samples", "tokens", "micro-batches", "filled", "trained", "left over", "segments", "cut"]]
    for name, one in packing.items():
        numbers = [
            f"{one.samples:,}",
            f"{one.tokens:,}",
            f"{one.micro_batches:,}",
            f"{one.fill:.2%}",
            f"{one.yield_:.2%}",
        ]
        rows.append([name, *numbers, f"{one.left_over:,}", f"{one.segments:,}", f"{one.cut:,}"])
    about = "filled: share of the places that hold a token; trained: share of the tokens that an epoch trains on"
    return [table(rows), about]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
