"""How runs end - signals, stop file, guard - and the kinds of runs beside the plain one: ramp-up, evaluation, other
packings, models that users bring.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import PRETRAIN, launch, steps, train, write_data, write_run

from internlm_ds.checkpoint.formats import native
from internlm_ds.data.binmeta import Writer
from internlm_ds.layout.batch import BatchPlan, parse_rampup

pytestmark = pytest.mark.timeout(200)

LONG = ("data.total_steps=1000000", "data.skip_batches=", "adam.lr=1e-4")


def start(config: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PRETRAIN), "--config", str(config), "--run-dir", str(run_dir)]
    command += [word for text in overrides for word in ("--set", text)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=config.parent, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_steps(run_dir: Path, number: int, process: subprocess.Popen[str], *, timeout_s: float = 60.0) -> None:
    """Wait until metrics.jsonl has so many lines."""
    deadline = time.monotonic() + timeout_s
    file = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no {number} steps within {timeout_s:g} s:\n{process.communicate()[1][-4000:]}")


def stop_with(number: signal.Signals, config: Path, run_dir: Path, *overrides: str) -> tuple[int, str]:
    """Start a long run, send it a signal after three steps; exit code and stderr."""
    process = start(config, run_dir, *overrides)
    wait_for_steps(run_dir, 3, process)
    process.send_signal(number)
    process.send_signal(number)  # a launcher and a batch system often send one each
    try:
        return (process.wait(timeout=30), process.communicate()[1])
    finally:
        process.kill()


def validations(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation" in line]


def test_signals_save_and_the_next_launch_goes_on(tmp_path: Path):
    config = write_run(tmp_path)
    code, text = stop_with(signal.SIGTERM, config, tmp_path / "run1", *LONG)
    assert code == 143, text[-4000:]
    assert "Traceback" not in text and "stopped by SIGTERM after batch" in text
    first = steps(tmp_path / "run1")[-1]
    assert native.open(tmp_path / "ckpt" / str(first["step_count"])).step == first["step_count"]

    code, text = stop_with(signal.SIGINT, config, tmp_path / "run2", *LONG)
    assert code == 130, text[-4000:]
    assert "Traceback" not in text and "stopped by SIGINT" in text
    second = steps(tmp_path / "run2")
    assert (second[0]["step"], second[0]["step_count"]) == (first["step"] + 1, first["step_count"] + 1)

    last = second[-1]["step_count"] + 2
    (tmp_path / "stop").write_text(str(last))
    third = train(config, tmp_path / "run3", *LONG)
    assert [s["step_count"] for s in third] == [last - 1, last]
    assert "stopped by the stop file" in (tmp_path / "run3" / "train.log").read_text()
    assert not (tmp_path / "ckpt" / ".lock").exists()


def test_the_guard_ends_a_run_that_diverged(tmp_path: Path):
    config = write_run(tmp_path)
    with config.open("a") as file:
        file.write("internlm_ds = dict(guard=dict(max_bad_steps=2))\n")
    done = launch(config, tmp_path / "run", "adam.lr=1e30", "lr_scheduler.warmup_ratio=0", "data.skip_batches=")
    assert done.returncode == 3, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("TrainingStoppedError: ")]
    assert "2 updates in a row failed" in error and "internlm_ds.guard.max_bad_steps = 2" in error
    lines = steps(tmp_path / "run")
    assert [s["update_applied"] for s in lines] == [True, False, False]
    assert [s["inf_nan_skip_batches"] for s in lines] == [0, 1, 2]
    assert lines[1]["grad_norm"] is None and lines[1]["step_count"] == 1 and lines[1]["loss"] is None
    assert lines[1]["num_consumed_tokens"] == lines[0]["num_consumed_tokens"]
    state = native.open(tmp_path / "ckpt" / "1").train_state
    assert (state["batch_count"], state["step_count"], state["bad_steps_in_a_row"]) == (3, 1, 0)
    assert "rank 0 ends: TrainingStoppedError" in (tmp_path / "run" / "train.log").read_text()


def test_rampup_evaluation_and_absent_tensorboard(tmp_path: Path):
    config = write_run(tmp_path)
    write_data(tmp_path / "valid", files=("en/v", "cn/w"), samples=20, seed=3)
    done = launch(
        *(config, tmp_path / "run", "data.total_steps=8", "data.skip_batches='1'", "data.micro_num=4"),
        *("data.rampup_batch_size='1 2 2'", f"data.valid_folder={tmp_path / 'valid'}", "data.valid_every=3"),
        *("data.valid_micro_num=1", "data.micro_bsz=1", "data.seq_len=64", "enable_tb=True"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = steps(tmp_path / "run")
    plan = BatchPlan(micro_bsz=1, seq_len=64, micro_num=4, rampup=parse_rampup("1 2 2"))
    assert [s["micro_num"] for s in lines] == [plan.micro_num_at(s["step"]) for s in lines]
    assert {s["micro_num"] for s in lines} == {1, 3, 4}
    consumed = [sum(plan.tokens_at(s["step"]) for s in lines[: n + 1]) for n in range(len(lines))]
    assert [s["num_consumed_tokens"] for s in lines] == consumed
    found = validations(tmp_path / "run")
    assert [(v["validation"], v["step_count"]) for v in found] == [(n, c) for c in (3, 6) for n in ("cn", "en")]
    for line in found:
        assert set(line) == {"validation", "step", "step_count", "loss", "acc", "perplexity"}
        assert line["step"] == next(s["step"] for s in lines if s["step_count"] == line["step_count"])
        assert 3.0 < line["loss"] < 7.0 and 0.0 <= line["acc"] <= 1.0 and line["perplexity"] > 1.0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("Validation on en: step=3,val/en_loss=") == 1
    warned = [line for line in done.stderr.splitlines() if "WARNING" in line or line.startswith("warning:")]
    assert len(warned) == len(set(warned))
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert sum("tensorboard is off" in line for line in warned) == 1


@pytest.mark.parametrize(
    "overrides",
    [["data.pack_sample_into_one=True"], ["data.use_packed_dataset=False", "model.use_flash_attn=False"]],
    ids=["samples-in-one", "unpacked"],
)
def test_other_packings_train(overrides: list[str], tmp_path: Path):
    config = write_run(tmp_path)
    lines = train(config, tmp_path / "run", *overrides, "data.total_steps=4", "ckpt.enable_save_ckpt=False")
    assert [s["update_applied"] for s in lines] == [True] * 4
    assert [s["num_consumed_tokens"] for s in lines] == [128, 256, 384, 512]
    # an unpacked micro-batch may hold no sample at all: it counts 0 in the mean of two
    assert all(2.0 < s["loss"] < 6.0 and 4.0 < s["loss_from_metric"] < 6.0 for s in lines)
    assert all(s["num_samples_in_batch"] > 0 for s in lines)
    assert not (tmp_path / "ckpt").exists()


USER_MODELS = """
import torch
from torch import nn

from internlm_ds.registry import MODEL_INITIALIZER


class Bigram(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, tokens, cu_seqlens):
        return self.out(self.embed(tokens))


class Embed(nn.Embedding):
    def forward(self, carried):
        return super().forward(carried[0]), carried[1]


class Mix(nn.Linear):
    def forward(self, carried):
        return carried[0] + torch.tanh(super().forward(carried[0])), carried[1]


class Head(nn.Linear):
    def forward(self, carried):
        return super().forward(carried[0])


@MODEL_INITIALIZER.register_module(module_name="BIGRAM")
def bigram(vocab_size, width, dtype, num_layers):
    return Bigram(vocab_size, width).to(dtype)


@MODEL_INITIALIZER.register_module(module_name="ENTRIES")
def entries(vocab_size, width, dtype, num_layers):
    from internlm_ds.model.layers import LayerEntry

    blocks = [LayerEntry(f"mix.{n}", None, lambda recompute: Mix(width, width)) for n in range(num_layers)]
    first = LayerEntry("embed", None, lambda recompute: Embed(vocab_size, width))
    return [first, *blocks, LayerEntry("head", None, lambda recompute: Head(width, vocab_size))]


model_type = "BIGRAM"
model = dict(vocab_size=128, width=24, dtype="torch.float32", num_layers=2)
"""


def test_models_that_users_bring(tmp_path: Path):
    """A plain module, stopped and resumed; layer entries on two pipeline stages. Both from the user's own file."""
    with Writer(tmp_path / "data" / "en" / "x.bin") as writer:  # each token tells the next one
        for first in range(1, 100):
            writer.write([(first + n) % 127 + 1 for n in range(40)])
    config = write_run(tmp_path, stop_at=4)
    with config.open("a") as file:
        file.write(USER_MODELS)
    first = train(config, tmp_path / "run1", "data.total_steps=8", "adam.lr=0.03")
    (tmp_path / "stop").write_text("0")
    second = train(config, tmp_path / "run2", "data.total_steps=8", "adam.lr=0.03")
    assert [s["step_count"] for s in first + second] == [1, 2, 3, 4, 5, 6, 7]
    assert second[-1]["loss"] < first[0]["loss"]
    assert sorted(native.open(tmp_path / "ckpt" / "7").weight_names) == ["embed.weight", "out.bias", "out.weight"]

    folder = "ckpt.save_ckpt_folder=" + str(tmp_path / "ckpt2")
    overrides = ("model_type=ENTRIES", "data.total_steps=8", "adam.lr=0.03", folder)
    piped = train(config, tmp_path / "run3", *overrides, "parallel.pipeline=2", ranks=2)
    assert len(piped) == 7 and piped[-1]["loss"] < piped[0]["loss"]
    saved = native.open(tmp_path / "ckpt2" / "7")
    assert {"embed.weight", "mix.0.weight", "mix.1.bias", "head.weight"} < set(saved.weight_names)

    smaller = launch(config, tmp_path / "run4", *overrides, "model.width=16")
    assert smaller.returncode == 2 and "Traceback" not in smaller.stderr
    assert "does not fit the model (6 parameters):" in smaller.stderr
    assert "embed.weight [128, 16]: shape [128, 24] in the files" in smaller.stderr
