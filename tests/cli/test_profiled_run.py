"""`--profile`: a trace, and beside it a table that says where a step's time goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# whatever else a step of a tiny model on one rank does
EXPECTED = ("attention", "matmul", "norm", "loss", "optimizer", "rest")

# the ranges are taken away again: the run is over, and everything is as it was
SCRIPT = """
import sys
import torch.distributed as dist
from internlm_ds.engine.channels import Channels, Incoming
from internlm_ds.train.run import main
owners = (dist, Channels, Incoming)
before = [dict(vars(owner)) for owner in owners]
code = main(sys.argv[1:])
for owner, had in zip(owners, before):
    assert all(vars(owner)[name] is value for name, value in had.items() if callable(value)), owner
sys.exit(code)
"""


def test_profiled_run_writes_a_trace_and_a_table(tmp_path: Path):
    options = ["--config", str(ROOT / "model_configs" / "debug_cpu.py"), "--set", "data.total_steps=5", "--profile"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *options, "--run-dir", str(tmp_path), "--backend", "gloo"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    trace = tmp_path / "traces" / "rank0_dp0_tp0_pp0.json"
    assert json.loads(trace.read_text())["traceEvents"]
    text = trace.with_suffix(".txt").read_text()
    assert text in done.stdout + done.stderr, "the log has the table, too"
    rows = {line[:24].strip(): [float(word) for word in line[24:].split()] for line in text.splitlines()[1:]}
    assert sum(share for _, share in rows.values()) == pytest.approx(100, abs=0.6)
    assert all(rows[room][1] > 0 for room in EXPECTED), text
    # of what one rank does nothing of, and of data that cost nothing
    assert rows["waiting for other ranks"][1] == 0
    assert "step=4" in done.stdout + done.stderr
