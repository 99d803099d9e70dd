"""The tokenizing benchmark runs, and finds the files equal, whatever its figures are here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[4] / "benchmarks" / "tokenizing.py"


def test_benchmark_runs(tmp_path, tiny_model):
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"the cat {i} sat on the mat 猫坐在垫子上。\n\n  {'dog ' * (i % 9)}\n" for i in range(2000))
    )
    command = [sys.executable, str(BENCHMARK), "--model", str(tiny_model), "--text", str(text), "--quick"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "report.json").read_text())[tiny_model.name]
    assert found["equal"]
    assert set(found["peak_mb"]) == {"sentencepiece", "ours", "ours2"}
    assert set(found["ratios"]) == {"inside, 1 thread", "inside, 2 threads", "whole, 1 thread", "whole, 2 threads to 1"}
