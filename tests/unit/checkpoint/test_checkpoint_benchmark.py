"""The checkpoint benchmark runs, whatever its figures are here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "checkpoint.py"


def test_benchmark_runs(tmp_path: Path):
    size = ["--mb", "12", "--rounds", "1", "--parts", "save,async,load", "--folder", str(tmp_path)]
    command = [sys.executable, str(BENCHMARK), *size, "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    for part, over in (("save", "safetensors + fsync"), ("async", "dcp.async_save"), ("load", "torch.load")):
        assert report[part]["over"] == over and report[part]["ratios"][over]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
