"""`launch/pretrain.py` up to the first process group: the dry run, and everything that is wrong, said once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import CONFIG

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = "launch/pretrain.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "SLURM_PROCID")


def run(*words: object, python: tuple[str, ...] = (), cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | environ
    command = [sys.executable, *python, str(ROOT / PRETRAIN), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """The shipped 7B file with `zero1=8` and the SFT recipe switched on, as the tutorial has them."""
    text = (
        (ROOT / "model_configs" / "7b.py")
        .read_text(encoding="utf-8")
        .replace("zero1=-1, tensor=1", "zero1=8, tensor=1")
    )
    path = tmp_path / "seed.py"
    path.write_text(text.replace("    # load_ckpt_info", "    load_ckpt_info"), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


# ---- dry run


def test_dry_run_prints_the_plan_without_torch(tutorial: Path):
    script = (
        "import sys, json\n"
        f"sys.argv = ['pretrain.py', '--config', {str(tutorial)!r}, '--dry-run', '--world-size', '8']\n"
        "from internlm_ds.train.run import main\n"
        "code = main()\n"
        "print(json.dumps([code, sorted({'torch', 'deepspeed'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    *plan, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []], done.stderr
    plan = "\n".join(plan)
    for words in ("pipeline 1 x data 8 x tensor 1", "131,072 tokens a step", "7,321,948,160", "Adam moments", ": fits"):
        assert words in plan
    assert not Path("RUN").exists()
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)) and all(line.startswith("warning: ") for line in lines)
    missing = [line for line in lines if "load_ckpt_info" in line]
    assert len(missing) == 1 and missing[0].startswith("warning: ckpt.load_ckpt_info names local:")
    assert "does not exist: a run would stop here" in missing[0]


def test_dry_run_needs_a_number_of_ranks(tiny: Path):
    done = run("--config", tiny, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ConfigError: --dry-run plans for a number of ranks: give --world-size N, or start it with a launcher\n"
    )
    # torn variables of a cluster do not matter to it
    assert run("--config", tiny, "--dry-run", "--world-size", 2, WORLD_SIZE="4").returncode == 0


def test_dry_run_under_a_launcher_speaks_once(tiny: Path):
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    first, second = (run("--config", tiny, "--dry-run", RANK=r, LOCAL_RANK=r, **variables) for r in ("0", "1"))
    assert (first.returncode, second.returncode, second.stdout, second.stderr) == (0, 0, "", "")
    assert first.stdout.startswith("tiny.py on 2 ranks\n")


# ---- what is wrong


def test_a_file_with_four_mistakes(tutorial: Path):
    text = tutorial.read_text().replace(" micro_num=", " micro_nun=").replace("clip_grad_norm=", "clip_grad_norn=")
    text = text.replace("tensor=1", "tensor=3").replace('skip_batches=""', 'skip_batches="10-5"')
    tutorial.write_text(text)
    done = run("--config", tutorial, "--dry-run", "--world-size", 8)
    assert (done.returncode, done.stdout) == (2, "")
    first, *problems = done.stderr.splitlines()
    assert first == f"ConfigError: 4 problems in {tutorial}" and len(problems) == 4
    lines = {word: n for n, line in enumerate(text.splitlines(), 1) for word in _MISTAKES if word in line}
    for (word, words), problem in zip(sorted(_MISTAKES.items(), key=lambda m: lines[m[0]]), _by_line(problems)):
        assert f"(line {lines[word]})" in problem and all(part in problem for part in words), problem


_MISTAKES = {
    " micro_nun=": ["data.micro_nun", "micro_num"],
    "clip_grad_norn": ["hybrid_zero_optimizer.clip_grad_norn", "clip_grad_norm"],
    "tensor=3": ["parallel.tensor = 3"],
    "10-5": ["data.skip_batches = '10-5'", "5-10"],
}


def _by_line(problems: list[str]) -> list[str]:
    return sorted(problems, key=lambda text: int(text.split("(line ")[1].split(")")[0]))


def test_all_obstacles_of_this_machine_and_a_way_that_works(tutorial: Path, tmp_path: Path):
    done = run("--config", tutorial)
    assert (done.returncode, done.stdout) == (2, "")
    first, *obstacles, advice = done.stderr.splitlines()
    assert first.startswith(f"MachineError: {tutorial} cannot run on this machine (no GPU, ")
    assert first.endswith("4 obstacles")
    assert [o.split()[0].rstrip(":") for o in obstacles] == [
        "model.dtype",
        "parallel.zero1",
        "memory",
        "ckpt.load_ckpt_info",
    ]
    assert "(line " in obstacles[0] and "does not exist; give a folder that exists" in obstacles[3]
    assert advice.startswith("this works here: python launch/pretrain.py --config ")
    words = shlex.split(advice.removeprefix("this works here: python launch/pretrain.py "))
    works = run(*words, "--run-dir", tmp_path / "run")
    assert works.returncode == 0, works.stderr[-3000:]
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 20


def test_one_error_of_two_processes_is_said_once(tiny: Path, tmp_path: Path):
    tiny.write_text(tiny.read_text().replace("micro_num=2", "micro_nun=2"))
    done = run("--config", tiny, "--run-dir", tmp_path / "run", python=tuple(TORCHRUN))
    assert done.returncode != 0
    assert done.stderr.count("ConfigError: 1 problem in") == 1 and done.stderr.count("micro_nun") == 1
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing_is_said_once(tiny: Path, tmp_path: Path):
    """Found after the process group is there: it is still one error, on two ranks."""
    done = run("--config", tiny, "--run-dir", tmp_path / "run", python=tuple(TORCHRUN), OMP_NUM_THREADS="1")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("DataFormatError: ")]
    assert len(said) == 1 and f"{tmp_path}/data" in said[0], done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr, "what torchrun says of the rank that ended first"
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("DataFormatError: ")[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "rank 0 ends: DataFormatError: " in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--confg", "x"], "pretrain.py: error: "),
        (["--config", "TINY", "--wold-size", "2"], "error: unrecognized arguments: --wold-size 2"),
        (["--config", "no/such.py", "--dry-run", "--world-size", "1"], "no/such.py"),
        (
            ["--config", "TINY", "--world-size", "2"],
            "ConfigError: --world-size 2 belongs to --dry-run; 1 process was started",
        ),
        (
            ["--config", "TINY", "--launcher", "slurm"],
            "LayoutError: --launcher slurm: the environment shows no launcher",
        ),
        (["--config", "TINY", "--local_rank=1"], "LayoutError: --local_rank 1, but no launcher's variables"),
        (["--config", "TINY", "--backend", "nccl"], "MachineError: --backend nccl needs a GPU"),
        (["--config", "TINY", "--set", "adam.lrr=1"], "adam.lr"),
        (["--config", "TINY", "--overlay", "none.json"], "none.json"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:3]) if isinstance(value, list) else "",
)
def test_wrong_words(words: list[str], message: str, tiny: Path):
    done = run(*(str(tiny) if word == "TINY" else word for word in words))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
