"""Runs in InternLM's format: written and read at any split, damage found before anything is used."""

from __future__ import annotations

import enum
import random
import struct
import sys
import types
import zipfile

import pytest
import torch

from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.formats.internlm_run import KINDS, InternlmRun, check, held_parts, step_of
from internlm_ds.checkpoint.formats.internlm_run_write import RunState, scheduler_state, write_run
from internlm_ds.errors import CheckpointDamagedError, CheckpointError, ConversionError
from internlm_ds.optim.schedules import LrSchedule

SAMPLER = {"batch_size": 2, "epoch": 1, "seed": 7, "data_world_size": 2, "num_consumed_samples_in_epoch": 8}
STATE = RunState(
    step_count=30,
    batch_count=33,
    num_consumed_tokens=1000,
    inf_nan_skip_batches=2,
    optimizer_updates=30,
    sampler=SAMPLER,
    loss_scale={"scale": 512.0, "growth_step": 4, "hysteresis_step": 1},
    betas=(0.9, 0.97),
    eps=1e-8,
    weight_decay=0.01,
    schedule=LrSchedule(1e-3, 100, 0, 0.2, 1e-4),
    config_text="x = 1\n",
)


def states(arch):
    """Different values everywhere."""
    generator = torch.Generator().manual_seed(0)
    made = {kind: {s.name: torch.randn(s.shape, generator=generator) for s in arch.iter_params()} for kind in KINDS}
    return made.__getitem__


@pytest.fixture
def arch(tiny_arch):
    return tiny_arch


@pytest.fixture
def written(tmp_path, arch):
    def write(name: str = "30", *, dtype: torch.dtype = torch.float16, state: RunState = STATE, **split: int):
        folder, values = tmp_path / name, states(arch)
        folder.mkdir()
        weights = {key: value.to(dtype) for key, value in values("master").items()}
        sizes = {key: value for key, value in split.items() if key != "zero_size"}
        internlm.write_weights(folder, weights, arch=arch, **sizes)
        write_run(folder, values, state, arch=arch, dtype=dtype, **split)
        return folder

    return write


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("split", [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 1, 3), (2, 2, 1, 1), (1, 1, 2, 2)], ids=str)
def test_what_is_written_reads_the_same_at_any_split(written, arch, split, dtype):
    tensor, pipe, chunks, zero = split
    folder = written(dtype=dtype, tensor_size=tensor, pipe=pipe, chunks=chunks, zero_size=zero)
    run = InternlmRun(folder, arch=arch)
    expected = states(arch)
    for kind in KINDS:
        assert all(torch.equal(run.state(kind)[name], value) for name, value in expected(kind).items())
    assert run.parts == {"model", "optimizer", "scheduler", "sampler"} and step_of(folder) == 30
    values = run.train_state
    assert (values["batch_count"], values["step_count"], values["optimizer_updates"]) == (33, 30, 30)
    assert values["loss_scale"] == STATE.loss_scale and values["sampler"] == SAMPLER
    assert run.config_text == "x = 1\n"
    check(folder)


def test_more_zero_ranks_than_parameters_leave_some_files_empty(written, arch):
    run = InternlmRun(written(zero_size=40), arch=arch)
    assert torch.equal(run.state("exp_avg")["norm.weight"], states(arch)("exp_avg")["norm.weight"])


def test_a_fragment_is_a_slice_of_the_flattened_parameter(written, arch):
    run = InternlmRun(written(tensor_size=2), arch=arch)
    name = next(iter(run.weights))
    whole = states(arch)("exp_avg_sq")[name].flatten()
    assert torch.equal(run.fragment(name, "exp_avg_sq", 3, 5), whole[3:8])


def test_internlm_reads_the_names_of_its_own_classes(written, monkeypatch):
    """With a package of that name at hand, plain torch.load makes its enum."""

    class ParallelMode(enum.Enum):
        ZERO1 = "zero1"

    name = "internlm.core.context.process_group_initializer"
    module = types.ModuleType(name)
    module.ParallelMode = ParallelMode
    for end in range(1, name.count(".") + 1):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:end]), types.ModuleType("package"))
    monkeypatch.setitem(sys.modules, name, module)
    content = torch.load(written() / "optimizer_tp0_pp0_zo0.pt", weights_only=False)
    assert content["base_optim_states"]["param_groups"][0]["optimizer_mode"] is ParallelMode.ZERO1
    group = {"params": [torch.nn.Parameter(torch.zeros_like(content["flat_fp32_weights"][0]))]}
    optimizer = torch.optim.AdamW([group, {"params": []}], lr=1.0)
    optimizer.load_state_dict(content["base_optim_states"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(STATE.schedule.at(30))


@pytest.mark.parametrize("name", ["optimizer_tp1_pp0_zo0.pt", "optimizer_tp0_pp0_zo1.pt", "model_tp0_pp0.pt"])
def test_a_missing_file_is_named(written, arch, name):
    folder = written(tensor_size=2, zero_size=2)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        InternlmRun(folder, arch=arch).state("exp_avg")


def test_files_of_another_model_do_not_fit(written, arch, tmp_path):
    folder = written()
    other = torch.load(folder / "model_tp0_pp0.pt")
    other["norm.weight"] = torch.zeros(3)
    torch.save(other, folder / "model_tp0_pp0.pt")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        InternlmRun(folder, arch=arch)


def test_without_optimizer_files_the_rest_is_there(written, arch):
    folder = written()
    for path in folder.glob("optimizer_*"):
        path.unlink()
    assert held_parts(folder) == {"model", "scheduler", "sampler"}
    assert InternlmRun(folder, arch=arch).train_state["step_count"] == 30


def test_a_split_that_does_not_divide_is_refused(written):
    with pytest.raises(ConversionError, match="do not divide"):
        written(tensor_size=3)


def flipped(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(bytes(content))


def places_of_content(path) -> range:
    """Where the largest record of an archive lies in its file."""
    with zipfile.ZipFile(path) as archive:
        item = max(archive.infolist(), key=lambda item: item.file_size)
    start = item.header_offset + 30 + sum(struct.unpack_from("<HH", path.read_bytes(), item.header_offset + 26))
    return range(start, start + item.file_size)


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_damage_in_any_file_is_found(written, how):
    """What is compared is what a reader takes: contents of records, names, sizes."""
    rng, number = random.Random(5), 0
    for name in ("model_tp0_pp0.pt", "optimizer_tp0_pp0_zo0.pt", "context.pt", "sampler.pt"):
        for _ in range(6):
            number += 1
            folder = written(f"{how}{number}")
            path = folder / name
            size = path.stat().st_size
            before = path.read_bytes()
            if how == "cut":
                path.write_bytes(before[: rng.randrange(size)])
            else:
                flipped(path, rng.choice(places_of_content(path)))
            with pytest.raises(CheckpointError, match=name):
                check(folder)


def test_the_schedule_of_a_finished_warm_up():
    state = scheduler_state(LrSchedule(1e-3, 100, 0, 0.2, 1e-4), 50)
    assert state["finished"] and state["last_epoch"] == 50 and state["after_scheduler_dict"]["last_epoch"] == 30
    assert state["_last_lr"][0] == LrSchedule(1e-3, 100, 0, 0.2, 1e-4).at(50)


def test_damaged_archives_are_told_apart_from_foreign_ones(written):
    folder = written()
    (folder / "context.pt").write_bytes(b"")
    with pytest.raises(CheckpointDamagedError, match=r"context\.pt"):
        check(folder)
