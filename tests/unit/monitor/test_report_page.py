"""What a report shows of a run, and that odd files do not stop it."""

from __future__ import annotations

import json
import re

import pytest

from internlm_ds.errors import DataFormatError
from internlm_ds.monitor.report import facts, kept_indices, page, render, run_names
from internlm_ds.monitor.runs import read_run

PREFIX = "2026-01-01 00:00:00,000\tINFO run.py:1 in main -- "


def test_facts_of_a_run(tmp_path):
    folder = _run(tmp_path / "demo", [_step(b, loss=4.0 - b, tokens=(b + 1) * 1000) for b in range(3)])
    (folder / "config.py").write_text('JOB_NAME = "demo_job"\nraise SystemExit\n')
    (folder / "train.log").write_text(
        PREFIX + "Distributed environment is initialized, data parallel size: 2, pipeline parallel size: 1, "
        "tensor parallel size: 1\n" + PREFIX + "Number of elements on ranks: [100, 200], rank:0\n"
    )
    known = facts(read_run(folder))
    assert known["Configuration"] == "demo_job"
    assert known["Layout"] == "data 2 · pipeline 1 · tensor 1 (2 ranks)"
    assert known["Parameters"] == "300"
    with (folder / "train.log").open("a") as file:
        file.write(PREFIX + "parameters of the whole model: 1234567\n")
    assert facts(read_run(folder))["Parameters"] == "1,234,567"
    assert (known["First loss"], known["Last loss"]) == ("4.0000", "2.0000 (50% of the first)")
    assert known["Tokens"] == "3,000"
    assert (known["Batches"], known["Updates skipped"], known["Resumed at"]) == ("3 (0 to 2)", "none", "never")
    assert known["Time"] == "3.0 s"


def test_skipped_updates_and_absent_batches(tmp_path):
    lines = [_step(0), _step(1, loss=None, update_applied=False), _step(4)]
    run = read_run(_run(tmp_path, lines))
    assert (run.failed, run.absent) == ([1], [2, 3])
    assert facts(run)["Updates skipped"] == "1 (batch 1)"
    assert facts(run)["Batches left out"] == "2 (batches 2, 3)"


def test_a_rewind_replaces_what_was_lost(tmp_path):
    lines = [_step(b, loss=9.0) for b in range(4)]
    lines += [{"validation": "en", "step": 3, "loss": 9.0}]
    lines += [_step(b, loss=1.0) for b in (2, 3)]
    run = read_run(_run(tmp_path, lines))
    assert run.column("loss") == [9.0, 9.0, 1.0, 1.0]
    assert run.resumes == (2,) and run.validations == {}


def test_resumes_are_found_in_the_log_and_at_the_start(tmp_path):
    folder = _run(tmp_path, [_step(b) for b in range(5, 9)])
    log = [PREFIX + "===========New Run x on host:h,tp:0,pp=0,dp=0===========", PREFIX + "tflops=1,step=5,loss=1"]
    log += [log[0], PREFIX + "tflops=1,step=7,loss=1", PREFIX + "tflops=1,step=8,loss=1"]
    (folder / "train.log").write_text("\n".join(log))
    assert read_run(folder).resumes == (5, 7)


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = _run(tmp_path, [_step(0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    run = read_run(folder)
    assert len(run.steps) == 1 and "incomplete" in run.notes[0]
    assert "incomplete and was left out" in page([run])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds no metrics.jsonl, so it is no run directory"),
        ("", "no step has been written yet"),
        ('{"validation": "en", "step": 1}\n', "no step has been written yet"),
        ('{"step": 0}\nnonsense\n{"step": 1}\n', "line 2: not a JSON object of a training step"),
        ('[1]\n{"step": 1}\n', "line 1: not a JSON object of a training step"),
    ],
)
def test_unusable_runs_are_explained(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataFormatError, match=re.escape(message)) as caught:
        read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(DataFormatError, match="there is no such run directory"):
        read_run(tmp_path / "absent")


def test_the_page_stands_alone_and_escapes(tmp_path):
    folder = _run(tmp_path / "</script><b>", [_step(0), {"validation": "</script>", "step": 0, "loss": 2.0}])
    (folder / "resolved.json").write_text(json.dumps([{"key": "JOB_NAME", "value": "<i>job"}]))
    out = render([folder], tmp_path / "out" / "page.html")
    text = out.read_text(encoding="utf-8")
    assert "http" not in text and "src=" not in text and "url(" not in text and "@import" not in text
    assert text.count("</script>") == 2 and "<i>job" not in text and "&lt;i&gt;job" in text
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_the_payload_holds_the_curves(tmp_path):
    lines = [_step(0, loss=2.0), _step(1, loss=float("nan"), update_applied=False), _step(2, loss=1.0)]
    lines.append({"validation": "en", "step": 2, "loss": 1.5, "acc": None})
    payload = _payload(page([read_run(_run(tmp_path / "a", lines))]))
    run = payload["runs"][0]
    assert run["series"]["loss"] == [2.0, None, 1.0]
    assert (run["step"], run["failed"]) == ([0, 1, 2], [1])
    assert run["time"] == [1.0, 2.0, 3.0]
    assert run["validation"] == {"en": {"step": [2], "loss": [1.5]}}
    assert [chart["key"] for chart in payload["charts"]] == ["loss", "lr_used", "tgs"]


def test_runs_of_one_step_and_without_numbers(tmp_path):
    one = _run(tmp_path / "one", [{"step": 0, "loss": None, "grad_norm": None}])
    two = _run(tmp_path / "two", [{"step": 0, "loss": 0.0}])
    text = page([read_run(one), read_run(two)])
    assert len(_payload(text)["runs"]) == 2 and "2 runs" in text
    assert "First loss" not in facts(read_run(one))


def test_names_take_as_many_parents_as_they_need(tmp_path):
    folders = [_run(tmp_path / a / "train", [_step(0)]) for a in "xy"]
    assert run_names([read_run(folder) for folder in folders]) == ["x/train", "y/train"]
    twice = [read_run(folders[0])] * 2
    assert [name[-4:] for name in run_names(twice)] == [" (1)", " (2)"]


def test_long_runs_keep_their_spikes():
    values: list[float | None] = [1.0] * 100_000
    values[31_415], values[27_182] = 99.0, None
    kept = kept_indices([values, [0.0] * 100_000])
    assert 31_415 in kept and kept[0] == 0 and kept[-1] == 99_999
    assert len(kept) < 4000


def _step(batch: int, *, loss: float | None = 1.0, tokens: int | None = None, **more) -> dict:
    return {"step": batch, "loss": loss, "lr": 0.1, "tgs": 10.0, "loss_scale": 1, "num_consumed_tokens": tokens,
            "time": 100.0 + batch, "step_time": 1.0, **more}  # fmt: skip


def _run(folder, lines: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _payload(text: str) -> dict:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])
