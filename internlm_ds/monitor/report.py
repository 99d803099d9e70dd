"""One self-contained HTML page with the curves and facts of one or several runs. Reading runs is `runs`'.

Everything the page needs lies inside it; nothing is fetched. The browser draws the numbers with `report_page.SCRIPT`.
"""

from __future__ import annotations

import html
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internlm_ds.monitor import report_page
from internlm_ds.monitor.runs import Run, read_run
from internlm_ds.monitor.sinks import strict

BUCKETS = 400


@dataclass(frozen=True)
class Chart:
    """One diagram.

    Attributes:
        key: Field of metrics.jsonl; `fallback` is read where a run lacks it.
        scale: `linear`, `log`, `log2`, or `auto`: logarithmic where the values span more than a factor of 30.
        validation: Field of the validation lines that is drawn beside it.
        from_zero: The axis starts at 0.
        noisy: The page's smoothing applies.
    """

    key: str
    title: str
    unit: str
    scale: str = "linear"
    fallback: str | None = None
    validation: str | None = None
    from_zero: bool = False
    noisy: bool = True


CHARTS = (
    Chart("loss", "Loss", "mean over the micro-batches of a step", scale="auto", validation="loss"),
    Chart("lr_used", "Learning rate", "rate of the update", fallback="lr", noisy=False),
    Chart("grad_norm", "Gradient norm", "global, before clipping", scale="auto"),
    Chart("tgs", "Throughput", "tokens per second and rank", from_zero=True),
    Chart("loss_scale", "Loss scale", "factor on the loss of fp16", scale="log2", noisy=False),
    Chart("acc", "Accuracy", "share of tokens predicted first", validation="acc"),
)


def render(run_dirs: Sequence[str | Path], out_path: str | Path) -> Path:
    """Write the page; it appears complete or not at all.

    Args:
        run_dirs: Run directories, drawn over one another in this order.
        out_path: The HTML file; its folder is created if need be.
    Raises:
        DataFormatError: A run directory cannot be read.
    """
    runs = [read_run(folder) for folder in run_dirs]
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f".{out_path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page(runs), encoding="utf-8")
        os.replace(temporary, out_path)
    finally:
        temporary.unlink(missing_ok=True)
    return out_path


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    names = run_names(runs)
    drawn = [chart for chart in CHARTS if _is_worth_drawing(chart, runs)]
    payload = {
        "charts": [asdict(chart) for chart in drawn],
        "runs": [_curves(run, name, drawn) for run, name in zip(runs, names)],
    }
    title = f"{runs[0].job_name} – training report" if len(runs) == 1 else f"{len(runs)} runs – training report"
    # "<" never reaches the page as such, so no text of a run can end the script element
    data = json.dumps(strict(payload), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return report_page.PAGE.format(
        title=html.escape(title),
        style=report_page.STYLE,
        tiles=_tiles(runs[0]) if len(runs) == 1 else "",
        table=_facts_table(runs, names),
        notes=_notes(runs, names),
        data=data,
        script=report_page.SCRIPT,
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart: the folder's own, with as many parents as it takes."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(names, start=1)]


def facts(run: Run) -> dict[str, str]:
    """The run's facts as label and text, in the order of the table; unknown ones are left out."""
    losses = [loss for loss in run.column("loss") if loss is not None]
    rows: dict[str, str | None] = {
        "Configuration": run.job_name,
        "Model": _model_text(run),
        "Parameters": _params_text(run),
        "Layout": _layout_text(run),
        "Batches": _batches_text(run),
        "First loss": f"{losses[0]:.4f}" if losses else None,
        "Last loss": f"{losses[-1]:.4f} ({losses[-1] / losses[0]:.0%} of the first)" if losses and losses[0] else None,
        "Lowest loss": f"{min(losses):.4f}" if losses else None,
        **{f"Validation {name}": _validation_text(points) for name, points in run.validations.items()},
        "Tokens": _tokens_text(run),
        "Tokens per second and rank": _throughput_text(run),
        "Peak memory": _memory_text(run),
        "Time": _time_text(run),
        "Updates skipped": f"{len(run.failed)} ({_list_text(run.failed)})" if run.failed else "none",
        "Batches left out": f"{len(run.absent)} ({_list_text(run.absent)})" if run.absent else None,
        "Resumed at": _list_text(run.resumes) if run.resumes else "never",
    }
    return {label: text for label, text in rows.items() if text}


def kept_indices(columns: Sequence[Sequence[float | None]], *, buckets: int = BUCKETS) -> list[int]:
    """Points to draw: first, last, and of each stretch the lowest and highest of every column, so no spike is lost.

    >>> kept_indices([[1.0, 9.0, 2.0, 3.0]], buckets=9)
    [0, 1, 2, 3]
    """
    length = len(columns[0]) if columns else 0
    if length <= 2 * buckets:
        return list(range(length))
    kept = {0, length - 1}
    for bucket in range(buckets):
        stretch = range(bucket * length // buckets, (bucket + 1) * length // buckets)
        for column in columns:
            known = [(value, index) for index in stretch if (value := column[index]) is not None]
            if known:
                kept |= {min(known)[1], max(known)[1]}
            else:
                kept.add(stretch[0])
    return sorted(kept)


def _curves(run: Run, name: str, charts: Sequence[Chart]) -> dict[str, Any]:
    """What the browser draws of one run."""
    columns = {chart.key: _column(run, chart) for chart in charts}
    failed = set(run.failed)
    kept = set(kept_indices(list(columns.values())))
    kept |= {index for index, step in enumerate(run.steps) if step["step"] in failed or step["step"] in run.resumes}
    indices = sorted(kept)
    times, tokens = run.column("time"), run.column("num_consumed_tokens")
    start = next((time - (lasted or 0.0) for time, lasted in zip(times, run.column("step_time")) if time), None)
    return {
        "name": name,
        "step": [run.steps[i]["step"] for i in indices],
        "tokens": [tokens[i] for i in indices],
        "time": [_since(start, times[i]) for i in indices],
        "series": {key: [column[i] for i in indices] for key, column in columns.items()},
        "failed": sorted(failed),
        "resumes": list(run.resumes),
        "validation": {
            set_name: {
                "step": [point["step"] for point in points],
                **{
                    chart.validation: [point.get(chart.validation) for point in points]
                    for chart in charts
                    if chart.validation
                },
            }
            for set_name, points in run.validations.items()
        },
    }


def _since(start: float | None, time: float | None) -> float | None:
    return None if start is None or time is None else round(time - start, 3)


def _column(run: Run, chart: Chart) -> list[float | None]:
    values = run.column(chart.key)
    if chart.fallback and all(value is None for value in values):
        return run.column(chart.fallback)
    return values


def _is_worth_drawing(chart: Chart, runs: Sequence[Run]) -> bool:
    values = {value for run in runs for value in _column(run, chart) if value is not None}
    # without fp16 the loss scale is 1 throughout
    return bool(values) and not (chart.key == "loss_scale" and values == {1})


def _model_text(run: Run) -> str | None:
    known = run.resolved
    sizes = [
        f"{known[key]} {word}"
        for key, word in (
            ("model.num_layers", "layers"),
            ("model.hidden_size", "hidden"),
            ("model.vocab_size", "vocabulary"),
        )
        if key in known
    ]
    kind = [str(known["model_type"])] if known.get("model_type") else []
    dtype = [str(known["model.dtype"]).removeprefix("torch.")] if known.get("model.dtype") else []
    return " · ".join([*kind, *sizes, *dtype]) or None


def _params_text(run: Run) -> str | None:
    if run.num_params is not None:
        return f"{run.num_params:,}"
    if run.num_stage_elements is None:
        return None
    split = run.layout is not None and (run.layout[1] > 1 or run.layout[2] > 1)
    return f"{run.num_stage_elements:,}" + (" on the stage and tensor rank that wrote the log" if split else "")


def _layout_text(run: Run) -> str | None:
    if run.layout is None:
        return None
    data, pipe, tensor = run.layout
    world = data * pipe * tensor
    return f"data {data} · pipeline {pipe} · tensor {tensor} ({world} rank{'s' if world != 1 else ''})"


def _batches_text(run: Run) -> str:
    first, last, count = run.steps[0]["step"], run.steps[-1]["step"], len(run.steps)
    return f"{count} ({first} to {last})" if count > 1 else f"1 (batch {first})"


def _validation_text(points: Sequence[dict[str, Any]]) -> str:
    last = points[-1]
    loss = last.get("loss")
    return (
        f"loss {loss:.4f} at batch {last['step']}"
        if isinstance(loss, int | float)
        else f"no loss at batch {last['step']}"
    )


def _tokens_text(run: Run) -> str | None:
    tokens = [value for value in run.column("num_consumed_tokens") if value is not None]
    return f"{int(tokens[-1]):,}" if tokens else None


def _throughput_text(run: Run) -> str | None:
    rates = [value for value in run.column("tgs") if value is not None]
    return f"{statistics.median(rates):,.1f} (median)" if rates else None


def _memory_text(run: Run) -> str | None:
    peaks = [value for value in run.column("memory_allocated_peak") if value is not None]
    return f"{max(peaks) / 2**30:,.2f} GiB" if peaks else None


def _time_text(run: Run) -> str | None:
    times = [value for value in run.column("time") if value is not None]
    if not times:
        return None
    seconds = max(times) - min(times) + (run.column("step_time")[0] or 0.0)
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


def _list_text(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    more = f" and {len(numbers) - 12} more" if len(numbers) > 12 else ""
    return f"{'batch' if len(numbers) == 1 else 'batches'} {shown}{more}"


def _tiles(run: Run) -> str:
    known = facts(run)
    shown = ("First loss", "Last loss", "Tokens", "Tokens per second and rank", "Updates skipped")
    tiles = [
        f'<div class="tile"><span>{html.escape(label)}</span><b>{html.escape(known[label].split(" (")[0])}</b></div>'
        for label in shown
        if label in known
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _facts_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    columns = [facts(run) for run in runs]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    head = "".join(
        f'<th scope="col"><i class="swatch c{i % 8}"></i>{html.escape(name)}</th>' for i, name in enumerate(names)
    )
    rows = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>'
        + "".join(f"<td>{html.escape(column.get(label, '–'))}</td>" for column in columns)
        + "</tr>"
        for label in labels
    )
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _notes(runs: Sequence[Run], names: Sequence[str]) -> str:
    lines = [
        f"<li>{html.escape(name)}: {html.escape(note)}</li>" for run, name in zip(runs, names) for note in run.notes
    ]
    return f'<ul class="notes">{"".join(lines)}</ul>' if lines else ""
