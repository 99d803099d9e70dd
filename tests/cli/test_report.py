"""The door of `internlm-ds report`."""

from __future__ import annotations

import json
import subprocess
import sys


def test_report_writes_the_page_and_prints_its_path(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    done = _report(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_of_several_runs(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    done = _report(tmp_path / "a", tmp_path / "b" / "metrics.jsonl", "-o", tmp_path / "c" / "both.html")
    assert done.returncode == 0, done.stderr
    assert "2 runs" in (tmp_path / "c" / "both.html").read_text(encoding="utf-8")


def test_report_of_nothing_is_two_and_one_line(tmp_path):
    done = _report(tmp_path / "absent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"DataFormatError: {tmp_path / 'absent'}: there is no such run directory\n"
    assert not (tmp_path / "absent").exists()


def _report(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "internlm_ds.cli.main", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
