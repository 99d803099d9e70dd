"""The demo's own parts: real text, commands that are shown and kept, and what it says when something goes wrong.

Nothing is trained here: `make demo` itself is the test of the way as a whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from internlm_ds.testing import corpus, demo

LINE = (
    "2026-01-02 03:04:05,678\tINFO assemble.py:1 in step -- "
    "tflops=0.1,step={step},loss=6.25,tgs (tokens/gpu/second)=512.5,lr=0.001,num_consumed_tokens=1024\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    return tmp_path


def write_metrics(run_dir: Path, *losses: float, first: int = 0) -> None:
    run_dir.mkdir(exist_ok=True)
    records = [{"step": first + i, "loss": loss} for i, loss in enumerate(losses)]
    records.append({"validation": "en", "step": first, "loss": 1.0})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_pieces_are_bounded_distinct_and_spread():
    texts = [(f"file{i}", f"line {i}\n" * 50) for i in range(40)] + [("again", "line 1\n" * 50)]
    found = corpus.pieces(texts, max_chars=2000, piece_chars=200)
    assert sum(map(len, found)) <= 2000
    assert len(set(found)) == len(found)
    assert len({piece.split("\n", 1)[0] for piece in found}) > 5
    assert found == corpus.pieces(reversed(texts), max_chars=2000, piece_chars=200)


def test_this_machine_has_source_text():
    name, text = next(corpus.standard_library())
    assert name.endswith(".py") and text


def test_command_is_shown_run_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]):
    output = demo.run("hello", [sys.executable, "-c", "print('hello'); print('you')"])
    assert output == "hello\nyou\n"
    assert (folder / "logs" / "hello.log").read_text() == output
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("  $ ") and "print" in shown[0]
    assert shown[1:] == ["  hello", "  you"]


def test_failed_command_says_code_and_log(folder: Path):
    with pytest.raises(demo.DemoFailedError) as failure:
        demo.run("bad", [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])
    assert "exit code 3" in str(failure.value)
    assert str(folder / "logs" / "bad.log") in str(failure.value)
    assert "the reason" in str(failure.value)


def test_training_lines_are_thinned():
    lines = ["noise\n", *(LINE.format(step=step) for step in range(2 * demo.SHOW_EVERY))]
    lines.append("2026-01-02 03:04:05,678\tINFO a.py:1 in f -- checkpoint of step 60 saved\n")
    shown = list(demo.training_progress(iter(lines)))
    assert shown[0] == "step    0   loss 6.2500   512.5 tokens/s per process"
    assert [text.split()[1] for text in shown[:-1]] == ["0", str(demo.SHOW_EVERY)]
    assert shown[-1] == "checkpoint of step 60 saved"


def test_too_little_text_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "standard_library", lambda: iter([("a", "one line\n")]))
    with pytest.raises(demo.DemoFailedError, match="too little text of type 'code': 1 pieces"):
        demo.make_corpus()


def test_run_without_steps_is_said(folder: Path):
    write_metrics(folder / "train")
    with pytest.raises(demo.DemoFailedError, match=r"metrics.jsonl holds no step"):
        demo.steps_of(folder / "train")


def summary_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run", lambda name, command, progress=None: "def main(argv):\n    pass\n")
    demo.print_results(seconds=1.0)


def test_summary_names_what_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write_metrics(folder / "train", 6.0, 5.0)
    write_metrics(folder / "resume", 4.0, 3.0, first=demo.FIRST_STEPS)
    summary_of(monkeypatch)
    out = capsys.readouterr().out
    assert "first loss        6.0000" in out
    assert "last loss         3.0000   (50% of the first)" in out
    assert f"resumed at step {demo.FIRST_STEPS}" in out
    assert str(folder / "hf") in out and str(folder / "report.html") in out
    assert "def main(argv):" in out


def test_loss_that_stays_high_fails(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write_metrics(folder / "train", 6.0)
    write_metrics(folder / "resume", 3.61, first=demo.FIRST_STEPS)
    with pytest.raises(demo.DemoFailedError, match="the last loss is 60% of the first, above 60%"):
        summary_of(monkeypatch)


def test_launch_that_did_not_resume_fails(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write_metrics(folder / "train", 6.0)
    write_metrics(folder / "resume", 3.0, first=0)
    with pytest.raises(demo.DemoFailedError, match=f"began at step 0, not at {demo.FIRST_STEPS}"):
        summary_of(monkeypatch)


def test_failure_ends_the_demo_with_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)  # the demo goes to its checkout; the test comes back

    def fail() -> None:
        raise demo.DemoFailedError("no disk")

    monkeypatch.setattr(demo, "begin_afresh", fail)
    assert demo.main() == 1
    assert "demo: no disk" in capsys.readouterr().err


def test_earlier_demo_is_removed(folder: Path):
    (folder / "checkpoints" / "5").mkdir(parents=True)
    demo.begin_afresh()
    assert [path.name for path in folder.iterdir()] == ["logs"]
