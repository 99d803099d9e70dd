"""The attention benchmark runs, and its backends agree; figures are whatever this machine gives."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "attention.py"


def test_quick_on_the_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--rounds", "1", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["cases"]) == 6
    for case in report["cases"]:
        assert f"{case['case']} ({case['segments']} segments)" in done.stdout
        assert all(each["forward_tflops"] > 0 and each["of_sdpa"]["median"] > 0 for each in case["backends"].values())
    assert {"mask", "slices", "in batches", "one by one", "sdpa"} == set(report["cases"][1]["backends"])
    assert "needs a CUDA device" in report["left_out"]["varlen"]
