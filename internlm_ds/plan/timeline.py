"""A step of the pipeline as a drawing in plain text: which stage does what when, and how much of the time it idles.

The clock is `schedule.simulate`'s: a backward pass takes as long as two forward passes, a message no time.
"""

from __future__ import annotations

from internlm_ds.runspec import RunSpec
from internlm_ds.schedule.instructions import Backward, Forward, WeightGrad, Work
from internlm_ds.schedule.lists import Pipeline
from internlm_ds.schedule.simulate import Costs, Report, simulate_training

LETTERS = {Forward: "F", Backward: "B", WeightGrad: "W"}
CHUNKS = "abcdefghijklmnopqrstuvwxyz"
WIDTH = 160


def render_timeline(spec: RunSpec, *, width: int = WIDTH) -> str:
    """The timeline of a run's full step; of its first micro-batches alone where the step is wider than `width`."""
    pipeline = Pipeline.from_config(spec.config, spec.layout)
    micro_num = spec.batch.micro_num
    whole = simulate(pipeline, micro_num)
    shown = next(count for count in _counts(pipeline, micro_num) if _fits(pipeline, count, width))
    lines = [f"timeline of a step{_of(shown, micro_num)}: F forward, B backward{_words(pipeline)}; · idle"]
    lines += draw(simulate(pipeline, shown), pipeline, label_width=_label_width(pipeline, shown))
    lines.append(f"idle: {whole.bubble:.1%} of the computing time, with all {micro_num} micro-batches")
    return "\n".join(lines) + "\n"


def simulate(pipeline: Pipeline, micro_batches: int) -> Report:
    """A pass of one chunk takes one unit forward and two backward, however many chunks there are."""
    units = Costs(forward=pipeline.chunks, backward=pipeline.chunks, weight=pipeline.chunks)
    return simulate_training(pipeline, micro_batches=micro_batches, costs=units)


def draw(report: Report, pipeline: Pipeline, *, label_width: int) -> list[str]:
    """One line a stage.

    >>> print(*draw(simulate(Pipeline(2), 2), Pipeline(2), label_width=2), sep="\\n")
    stage 0 |F0F1····B0--··B1--|
    stage 1 |··F0B0--F1B1--····|
    """
    lines = []
    for stage in range(pipeline.stages):
        line = "·" * round(report.duration * label_width)
        for span in report.spans:
            if span.stage == stage:
                start, end = round(span.start * label_width), round(span.end * label_width)
                line = line[:start] + _name(span.work, pipeline).ljust(end - start, "-") + line[end:]
        lines.append(f"stage {stage} |{line}|")
    return lines


def _name(work: Work, pipeline: Pipeline) -> str:
    chunk = CHUNKS[work.chunk % len(CHUNKS)] if pipeline.chunks > 1 else ""
    return f"{LETTERS[type(work)]}{work.micro_batch}{chunk}"


def _label_width(pipeline: Pipeline, micro_batches: int) -> int:
    return len(_name(Forward(micro_batches - 1, 0), pipeline))


def _counts(pipeline: Pipeline, micro_num: int) -> list[int]:
    """Numbers of micro-batches to try, falling; with chunks multiples of the stages; the last is taken as it is."""
    step = pipeline.stages if pipeline.chunks > 1 else 1
    return list(range(micro_num, 0, -step))


def _fits(pipeline: Pipeline, micro_batches: int, width: int) -> bool:
    """Whether a drawing is narrow enough; the smallest one always is."""
    smallest = micro_batches <= (pipeline.stages if pipeline.chunks > 1 else 1)
    # three units for each pass of a chunk, and what the pipeline idles
    units = 3 * (micro_batches * pipeline.chunks + pipeline.stages - 1)
    return smallest or units * _label_width(pipeline, micro_batches) <= width


def _of(shown: int, micro_num: int) -> str:
    return "" if shown == micro_num else f", {shown} of its {micro_num} micro-batches"


def _words(pipeline: Pipeline) -> str:
    weights = ", W gradients of weights" if pipeline.kind == "zb-h1" else ""
    return weights + (", a b … chunks" if pipeline.chunks > 1 else "")
