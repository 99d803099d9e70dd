"""`deepspeed`, `torchrun` and the variables of `srun` start the same run, without a compiler; and none leaves a worker
behind when a rank fails or the launcher itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import PRETRAIN, steps, write_run

pytestmark = pytest.mark.timeout(200)

FAILING = Path(__file__).with_name("pretrain_failing.py")
FEW = ("data.total_steps=4", "ckpt.enable_save_ckpt=False", "parallel.zero1=1")
LONG = ("data.total_steps=1000000", "data.skip_batches=")
COMPILERS = ("c++", "cc", "clang", "clang++", "g++", "gcc", "ninja", "nvcc")


def free_port() -> int:
    """Below the range that the system deals out by itself: nobody gets it between this look and the launch."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port


def command_of(
    launcher: str, script: Path, config: Path, run_dir: Path, overrides: tuple[str, ...], ranks: int = 2
) -> list[str]:
    words = [str(script), "--config", str(config), "--run-dir", str(run_dir)]
    words += [word for text in overrides for word in ("--set", text)]
    if launcher == "deepspeed":
        beside_python = Path(sys.executable).with_name("deepspeed")
        return [str(beside_python), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *words]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words]
    return [sys.executable, *words]


def environment(**more: str) -> dict[str, str]:
    """Of the test, without what a launcher sets, and without the test's own choice of accelerator."""
    left = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")}
    return {**left, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory) -> dict[str, str]:
    """A PATH on which every program is found but those that compile, and an empty cache of compiled extensions."""
    folder = tmp_path_factory.mktemp("bin")
    for source in [Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(os.pathsep))]:
        for program in source.iterdir() if source.is_dir() else ():
            compiles = program.name.removeprefix("x86_64-linux-gnu-").split("-")[0] in COMPILERS
            if not compiles and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    assert not any(shutil.which(name, path=str(folder)) for name in COMPILERS)
    extensions = tmp_path_factory.mktemp("extensions")
    return {"PATH": str(folder), "TORCH_EXTENSIONS_DIR": str(extensions), "TMPDIR": str(tmp_path_factory.mktemp("tmp"))}


@pytest.fixture
def started() -> list[subprocess.Popen]:
    """Processes of a test; those still alive are killed at its end, with everything below them."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start(started, command: list[str], *, cwd: Path, **environ: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env=environment(**environ), start_new_session=True, **pipes)
    started.append(process)
    return process


def start_ranks(
    started, launcher: str, script: Path, config: Path, run_dir: Path, *overrides: str, ranks: int = 2, **environ: str
):
    """The launcher, or for `srun` the tasks that it would have started, with the variables it sets."""
    command = command_of(launcher, script, config, run_dir, overrides, ranks)
    if launcher != "srun":
        return [start(started, command, cwd=config.parent, **environ)]
    job = {"SLURM_JOB_ID": "77", "SLURM_NODELIST": "127.0.0.1"}
    job |= dict.fromkeys(("SLURM_NTASKS", "SLURM_TASKS_PER_NODE"), str(ranks))
    job |= {"MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1", **environ}
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]
    return [start(started, command, cwd=config.parent, **job, **task) for task in tasks]


def wait_for_steps(run_dir: Path, launcher: subprocess.Popen[str], *, timeout_s: float = 90.0) -> None:
    deadline, metrics = time.monotonic() + timeout_s, run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.02)


def test_every_launcher_starts_the_same_run(tmp_path: Path, no_compiler: dict[str, str], started):
    config = write_run(tmp_path)
    results = {}
    for launcher in ("deepspeed", "torchrun", "srun"):
        run_dir = tmp_path / launcher
        processes = start_ranks(started, launcher, PRETRAIN, config, run_dir, *FEW, **no_compiler)
        texts = [process.communicate(timeout=100)[0] for process in processes]
        codes = [process.returncode for process in processes]
        assert not any(codes), (launcher, codes, [text[-3000:] for text in texts])
        results[launcher] = steps(run_dir)
        assert sum(text.count("===========New Run") for text in texts) == 2, "each rank says where it stands"
        for line in ("Distributed environment is initialized, data parallel size: 2", "Number of elements on ranks: ["):
            assert sum(text.count(line) for text in texts) == 1
        warnings = [line for text in texts for line in text.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == len(set(warnings)) > 0, "what a run warns of is said by one rank"
        assert not any("Traceback" in text or "mpi4py" in text for text in texts)
    assert results["deepspeed"] == results["torchrun"] == results["srun"]
    assert [s["num_consumed_tokens"] for s in results["torchrun"]] == [256, 512, 768, 1024]
    assert list(Path(no_compiler["TORCH_EXTENSIONS_DIR"]).iterdir()) == [], "DeepSpeed has compiled something"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_one_failing_rank_ends_the_job(launcher: str, tmp_path: Path, started):
    config = write_run(tmp_path)
    processes = start_ranks(started, launcher, FAILING, config, tmp_path / "run", "data.skip_batches=")
    texts = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode not in (0, None) for process in processes), texts
    assert any("RuntimeError: cosmic ray on rank 1" in text for text in texts)
    assert len(steps(tmp_path / "run")) == 2
    assert "cosmic ray on rank 1" in (tmp_path / "run" / "train.rank1.log").read_text()


@pytest.mark.parametrize(
    ("launcher", "place", "rank"), [("torchrun", "backward", 3), ("deepspeed", "optimizer", 0), ("srun", "forward", 2)]
)
def test_one_failing_rank_of_four_ends_the_job(launcher: str, place: str, rank: int, tmp_path: Path, started):
    """Two stages, two data-parallel ranks; nobody but the ranks themselves ends the tasks of `srun` here."""
    config = write_run(tmp_path)
    where = {"FAIL_AT": place, "FAIL_RANK": str(rank), "FAILED_FILE": str(tmp_path / "failed")}
    layout = ("data.skip_batches=", "parallel.pipeline.size=2")
    processes = start_ranks(started, launcher, FAILING, config, tmp_path / "run", *layout, ranks=4, **where)
    texts = [process.communicate(timeout=100)[0] for process in processes]
    seconds = time.time() - float((tmp_path / "failed").read_text())
    assert seconds < 30 and all(process.returncode not in (0, None) for process in processes), texts
    cause = f"RuntimeError: cosmic ray on rank {rank}"
    for text in texts:
        # torchrun adds a traceback of its own, and a summary behind it
        errors = [line for line in text.splitlines() if "Error: " in line and "ChildFailedError" not in line]
        assert errors and all(cause in line for line in errors), text
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert log[-1].endswith(cause), "the log rank's last word"


def test_a_copy_that_drifts_ends_the_run(tmp_path: Path, started):
    """One bit of one rank's weights changes before the third look: exit code 3, nothing of it is saved."""
    config = write_run(tmp_path)
    with config.open("a") as file:
        file.write("internlm_ds = dict(guard=dict(drift_every=1))\n")
    settings = ("data.skip_batches=", "parallel.zero1=1", "ckpt.checkpoint_every=1")
    processes = start_ranks(started, "srun", FAILING, config, tmp_path / "run", *settings, FAIL_AT="weights")
    texts = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [3, 3], texts
    assert "Traceback" not in "".join(texts)
    assert texts[0].splitlines()[-1] == "  embedding.weight: rank 0; rank 1 differ"
    assert sum(text.count("ReplicasDifferError: copies of 1 parameter are no longer equal") for text in texts) == 1
    assert len(steps(tmp_path / "run")) == 3
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir() if path.name.isdigit()) == ["1", "2"]


def test_workers_of_a_killed_launcher_save_and_end(tmp_path: Path, started):
    """The `deepspeed` command starts a process that starts the workers: killed outright, it can tell neither."""
    config = write_run(tmp_path)
    (launcher,) = start_ranks(started, "deepspeed", PRETRAIN, config, tmp_path / "run", *LONG)
    wait_for_steps(tmp_path / "run", launcher)
    os.kill(launcher.pid, signal.SIGKILL)
    # the pipe ends when the last worker has closed it
    text = launcher.communicate(timeout=60)[0]
    assert "stopped by SIGTERM after batch" in text
    last = steps(tmp_path / "run")[-1]["step_count"]
    assert (tmp_path / "ckpt" / str(last) / "manifest.json").exists()
    assert not (tmp_path / "ckpt" / ".lock").exists()


def test_torchrun_passes_sigterm_on(tmp_path: Path, started):
    """A signal to the whole process group, as `timeout` and batch systems send it: each worker gets two of them."""
    config = write_run(tmp_path)
    (launcher,) = start_ranks(started, "torchrun", PRETRAIN, config, tmp_path / "run", *LONG)
    wait_for_steps(tmp_path / "run", launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    text = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0 and "stopped by SIGTERM after batch" in text
    last = steps(tmp_path / "run")[-1]["step_count"]
    assert (tmp_path / "ckpt" / str(last) / "manifest.json").exists()
