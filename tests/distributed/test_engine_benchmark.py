"""The engine's benchmark runs, and a micro-batch costs no more than with DeepSpeed's own schedule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(200)

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "engine.py"


def test_a_micro_batch_costs_no_more_than_deepspeeds(tmp_path: Path):
    options = [
        "--rounds",
        "3",
        "--steps",
        "3",
        "--layers",
        "2",
        "--many",
        "20",
        "--json",
        str(tmp_path / "report.json"),
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, timeout=180, env=environ
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "one rank" in done.stdout and "reducing gradients" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    one, two = report["one_rank"], report["two_ranks"]
    assert set(one) == {"plain loop", "internlm_ds", "DeepSpeed"} and one["plain loop"]["micro_batch_us"] > 0
    assert 0 < two["reduce_gradients_us"] < two["step_us"] and two["compare_copies_us"] > 0
    # the machine may be shared: fails below 0.85 of the goal only
    assert one["DeepSpeed"]["micro_batch_us"] / one["internlm_ds"]["micro_batch_us"] >= 0.85, one
