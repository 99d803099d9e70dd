"""The drawn timeline says what the schedule does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from internlm_ds import plan
from internlm_ds.plan.timeline import draw, simulate
from internlm_ds.runspec import RunSpec
from internlm_ds.schedule.lists import Pipeline

SpecOf = Callable[..., RunSpec]
TWO_STAGES = ("model.num_layers=4", "parallel.pipeline=2")


def test_a_timeline_is_as_long_as_the_step() -> None:
    pipeline = Pipeline(3)
    lines = draw(simulate(pipeline, 4), pipeline, label_width=2)
    assert lines[2] == "stage 2 |····F0B0--F1B1--F2B2--F3B3--········|"
    assert {len(line) for line in lines} == {len("stage 0 ||") + 2 * 3 * (4 + 2)}


def test_a_short_step_is_shown_whole(spec_of: SpecOf) -> None:
    text = plan.render_timeline(spec_of(*TWO_STAGES, "data.micro_num=2", world_size=2))
    assert text == (
        "timeline of a step: F forward, B backward; · idle\n"
        "stage 0 |F0F1····B0--··B1--|\n"
        "stage 1 |··F0B0--F1B1--····|\n"
        "idle: 50.0% of the computing time, with all 2 micro-batches\n"
    )


def test_a_long_step_is_cut_and_counted_whole(spec_of: SpecOf) -> None:
    chunks = ("model.num_chunks=2", "data.micro_num=64")
    text = plan.render_timeline(spec_of(*TWO_STAGES, *chunks, world_size=2), width=100)
    head, *lines, idle = text.splitlines()
    assert head == "timeline of a step, 4 of its 64 micro-batches: F forward, B backward, a b … chunks; · idle"
    assert len(lines) == 2 and max(map(len, lines)) <= 110
    assert idle == "idle: 0.8% of the computing time, with all 64 micro-batches"


def test_zero_bubble_shows_its_weight_passes(spec_of: SpecOf) -> None:
    asked = (*TWO_STAGES, "data.micro_num=4", "internlm_ds.pipeline_schedule=zb-h1")
    text = plan.render_timeline(spec_of(*asked, world_size=2))
    assert "W gradients of weights" in text and "W3|" in text
    assert "idle: 8.3%" in text


def test_one_stage_never_idles(spec_of: SpecOf) -> None:
    text = plan.render_timeline(spec_of("data.micro_num=1", world_size=1))
    assert "stage 0 |F0B0--|" in text and "idle: 0.0%" in text


def test_memory_follows_the_schedule(spec_of: SpecOf) -> None:
    """Chunks keep more micro-batches under way; ZB-H1 keeps what its weight passes will read."""
    from internlm_ds.translate import translate

    def parts(*overrides: str, stage: int = 0) -> dict[str, int]:
        spec = spec_of(*TWO_STAGES, "data.micro_num=8", "model.checkpoint=False", *overrides, world_size=2)
        found = plan.describe(spec, translate(spec)).stages[stage]
        return {component.name: component.nbytes for component in found.components}

    blocks = "activations of blocks"
    # pairs under way on stage 0 of 2: 1F1B 2 of whole stages, 2 chunks 5 of half stages
    assert parts("model.num_chunks=2")[blocks] * 2 == pytest.approx(parts()[blocks] * 2.5, abs=2)
    zero_bubble = "internlm_ds.pipeline_schedule=zb-h1"
    assert "put-off weight gradients" not in parts(zero_bubble)
    assert parts(zero_bubble, stage=1)["put-off weight gradients"] > 0
    assert parts("internlm_ds.pipeline_bounds=[0, 1, 4]")[blocks] * 2 == parts()[blocks]
