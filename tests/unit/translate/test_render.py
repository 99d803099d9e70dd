"""Reports as text."""

from __future__ import annotations

import json

import pytest

from internlm_ds.translate import Note, render

NOTES = (
    Note("data.micro_num", 4, "gradient_accumulation_steps", "exact", "", 7),
    Note("ckpt.checkpoint_every", float("inf"), None, "native", "a | b", None),
)


def test_json_report_is_strict_and_complete() -> None:
    found = json.loads(render.report(NOTES, "json"))
    assert found[0] == {
        "source": "data.micro_num",
        "value": 4,
        "target": "gradient_accumulation_steps",
        "fidelity": "exact",
        "reason": "",
        "line": 7,
    }
    assert found[1]["value"] == "inf" and found[1]["line"] is None


def test_table_has_a_line_per_note_and_a_sum() -> None:
    lines = render.report(NOTES, "table").splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:4] == ["7", "data.micro_num", "4", "exact"]
    assert lines[-1] == "2 keys: 1 exact (DeepSpeed does it), 1 native (internlm-ds does it exactly)"


def test_markdown_escapes_bars() -> None:
    assert "| a \\| b |" in render.report(NOTES, "markdown")


def test_none_is_empty() -> None:
    assert render.report(NOTES, "none") == ""


def test_long_values_are_cut_in_tables() -> None:
    text = render.report([Note("x", "y" * 100, None, "native", "r")], "table")
    assert "…" in text and "y" * 40 not in text


def test_deepspeed_json_ends_with_a_newline() -> None:
    assert render.ds_json({"a": 1}) == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_deepspeed_json_is_strict(value: float) -> None:
    json.loads(render.ds_json({"a": value}), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
