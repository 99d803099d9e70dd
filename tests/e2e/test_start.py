"""Which weights a run really starts from: told ones, its own ones, older ones when the newest is damaged, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import launch, steps, train, write_data, write_run

from internlm_ds import runspec
from internlm_ds.checkpoint.formats import internlm, native
from internlm_ds.checkpoint.lock import FolderLock
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis
from internlm_ds.train.options import DEFAULT_SEED

pytestmark = pytest.mark.timeout(200)

# small steps: weights after a few of them are still recognisably those that were loaded
SMALL_STEPS = ("data.total_steps=2", "adam.lr=1e-5", "lr_scheduler.eta_min=1e-5", "model.drop_rate=0.0")
LARGEST_CHANGE = 5e-5


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """A run of four updates from new weights, with checkpoints 2 and 4; the data of all runs here."""
    folder = tmp_path_factory.mktemp("parent")
    write_data(folder / "data")
    config = write_run(folder)
    first = train(config, folder / "run", "data.total_steps=4", "ckpt.checkpoint_every=2", "model.drop_rate=0.0")
    assert [s["step_count"] for s in first] == [1, 2, 3, 4]
    return folder


def child(parent: Path, folder: Path, ckpt: str = "", *, own_checkpoints: bool = False) -> Path:
    """A configuration that trains the parent's data, with `ckpt`'s keys; its own checkpoints may be the parent's."""
    folder.mkdir()
    shutil.copytree(parent / "data", folder / "data")
    if own_checkpoints:
        shutil.copytree(parent / "ckpt", folder / "ckpt")
    config = write_run(folder)
    text = config.read_text()
    assert "auto_resume" not in text
    config.write_text(text.replace("ckpt = dict(\n", f"ckpt = dict(\n    {ckpt}\n"))
    return config


def load_info(path: Path, content: tuple[str, ...], ckpt_type: str = "native") -> str:
    return f'load_ckpt_info=dict(path="local:{path}", content={content!r}, ckpt_type="{ckpt_type}"),'


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in native.open(folder).weights.items()}


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def damage(checkpoint: Path) -> None:
    """Flip a bit in the middle of a file of weights."""
    file = next(checkpoint.glob("weights-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def start_lines(text: str) -> list[str]:
    return [line.partition(" -- start: ")[2] for line in text.splitlines() if " -- start: " in line]


def test_weights_that_an_sft_config_names(parent: Path, tmp_path: Path):
    """InternLM's files and a native checkpoint with the same weights start the same run; counters start anew."""
    loaded = weights_of(parent / "ckpt" / "4")
    spec = runspec.resolve(parent / "config.py", world_size=1)
    (tmp_path / "weights").mkdir()
    internlm.write_weights(tmp_path / "weights", loaded, arch=spec.arch, tensor_size=2)

    from_native = child(parent, tmp_path / "native", load_info(parent / "ckpt" / "4", ("model",)))
    one = train(from_native, tmp_path / "native" / "run", *SMALL_STEPS)
    from_internlm = child(parent, tmp_path / "internlm", load_info(tmp_path / "weights", ("model",), "internlm"))
    two = train(from_internlm, tmp_path / "internlm" / "run", *SMALL_STEPS)

    assert one == two
    fresh = steps(parent / "run")
    assert [(s["step"], s["step_count"]) for s in one] == [(0, 1), (1, 2)]
    assert one[0]["num_consumed_tokens"] == fresh[0]["num_consumed_tokens"]
    assert abs(one[0]["loss"] - fresh[0]["loss"]) > 1e-3
    assert one[0]["lr_used"] == pytest.approx(1e-5 / 4), "the first step of the warm-up"
    # masters come from the loaded weights: with those of the new model the first update would bring it back
    assert 0 < distance(weights_of(tmp_path / "native" / "ckpt" / "2"), loaded) < LARGEST_CHANGE
    log = (tmp_path / "native" / "run" / "train.log").read_text()
    assert len(start_lines(log)) == 1
    assert start_lines(log)[0].startswith(
        f"model from {parent / 'ckpt' / '4'} (native, load_ckpt_info; nothing to resume"
    )
    assert start_lines(log)[0].endswith("optimizer, scheduler, sampler start anew")


def test_content_without_model(parent: Path, tmp_path: Path):
    """Everything but the weights: counters and data go on, the weights are new, and so are their masters."""
    content = ("optimizer", "scheduler", "sampler")
    config = child(parent, tmp_path / "a", load_info(parent / "ckpt" / "4", content))
    done = train(config, tmp_path / "a" / "run", *SMALL_STEPS, "data.total_steps=6", "data.skip_batches=")
    assert [(s["step"], s["step_count"]) for s in done] == [(4, 5), (5, 6)]
    assert done[0]["num_consumed_tokens"] == 5 * 128
    spec = runspec.resolve(config, world_size=1)
    entries = build_layers(
        spec.arch, spec.config.model, tensor=Axis.single("tensor"), seed=DEFAULT_SEED, dtype=torch.float32
    )
    new = {name: p.detach() for name, p in LanguageModel(entries).named_logical_parameters()}
    assert 0 < distance(weights_of(tmp_path / "a" / "ckpt" / "6"), new) < LARGEST_CHANGE
    state = native.open(tmp_path / "a" / "ckpt" / "6").train_state
    assert state["optimizer_updates"] == 6, "Adam's moments and their count were loaded"


def test_own_checkpoints_come_first_and_damaged_ones_are_passed_over(parent: Path, tmp_path: Path):
    info = load_info(tmp_path / "not looked at", ("model",), "internlm")
    config = child(parent, tmp_path / "a", info, own_checkpoints=True)
    damage(tmp_path / "a" / "ckpt" / "4")
    done = launch(config, tmp_path / "a" / "run", "data.total_steps=4", "model.drop_rate=0.0")
    assert done.returncode == 0, done.stderr[-4000:]
    assert steps(tmp_path / "a" / "run") == steps(parent / "run")[2:], "resumed from checkpoint 2, exactly"
    (reason,) = start_lines(done.stderr)
    assert reason.startswith(
        f"model, optimizer, scheduler, sampler from {tmp_path / 'a' / 'ckpt' / '2'} (native, auto_resume"
    )
    assert reason.endswith("1 newer but damaged passed over")
    log = (tmp_path / "a" / "run" / "train.log").read_text()
    warnings = [line for line in log.splitlines() if "\tWARNING " in line]
    assert len(warnings) == 1 and f"passed over: checkpoint {tmp_path / 'a' / 'ckpt' / '4'} is damaged" in warnings[0]
    assert log.count("falling back to an older checkpoint") == 1

    # the run wrote checkpoint 4 anew; now none is left, and nothing is trained from new weights unasked
    for checkpoint in ("2", "4"):
        damage(tmp_path / "a" / "ckpt" / checkpoint)
    none_left = launch(config, tmp_path / "a" / "run2", "data.total_steps=6")
    assert none_left.returncode == 4
    last = none_left.stderr[none_left.stderr.index("CheckpointDamagedError: ") :]
    assert last.startswith("CheckpointDamagedError: no good checkpoint is left in local:")
    assert "To start anew all the same, set ckpt.auto_resume=False or another ckpt.save_ckpt_folder" in last
    assert "Traceback" not in none_left.stderr and not (tmp_path / "a" / "run2" / "metrics.jsonl").exists()


def test_a_path_that_does_not_exist_starts_nothing(parent: Path, tmp_path: Path):
    config = child(parent, tmp_path / "a", load_info(tmp_path / "gone", ("model",), "internlm"))
    done = launch(config, tmp_path / "a" / "run")
    assert done.returncode == 2
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "load_ckpt_info" in text)
    assert done.stderr.splitlines()[-1] == (
        f"CheckpointError: ckpt.load_ckpt_info (line {line}): names local:{tmp_path / 'gone'}, but {tmp_path / 'gone'} "
        "does not exist; give a folder that exists, or remove the key"
    )
    assert not (tmp_path / "a" / "run").exists() and not (tmp_path / "a" / "ckpt").exists()


def test_a_save_folder_in_use(parent: Path, tmp_path: Path):
    config = child(parent, tmp_path / "a")
    held = FolderLock(tmp_path / "a" / "ckpt")
    try:
        done = launch(config, tmp_path / "a" / "run")
    finally:
        held.release()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"save folder {tmp_path / 'a' / 'ckpt'} is in use by another run: process " in done.stderr
    assert not (tmp_path / "a" / "run" / "metrics.jsonl").exists()
    assert list((tmp_path / "a" / "ckpt").iterdir()) == []


def test_a_checkpoint_of_another_model(parent: Path, tmp_path: Path):
    config = child(parent, tmp_path / "a", own_checkpoints=True)
    done = launch(config, tmp_path / "a" / "run", "model.num_layers=3", "data.total_steps=6")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("CheckpointError: ") :]
    assert message.startswith(f"CheckpointError: {tmp_path / 'a' / 'ckpt' / '4'} does not fit the model (")
    assert "blocks.2." in message and ": missing" in message
    assert not (tmp_path / "a" / "run" / "metrics.jsonl").exists()


def test_a_run_directory_used_twice(parent: Path, tmp_path: Path):
    """A second launch adds its lines behind the first one's; the files that say what was asked are its own."""
    config = child(parent, tmp_path / "a", own_checkpoints=True)
    shutil.copytree(parent / "run", tmp_path / "a" / "run")
    done = train(config, tmp_path / "a" / "run", "data.total_steps=6")
    assert [s["step"] for s in done] == [0, 1, 2, 3, 5]
    log = (tmp_path / "a" / "run" / "train.log").read_text()
    assert len(start_lines(log)) == 2 and log.count("===========New Run ") == 2
    resolved = {
        leaf["key"]: leaf["value"] for leaf in json.loads((tmp_path / "a" / "run" / "resolved.json").read_text())
    }
    assert resolved["data.total_steps"] == 6
