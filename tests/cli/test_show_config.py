"""`internlm-ds show-config`: table, JSON, overrides, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """\
SEQ_LEN = 64
ckpt = dict(save_ckpt_folder="local:x")
data = dict(seq_len=SEQ_LEN, micro_num=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=1024, clip_grad_norm=1.0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=50000)
beta2_scheduler = dict(init_beta2=0.95)
model = dict(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=256)
parallel = dict(zero1=-1)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.py"
    path.write_text(CONFIG)
    return path


def show(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "internlm_ds.cli.main", "show-config", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_table(path: Path) -> None:
    done = show(path, "--set", "SEQ_LEN=128", "--set", "data.micro_bsz=3")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split(" = ")[0].strip(): line.split(" = ")[1].split() for line in done.stdout.splitlines() if line}
    assert rows["SEQ_LEN"][:2] == ["128", "override"]
    assert rows["data.seq_len"][:2] == ["128", f"{path}:3"]
    assert rows["data.micro_bsz"][:2] == ["3", "override"]
    assert rows["data.packed_length"][:2] == ["384", "derived"]
    assert rows["data.seed"][:2] == ["1024", "default"]


def test_json_is_strict(path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    done = show(path, "--json")
    rows = {row["key"]: row for row in json.loads(done.stdout, parse_constant=refuse)}
    assert rows["ckpt.checkpoint_every"] == {
        "key": "ckpt.checkpoint_every", "value": "inf", "origin": "default", "file": None, "line": None, "note": "",
    }  # fmt: skip
    assert (rows["parallel.zero1"]["value"], rows["parallel.zero1"]["line"]) == (-1, 9)


def test_warnings_go_to_stderr(path: Path) -> None:
    path.write_text(CONFIG + "data['total_steps'] = 50000\n")
    done = show(path, "--set", "data.total_steps=7", "--json")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: lr_scheduler.total_steps = 50000 (line 6) no longer equals")
    assert json.loads(done.stdout)


def test_all_problems_are_shown_and_the_exit_code_is_2(path: Path) -> None:
    path.write_text(CONFIG.replace("micro_num", "micro_nun").replace("clip_grad_norm", "clip_grad_norn"))
    done = show(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"ConfigError: 2 problems in {path}",
        "  data.micro_nun = 2 (line 3): unknown key; did you mean micro_num?",
        "  hybrid_zero_optimizer.clip_grad_norn = 1.0 (line 4): unknown key; did you mean clip_grad_norm?",
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = show(tmp_path / "none.py")
    assert done.returncode == 2
    assert done.stderr == f"ConfigError: {tmp_path / 'none.py'}: No such file or directory\n"


def test_an_error_of_the_file(path: Path) -> None:
    path.write_text("a = 1\nb = a.x\n")
    done = show(path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"ConfigError: 1 problem in {path}",
        "  AttributeError (line 2): 'int' object has no attribute 'x'",
    ]


def test_wrong_usage() -> None:
    assert show().returncode == 2
    assert "CONFIG" in show("--help").stdout
