"""The door of `internlm-ds verify`: a table and 0, a claim that failed and 1, wrong usage and 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(240)
COMMAND = ["-m", "internlm_ds.cli.main", "verify"]
TAMPERED = [str(Path(__file__).with_name("tampered_verify.py"))]


def verify(script: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=230)


def test_two_ranks_equal_one_process():
    done = verify(COMMAND, "--quick", "--ranks", "2", "--backend", "gloo")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "11 claims that it equals one process" in lines[0] and "(CPU, gloo)" in lines[0]
    passed = [line for line in lines if line.startswith("pass  ")]
    assert len(passed) == 11 and all(line.endswith("equal") for line in passed)
    assert lines[-1].startswith("11 of 11 claims hold")
    assert "\r" not in done.stderr and "Traceback" not in done.stderr


def test_a_shard_without_its_flag_is_found():
    done = verify(TAMPERED, "--quick", "--ranks", "2", "--backend", "gloo")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    reasons = [line for line in done.stdout.splitlines() if line.startswith("FAIL  ") and " off by " in line]
    assert any(line.startswith("FAIL  tensor=2: grad norm off by ") for line in reasons)
    assert all(line.startswith("FAIL  tensor=2") for line in reasons)
    assert "9 of 11 claims hold" in done.stdout


@pytest.mark.parametrize("text", ["0", "-1", "two", "17"])
def test_a_number_of_ranks_that_is_none(text: str):
    done = verify(COMMAND, f"--ranks={text}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument --ranks: {text!r} is not a number of ranks from 1 to 16" in done.stderr


def test_more_gpus_than_there_are():
    done = verify(COMMAND, "--ranks", "16", "--backend", "nccl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("MachineError: --backend nccl needs a GPU for each of 16 ranks, and torch sees ")
    assert len(done.stderr.splitlines()) == 1
