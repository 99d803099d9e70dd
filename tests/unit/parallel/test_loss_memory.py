"""Whole logits against chunks, each in a process of its own: memory above inputs and gradients, and equal results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "cross_entropy.py"


def test_less_than_a_quarter_of_the_plain_memory(tmp_path: Path):
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--rounds", "1", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["extra_bytes"]["plain"] > 2 * 4 * 1024 * 32768, "the plain way has logits and their gradient"
    assert found["extra_bytes_of_plain"]["chunked"]["median"] < 0.25
    assert found["largest_difference"] < 1e-5
    assert "chunked" in done.stdout
