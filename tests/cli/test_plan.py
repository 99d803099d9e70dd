"""`internlm-ds plan` from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_plan(*args: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    command = [sys.executable, "-m", "internlm_ds.cli.main", "plan", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def test_text_for_people() -> None:
    done = run_plan("model_configs/7b.py", "--world-size", 8)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("7,321,948,160", "131,072 tokens a step", "Adam moments", "of 80.00 GB: fits"):
        assert words in done.stdout


def test_json_for_programs() -> None:
    done = run_plan("model_configs/20b.py", "--world-size", 32, "--json")
    assert done.returncode == 0
    data = json.loads(done.stdout)
    assert data["layout"] == {"pipe": 4, "data": 8, "tensor": 1, "zero": 8, "chunks": 1}
    assert data["fits"] and len(data["stages"]) == 4


def test_overrides_and_overlays_count() -> None:
    plain = json.loads(run_plan("model_configs/7b.py", "--world-size", 8, "--json").stdout)
    args = ("--set", "model.checkpoint=True", "--overlay", "ds_configs/overlays/offload_optimizer_cpu.json")
    done = run_plan("model_configs/7b.py", "--world-size", 8, "--json", *args)
    assert done.returncode == 0
    assert json.loads(done.stdout)["peak_bytes"] < plain["peak_bytes"]


def test_timeline_is_drawn_below() -> None:
    done = run_plan("model_configs/20b.py", "--world-size", 32, "--timeline")
    assert done.returncode == 0
    *_, last_stage, idle = done.stdout.splitlines()
    assert last_stage.startswith("stage 3 |") and "F0-B0----F1-B1----" in last_stage
    assert idle.startswith("idle: ")


def test_what_cannot_be_translated_has_no_plan() -> None:
    done = run_plan("model_configs/7b.py", "--world-size", 8, "--set", "model.is_reward=True")
    assert done.returncode == 2 and done.stdout == ""
    assert "TranslationError: 1 problem" in done.stderr and "reward models" in done.stderr


def test_what_does_not_divide_has_no_plan() -> None:
    done = run_plan("model_configs/20b.py", "--world-size", 6)
    assert done.returncode == 2
    assert "parallel.pipeline" in done.stderr and "Traceback" not in done.stderr
