"""The example of a loop of one's own runs, learns, and sees the packs that `TrainLoader` would give it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from internlm_ds import runspec
from internlm_ds.data import binmeta
from internlm_ds.data.loader import build_train_loader
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
SEQ_LEN = 16
ckpt = dict(enable_save_ckpt=False)
data = dict(seq_len=SEQ_LEN, micro_num=2, micro_bsz=2, total_steps=10, train_folder={folder!r}, num_worker=0)
grad_scaler = dict(fp16=dict(initial_scale=1, min_scale=1, growth_interval=1000))
hybrid_zero_optimizer = dict(reduce_bucket_size=1024, clip_grad_norm=1.0)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=10, init_steps=0, warmup_ratio=0.1, eta_min=1e-4)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = dict(num_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=64, mlp_ratio=2, dtype="torch.float32")
parallel = dict(zero1=1, tensor=1, pipeline=dict(size=1))
"""


def _config(tmp_path: Path) -> Path:
    with binmeta.Writer(tmp_path / "data/en/x.bin") as writer:
        for number in range(30):
            writer.write([1 + (number + place) % 20 for place in range(12 + number % 5)])
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(folder=str(tmp_path / "data")))
    return path


def test_own_loop_runs_on_deepspeeds_loader(tmp_path: Path) -> None:
    config = _config(tmp_path)
    command = [sys.executable, str(ROOT / "examples/own_loop.py"), str(config), "--steps", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^step=\d+ loss=([\d.]+)$", done.stdout, re.M)]
    assert len(losses) == 8  # an epoch has 6 steps: it changes on the way
    assert losses[-1] < 0.8 * losses[0]
    assert abs(losses[0] - _first_loss(config)) < 1e-3


def _first_loss(path: Path) -> float:
    """The same model on the first batch of our own loader."""
    spec = runspec.resolve(path, world_size=1)
    assert spec.arch is not None
    layers = build_layers(spec.arch, spec.config.model, tensor=Axis.single("tensor"), seed=1024, dtype=torch.float32)
    model = LanguageModel(layers)
    step = build_train_loader(spec.config, data_rank=0, data_size=1).next_step()
    losses = [cross_entropy(model(*inputs), labels).item() for inputs, (labels, _) in step.micro_batches]
    return sum(losses) / len(losses)
