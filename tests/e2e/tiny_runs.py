"""Tiny training runs in processes of their own, for the end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = REPOSITORY / "launch" / "pretrain.py"
PRETRAIN_FP16 = Path(__file__).with_name("pretrain_fp16.py")

# what differs between two runs that are the same
CLOCK_KEYS = {"time", "step_time", "tflops", "fwd_bwd_time", "memory_allocated_peak", "tgs", "mfu", "hfu"}

CONFIG = """
ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder="local:{folder}/ckpt",
    checkpoint_every=1000,
    stop_file_path="{folder}/stop",
)
data = dict(
    seq_len=32,
    micro_num=2,
    micro_bsz=2,
    total_steps=20,
    skip_batches="4,12-13",
    rampup_batch_size="",
    pack_sample_into_one=False,
    train_folder="{folder}/data",
    num_worker=0,
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=3),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=1,
)
hybrid_zero_optimizer = dict(reduce_bucket_size=2**16, clip_grad_norm=1.0)
loss = dict(label_smoothing=0)
adam = dict(lr=3e-3, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0.8, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=20, init_steps=0, warmup_ratio=0.2, eta_min=3e-4)
beta2_scheduler = dict(init_beta2=0.9, c=0.8, cur_iter=-1)
model = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    vocab_size=128,
    mlp_ratio=2,
    embed_split_hidden=True,
    drop_rate=0.1,
    dtype="torch.float32",
)
parallel = dict(zero1=-1, tensor=1, pipeline=dict(size=1, interleaved_overlap=False), sequence_parallel=False)
enable_tb = False
"""


def write_data(folder: Path, *, files: tuple[str, ...] = ("cn/a", "en/b"), samples: int = 60, seed: int = 0) -> None:
    """A small bin/meta set under `folder`: enough for 20 steps to need a second epoch."""
    from internlm_ds.data.binmeta import Writer

    rng = np.random.default_rng(seed)
    for name in files:
        path = folder / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Writer(path) as writer:
            for _ in range(samples):
                writer.write((rng.integers(1, 128, size=rng.integers(4, 70))).tolist())


def write_run(folder: Path, *, stop_at: int | None = None) -> Path:
    """Configuration and data of a run below `folder`; with `stop_at` the run saves and stops at that step."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        write_data(folder / "data")
    if stop_at is not None:
        (folder / "stop").write_text(str(stop_at))
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=folder))
    return path


def train(
    config: Path,
    run_dir: Path,
    *overrides: str,
    ranks: int = 1,
    script: Path = PRETRAIN,
    options: tuple[str, ...] = (),
    expect: int = 0,
) -> list[dict[str, Any]]:
    """Run the launch script and return its steps; checks the exit code."""
    done = launch(config, run_dir, *overrides, ranks=ranks, script=script, options=options)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-8000:]
    return steps(run_dir)


def launch(
    config: Path,
    run_dir: Path,
    *overrides: str,
    ranks: int = 1,
    script: Path = PRETRAIN,
    options: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(script), "--config", str(config), "--run-dir", str(run_dir), *options]
    for text in overrides:
        command += ["--set", text]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
    return subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=150, env=env)


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The step lines of metrics.jsonl, without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = CLOCK_KEYS
    return [
        {key: value for key, value in line.items() if key not in timed and not key.startswith("tgs/")}
        for line in lines
        if "validation" not in line
    ]
