"""A writer that is killed at any moment leaves the old checkpoint or the new one, never something between."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.manager import CheckpointManager, find_checkpoints
from internlm_ds.config.schema import CkptConfig
from internlm_ds.layout.ranks import Layout


def save(folder, value):
    weights = {f"layer{i}": torch.full((20_000,), float(value)) for i in range(3)}
    fragments = [native.Fragment(name, kind, 0, w) for name, w in weights.items() for kind in native.KINDS]
    native.save(
        folder,
        weights=weights.items(),
        fragments=fragments,
        train_state={"step_count": value},
        config_text="",
        layout=Layout(),
        arch=None,
        dtype="float32",
    )


@pytest.mark.parametrize("seed", range(4))
def test_killed_writer_leaves_a_whole_checkpoint(tmp_path, seed):
    save(tmp_path / "5", 0)
    writer = os.fork()
    if writer == 0:
        value = 0
        while True:
            value += 1
            save(tmp_path / "5", value)
    time.sleep(random.Random(seed).uniform(0.02, 0.3))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)

    (found,) = find_checkpoints(tmp_path)
    checkpoint = native.open(found.path)
    values = {checkpoint.step} | {int(checkpoint.weight(f"layer{i}").unique().item()) for i in range(3)}
    assert values == {checkpoint.step}
    ckpt = CkptConfig(save_ckpt_folder=str(tmp_path))
    with CheckpointManager(ckpt, total_steps=9):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "5"]
