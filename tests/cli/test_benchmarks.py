"""Every benchmark runs with `--quick`, prints its table and writes its figures; gates only where they hold anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# a command writes a report; what the others hold is imported or started by one
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if '"--json"' in path.read_text(encoding="utf-8"))
HELPERS = {"corpus", "device_time", "first_step_peer", "pairs"}
HELPERS |= {f"step_{name}" for name in ("arena", "contestant", "facts", "ours", "peers", "titan")}
LIMIT_S = 280
# a goal is missed below this share of it: the machine may be shared
MARGIN = 0.85

pytestmark = pytest.mark.timeout(LIMIT_S + 20)


def check_attention(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == 6
    for case in report["cases"]:
        assert f"{case['case']} ({case['segments']} segments)" in report["shown"]
        assert all(each["forward_tflops"] > 0 and each["of_sdpa"]["median"] > 0 for each in case["backends"].values())
    assert {"mask", "slices", "in batches", "one by one", "sdpa"} == set(report["cases"][1]["backends"])
    assert "needs a CUDA device" in report["left_out"]["varlen"]


def check_engine(report: dict[str, Any]) -> None:
    one, two = report["one_rank"], report["two_ranks"]
    assert set(one) == {"plain loop", "internlm_ds", "DeepSpeed"} and one["plain loop"]["micro_batch_us"] > 0
    assert 0 < two["reduce_gradients_us"] < two["step_us"] and two["compare_copies_us"] > 0
    # a micro-batch costs no more than with DeepSpeed's own schedule
    assert one["DeepSpeed"]["micro_batch_over_ours"] >= MARGIN, one


def check_checkpoint(report: dict[str, Any]) -> None:
    for part, over in (("save", "safetensors + fsync"), ("async", "dcp.async_save"), ("load", "torch.load")):
        assert report[part]["over"] == over and report[part]["ratios"][over]


def check_step(report: dict[str, Any]) -> None:
    (case,) = report["cases"]
    # a tiny model's speed says nothing; that of its loss says that all of ours train the same
    ours = [row["loss"] for name, row in case["rows"].items() if name.startswith(("internlm-ds", "2 "))]
    assert len(ours) == 5 and max(ours) - min(ours) < 1e-4


def check_startup(report: dict[str, Any]) -> None:
    # seconds of processor: those of the clock say what else the machine does
    taken = {name: found["cpu"]["median"] / found["goal"] for name, found in report["ratios"].items()}
    assert len(taken) == 5 and max(taken.values()) <= 1 / MARGIN, taken


def check_tokenizing(report: dict[str, Any]) -> None:
    (found,) = (each for each in report.values() if isinstance(each, dict) and "equal" in each)
    assert found["equal"]
    assert set(found["peak_mb"]) == {"sentencepiece", "ours", "ours2"}
    assert set(found["ratios"]) == {"inside, 1 thread", "inside, 2 threads", "whole, 1 thread", "whole, 2 threads to 1"}


def check_cross_entropy(report: dict[str, Any]) -> None:
    tokens, words = report["settings"]["tokens"], report["settings"]["words"]
    assert report["extra_bytes"]["plain"] > 2 * 4 * tokens * words, "the plain way has logits and their gradient"
    assert report["extra_bytes_of_plain"]["chunked"]["median"] < 0.25
    assert report["largest_difference"] < 1e-5


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "attention": check_attention,
    "checkpoint": check_checkpoint,
    "cross_entropy": check_cross_entropy,
    "engine": check_engine,
    "startup": check_startup,
    "step": check_step,
    "tokenizing": check_tokenizing,
}


def test_every_file_is_a_command_or_a_known_helper():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*COMMANDS, *HELPERS}


@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark_runs(name: str, tmp_path: Path):
    report_file, here = tmp_path / "report.json", tmp_path / "here"
    here.mkdir()
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", str(report_file)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environ,
        cwd=here,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(report_file.read_text())
    assert report["date"] and report["machine"] and report["versions"]["python"]
    # a table: several lines with numbers below the headline
    assert sum(any(sign.isdigit() for sign in line) for line in done.stdout.splitlines()) >= 4, done.stdout
    if name in CHECKS:
        CHECKS[name]({**report, "shown": done.stdout})
    assert not list(here.iterdir()), "a benchmark leaves files behind where it is called"


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_step_is_as_fast_as_it_should_be(tmp_path: Path):
    """Real sizes of a CPU: ten minutes."""
    report_file = tmp_path / "report.json"
    command = [sys.executable, str(FOLDER / "step.py"), "--device", "cpu", "--json", str(report_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stderr[-4000:]
    (case,) = json.loads(report_file.read_text())["cases"]
    speeds = {name: row["speed"]["median"] for name, row in case["rows"].items() if "speed" in row}
    goals = {
        "internlm-ds": 0.98,
        "2 ranks, ZeRO-1": 0.95,
        "2 stages, 1F1B": 0.97 * 4 / 5,
        "2 stages, zero bubble": 1.0,
        "2 stages, 2 chunks": 1.0,
    }
    assert all(speeds[name] >= MARGIN * goal for name, goal in goals.items()), speeds


def make_wheel(folder: Path, name: str) -> None:
    """A package of one empty module, as pip takes it."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(sys.platform != "linux", reason="benchmarks/gpu.sh is for Linux")
def test_gpu_script_installs_and_collects_where_there_is_no_gpu(tmp_path: Path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    make_wheel(wheels, "carried_over")
    done = subprocess.run(
        ["bash", str(FOLDER / "gpu.sh"), "run", str(wheels), str(out)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    installed = [str(out / "venv" / "bin" / "python"), "-c", "import carried_over, torch"]
    assert subprocess.run(installed, timeout=60).returncode == 0
    *_, passed, left_out, failed = done.stdout.splitlines()
    assert passed == "passed: tests" and failed == "failed: nothing"
    assert all(f"{name} (no GPU)" in left_out for name in COMMANDS)
    log = (out / "tests.log").read_text()
    assert " skipped in " in log and "no CUDA device" in log and " passed" not in log and "error" not in log.lower()


def test_gpu_script_says_how_it_is_used():
    done = subprocess.run(["bash", str(FOLDER / "gpu.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "gpu.sh wheels DIR" in done.stderr and "gpu.sh run DIR OUT" in done.stderr
