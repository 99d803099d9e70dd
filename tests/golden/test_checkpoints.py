"""Checkpoint folders as the reference wrote them: every file opens, weights of every layout merge to the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cases
import numpy as np
import pytest
import tiny_runs
import torch

from internlm_ds.arch import BLUEPRINTS, blueprint
from internlm_ds.checkpoint import names, unpickle
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.formats.internlm_run import KINDS, InternlmRun
from internlm_ds.checkpoint.formats.internlm_run_write import RunState, write_run
from internlm_ds.checkpoint.manager import find_checkpoints
from internlm_ds.convert.run import Request, convert
from internlm_ds.convert.sources import model_of_dict
from internlm_ds.data.binmeta import Writer
from internlm_ds.optim.schedules import LrSchedule

LEARNED = 0.02
"""How far four updates at a rate of at most 1e-3 can carry a weight, rounded to bf16; misplaced ones differ by 0.1."""

CASES = cases.case_folders("checkpoints", "layout.json")


def test_checkpoints_exist():
    cases.golden("checkpoints")
    assert CASES, "the kind is there, but holds no case"


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request) -> Path:
    return request.param


def described(case: Path) -> dict:
    return cases.read_json(case / "layout.json")


def arch_of(case: Path):
    layout = described(case)
    if layout["model_type"] not in BLUEPRINTS:
        pytest.skip(f"{layout['model_type']} does not exist in this version")
    if any(names.OTHER_SPLIT.fullmatch(path.name) for path in case.rglob("*.pt")):
        pytest.skip("weights split over other ranks (isp) are not read in this version")
    return blueprint(layout["model_type"], model_of_dict(layout["model_kwargs"]))


def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The formula of the kind's README."""
    offset = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 997
    values = np.sin(np.arange(int(np.prod(shape))) * 0.37 + offset) * 0.1 + ("norm" in name)
    return torch.from_numpy(values.reshape(shape)).float()


def test_checkpoints_weights_merge(case):
    arch = arch_of(case)
    folders = [found.path for found in find_checkpoints(case / "ckpt")]
    assert folders
    for folder in folders:
        weights = internlm.read_weights(folder, arch=arch)
        assert set(weights) == {spec.name for spec in arch.iter_params()}
        for spec in arch.iter_params():
            weight = weights[spec.name]
            assert weight.dtype == torch.bfloat16
            torch.testing.assert_close(
                weight.float(), initial(spec.name, spec.shape), rtol=0, atol=LEARNED, msg=spec.name
            )


def test_checkpoints_latest_is_found(case):
    latest = described(case)["latest"]["path"].removeprefix("local:")
    assert find_checkpoints(case / "ckpt")[0].path == case / latest


def test_checkpoints_files_open_as_described(case):
    for name, entry in described(case)["files"].items():
        if not (case / name).exists():
            continue
        value = unpickle.load(case / name)
        kind = entry["type"].rpartition(".")[2]
        assert type(value).__name__ == {"OrderedDict": "dict", "Config": "dict"}.get(kind, kind), name
        assert_described(value, entry["content"], where=name)


def assert_described(value, content, *, where: str) -> None:
    """Compare a value with its description: `tensor DTYPE [SHAPE]`, `list of N`, plain values as they are."""
    if isinstance(content, dict) and isinstance(value, dict):
        assert {str(key) for key in value} == set(content), where
        for key, item in value.items():
            assert_described(item, content[str(key)], where=f"{where}: {key}")
    elif isinstance(content, str) and (match := re.fullmatch(r"tensor (\w+) \[(.*)\]", content)):
        assert str(value.dtype) == f"torch.{match[1]}", where
        assert list(value.shape) == [int(size) for size in match[2].split(",") if size.strip()], where
    elif isinstance(value, torch.dtype):
        assert content == str(value), where
    elif isinstance(content, (bool, int, float)) and isinstance(value, (bool, int, float)):
        assert value == content, where


def test_checkpoints_settings_are_read(case):
    kwargs = described(case)["model_kwargs"]
    for found in find_checkpoints(case / "ckpt"):
        stored = internlm.read_model_config(found.path)
        assert {key: str(value) for key, value in stored.items()} == {key: str(value) for key, value in kwargs.items()}


# ---- runs that the reference began go on here ------------------------------------------------------------------------

CONTINUED = """
ckpt = dict(
    enable_save_ckpt=True, save_ckpt_folder="local:{here}/ckpt", checkpoint_every=float("inf"), auto_resume=False,
    load_ckpt_info=dict(path="local:{start}", content=("all",), ckpt_type="internlm"),
)
data = dict(
    seq_len=16, micro_num=2, micro_bsz=2, total_steps={total}, pack_sample_into_one=False,
    train_folder="{here}/data", num_worker=0,
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2, backoff_factor=0.5, max_scale=2**24, hysteresis=2,
)
hybrid_zero_optimizer = dict(reduce_bucket_size=2**16, clip_grad_norm=1.0)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=20, init_steps=0, warmup_ratio=0.25, eta_min=1e-4)
beta2_scheduler = dict(init_beta2=0.95, c=0, cur_iter=-1)
model_type = {model_type!r}
model = dict({model})
parallel = dict(zero1=-1, tensor=1, pipeline=dict(size=1, interleaved_overlap=False), sequence_parallel=False)
enable_tb = False
"""
SPLITS = {"pp2": "parallel.pipeline=2", "tp2": "parallel.tensor=2"}
SAME_STEP = 2e-2
"""Loss of a bf16 model on another layout."""


def continued(case: Path, start: Path, here: Path, *overrides: str, ranks: int = 1) -> tuple[list[dict], dict]:
    """Two more steps from a checkpoint of the reference: their lines, and the train state at the end."""
    layout = described(case)
    kwargs = {key: value for key, value in layout["model_kwargs"].items() if key != "num_chunks"}
    model = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    step = next(int(m[1]) for path in start.iterdir() if (m := names.STEP_FILE.fullmatch(path.name)))
    text = CONTINUED.format(here=here, start=start, model=model, model_type=layout["model_type"], total=step + 2)
    here.mkdir()
    (here / "config.py").write_text(text)
    with Writer(here / "data" / "en" / "a.bin") as writer:
        rng = np.random.default_rng(0)
        for _ in range(200):
            writer.write(rng.integers(1, layout["model_kwargs"]["vocab_size"], size=rng.integers(4, 40)).tolist())
    lines = tiny_runs.train(here / "config.py", here / "run", *overrides, ranks=ranks)
    return lines, json.loads((here / "ckpt" / str(step + 2) / "train_state.json").read_text())


@pytest.mark.timeout(240)
def test_checkpoints_runs_go_on_at_other_layouts(case, tmp_path):
    arch_of(case)
    start = find_checkpoints(case / "ckpt")[-1].path
    context, sampler = (unpickle.load(start / f"{name}.pt") for name in ("context", "sampler"))
    losses = []
    for name, override in SPLITS.items():
        lines, state = continued(case, start, tmp_path / name, override, ranks=2)
        steps = context["step_count"]
        assert [line["step"] for line in lines] == [context["batch_count"] + 1, context["batch_count"] + 2]
        assert [line["step_count"] for line in lines] == [steps + 1, steps + 2]
        base, warmup = 1e-3, 5
        assert [line["lr_used"] for line in lines] == pytest.approx(
            [base * (n + 1) / warmup for n in (steps, steps + 1)]
        )
        losses.append([line["loss"] for line in lines])
        # two micro-batches a step, and those that all ranks of the earlier run have seen
        seen = sampler["num_consumed_samples_in_epoch"] * sampler["data_world_size"] + 2 * 2
        assert state["sampler"]["num_consumed_samples_in_epoch"] == seen
        assert state["optimizer_updates"] == steps + 2
        assert state["loss_scale"] == {"scale": 65536.0, "growth_step": steps, "hysteresis_step": 0}
    if described(case)["world"] == 1:
        losses.append([line["loss"] for line in continued(case, start, tmp_path / "plain")[0]])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=SAME_STEP)


def test_checkpoints_optimizer_states_are_whole(case):
    """Each parameter's master rounds to its weight; moments are those of the gradients that the README gives."""
    arch = arch_of(case)
    for found in find_checkpoints(case / "ckpt"):
        run = InternlmRun(found.path, arch=arch)
        assert run.train_state["optimizer_updates"] == found.step
        for name, weight in run.weights.items():
            assert torch.equal(run.state("master")[name].to(weight.dtype), weight), name
            assert run.state("exp_avg")[name].shape == run.state("exp_avg_sq")[name].shape == weight.shape


def test_checkpoints_moments_lie_where_the_plan_says(case):
    """The slow way: walk through each file's plan by hand, compare every parameter's part with its shard."""
    arch = arch_of(case)
    folder = find_checkpoints(case / "ckpt")[0].path
    run, tensor_size = InternlmRun(folder, arch=arch), described(case)["tp"]
    compared = 0
    for path in sorted(folder.glob("optimizer_*.pt")):
        rank, stage, zero = (int(number) for number in re.findall(r"\d+", path.stem))
        content = unpickle.load(path)
        state = unpickle.load(folder / f"model_tp{rank}_pp{stage}.pt")
        by_size = sorted(state, key=lambda name: -state[name].numel())
        position = 0
        for entry in content["zero_devide_optim_plan"][0][zero]:
            name = by_size[int(entry.split("_")[0])]
            for kind in ("exp_avg", "exp_avg_sq"):
                flat = content["base_optim_states"]["state"][0][kind]
                part = flat[position : position + state[name].numel()].view(state[name].shape)
                if described(case)["pp"] == 1:  # else local layer numbers are not the global ones
                    spec = next(spec for spec in arch.iter_params() if spec.name == name)
                    shard = internlm.split(run.state(kind)[name], spec, tensor_size=tensor_size)[rank]
                    assert torch.equal(shard, part), (path.name, name, kind)
                    compared += 1
            position += state[name].numel()
    assert compared or described(case)["pp"] > 1


def written_again(case: Path, folder: Path, target: Path, **split: int) -> InternlmRun:
    """A checkpoint of the reference, read and written for another split."""
    arch = arch_of(case)
    run, target_folder = InternlmRun(folder, arch=arch), target
    target_folder.mkdir()
    values, group, schedule = run.train_state, run.groups[0], run.schedule
    cosine = schedule["after_scheduler_dict"]
    total = schedule["warmup_epochs"] + cosine["T_max"]
    state = RunState(
        *(values[key] for key in ("step_count", "batch_count", "num_consumed_tokens", "inf_nan_skip_batches")),
        optimizer_updates=values["optimizer_updates"],
        sampler=values["sampler"],
        loss_scale=values["loss_scale"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        schedule=LrSchedule(
            group["initial_lr"], total, schedule["_init_steps"], schedule["_warmup_steps"] / total, cosine["eta_min"]
        ),
        config_text=run.config_text,
    )
    sizes = {key: value for key, value in split.items() if key != "zero_size"}
    internlm.write_weights(target_folder, run.weights, arch=arch, **sizes)
    write_run(target_folder, run.state, state, arch=arch, dtype=run.weights["norm.weight"].dtype, **split)
    return InternlmRun(target_folder, arch=arch)


def test_checkpoints_written_again_are_the_same(case, tmp_path):
    """Read, and written for the layout that it came from: every file that a run needs, value by value."""
    layout = described(case)
    for number, found in enumerate(find_checkpoints(case / "ckpt")):
        target = tmp_path / str(number)
        split = dict(tensor_size=layout["tp"], pipe=layout["pp"], chunks=layout["num_chunks"])
        zero_size = len(list(found.path.glob("optimizer_tp0_pp0_zo*.pt")))
        written_again(case, found.path, target, **split, zero_size=zero_size)
        names = {path.name for path in found.path.iterdir()} - {"model_config.pt"}
        if layout["world"] == layout["tp"] * layout["pp"] * zero_size:
            assert {path.name for path in target.iterdir()} == names
        for name in sorted(names & {path.name for path in target.iterdir()}):
            assert_same(
                unpickle.load(target / name), unpickle.load(found.path / name), where=f"{found.path.name}/{name}"
            )


def assert_same(value, expected, *, where: str) -> None:
    if isinstance(expected, dict):
        assert {*value} == {*expected} - {"decoupled_weight_decay"}, where
        for key in value:
            assert_same(value[key], expected[key], where=f"{where}: {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(value) == len(expected), where
        for number, item in enumerate(expected):
            assert_same(value[number], item, where=f"{where}: {number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected), where
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(value, expected, err_msg=where)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-12), where
    else:
        assert value == expected, where


@pytest.mark.parametrize("split", [(2, 1, 1, 1), (1, 2, 1, 3), (2, 2, 1, 2), (1, 1, 2, 2)], ids=str)
def test_checkpoints_written_for_other_layouts_read_the_same(case, tmp_path, split):
    found = find_checkpoints(case / "ckpt")[0].path
    before = InternlmRun(found, arch=arch_of(case))
    tensor, pipe, chunks, zero = split
    after = written_again(case, found, tmp_path / "x", tensor_size=tensor, pipe=pipe, chunks=chunks, zero_size=zero)
    for kind in KINDS:
        for name, state in before.state(kind).items():
            assert torch.equal(after.state(kind)[name], state), (kind, name)
    assert len(list((tmp_path / "x").glob("optimizer_*.pt"))) == tensor * pipe * zero
    assert not list((tmp_path / "x").glob(".*"))


def test_checkpoints_whole_runs_convert_both_ways(case, tmp_path):
    """To the native format and back to the split that it had: the same optimizer files, value by value."""
    arch_of(case)
    layout, found = described(case), find_checkpoints(case / "ckpt")[-1].path
    settings = dict(source_format=None, content="all", verify=True)
    convert(Request(str(found), str(tmp_path / "native"), target_format="native", **settings))
    zero = len(list(found.glob("optimizer_tp0_pp0_zo*.pt")))
    split = dict(tensor=layout["tp"], pipe=layout["pp"], chunks=layout["num_chunks"], zero=zero)
    convert(Request(str(tmp_path / "native"), str(tmp_path / "back"), target_format="internlm", **split, **settings))
    compared = 0
    for path in sorted(found.glob("*.pt")):
        if path.name.startswith(("optimizer_", "sampler", "context", "schedulder", "model_tp", "config_file")):
            assert_same(unpickle.load(tmp_path / "back" / path.name), unpickle.load(path), where=path.name)
            compared += 1
    assert compared > 5
