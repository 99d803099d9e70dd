"""A small complete configuration, and ways to write variants of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = """\
JOB_NAME = "tiny"
SEQ_LEN = 64
SAVE = "local:ckpts"
ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder=SAVE,
)
data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,
    micro_bsz=2,
    total_steps=100,
    skip_batches="",
    rampup_batch_size="",
)
grad_scaler = dict(fp16=dict(initial_scale=2**16), max_scale=2**24)
hybrid_zero_optimizer = dict(
    reduce_bucket_size=1024,
    clip_grad_norm=1.0,
)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.1)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=0)
model = dict(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=256,
    mlp_ratio=8 / 3,
    dtype="torch.float32",
)
parallel = dict(
    zero1=-1,
    tensor=1,
    pipeline=dict(size=1),
)
"""


@pytest.fixture
def tiny() -> str:
    return TINY


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(more, old=new, …)`: the tiny configuration with texts replaced and more lines behind it."""

    def make(more: str = "", *replacements: tuple[str, str], name: str = "config.py") -> Path:
        text = TINY
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + more, encoding="utf-8")
        return path

    return make


@pytest.fixture
def line_of() -> Callable[[Path, str], int]:
    """Line (1-based) of the first one that holds a text."""

    def find(path: Path, text: str) -> int:
        lines = path.read_text(encoding="utf-8").splitlines()
        return next(number for number, line in enumerate(lines, start=1) if text in line)

    return find
