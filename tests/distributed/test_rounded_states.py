"""Moments and masters in bf16: on every layout, over a resume bit for bit, to and from fp32, on the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_runs import Case, assert_close, merged, train

from internlm_ds.checkpoint.formats import native
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.verify import training

MOMENTS = "moments_dtype='bfloat16'"
BOTH = f"{MOMENTS}, masters_dtype='bfloat16'"
HOST = """
deepspeed = dict(zero_optimization=dict(offload_optimizer=dict(device="cpu")), zero_force_ds_cpu_optimizer=False)
"""
DATA2 = Layout(data=2, zero=2)


def states(engine) -> dict[str, torch.Tensor]:
    """This rank's masters and moments, by kind, name and place."""
    from internlm_ds.engine import state

    return {f"{f.kind} {f.name} {f.start} {f.shard}": f.tensor.clone() for f in state.fragments(engine)}


def keep_states(engine):
    """A result that the run's end fills."""
    kept: dict[str, torch.Tensor] = {}
    engine.on_gradients = lambda e: kept.update(states(e))
    return kept


def train_in_any_precision(context, path: str, case: Case):
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # torch emulates it on a CPU
    return train(context, path, case)


def write(case: Case, folder: Path, more: str = "") -> str:
    folder.mkdir(exist_ok=True)
    path = Path(case.write(folder))
    path.write_text(path.read_text() + more)
    return str(path)


@pytest.mark.parametrize(
    ("dtype", "own", "layout"),
    [
        ("float32", MOMENTS, DATA2),
        ("float32", MOMENTS, Layout(data=2, zero=1)),
        ("float32", MOMENTS, Layout(pipe=2)),
        ("float32", MOMENTS, Layout(tensor=2)),
        ("bfloat16", BOTH, DATA2),
        ("bfloat16", BOTH, Layout(tensor=2)),
    ],
    ids=str,
)
def test_follows_one_process_with_fp32_states(dtype: str, own: str, layout: Layout, single, tmp_path: Path):
    """And whoever has the same parameter rounds it alike: `merged` compares all copies bit for bit."""
    case = Case(layout=layout, dtype=dtype, layers=2, steps=6, own=own)
    ranks = run_ranks(train, layout, case.write(tmp_path), case, timeout_s=100)
    assert_close(ranks[0].losses, single(case).losses, relative=5e-4 if dtype == "float32" else 2e-3, what="loss")
    merged(ranks, "before")
    merged(ranks, "after")


@pytest.mark.parametrize(
    ("dtype", "own", "more"),
    [
        ("float32", MOMENTS, ""),
        ("float16", MOMENTS, ""),
        ("bfloat16", MOMENTS, ""),
        ("bfloat16", BOTH, ""),
        ("bfloat16", "masters_dtype='bfloat16'", ""),
        ("float32", MOMENTS, HOST),
    ],
    ids=["fp32", "fp16", "bf16", "bf16-both", "bf16-masters", "fp32-host"],
)
def test_a_resumed_run_equals_a_straight_one(dtype: str, own: str, more: str, tmp_path: Path):
    case = Case(layout=DATA2, dtype=dtype, layers=1, steps=4, own=own, save_every=2, in_background=own == BOTH)
    whole = replace(case, save_folder=str(tmp_path / "whole"))
    half = replace(case, save_folder=str(tmp_path / "halves"), steps=2)
    straight = run_ranks(train_in_any_precision, DATA2, write(whole, tmp_path / "a", more), whole, timeout_s=100)
    path = write(half, tmp_path / "b", more)
    first = run_ranks(train_in_any_precision, DATA2, path, half, timeout_s=100)
    second = run_ranks(train_in_any_precision, DATA2, path, replace(half, steps=4), timeout_s=100)
    assert second[0].first_step == 2
    for begun, resumed, expected in zip(first, second, straight, strict=True):
        assert begun.outcomes + resumed.outcomes == expected.outcomes
        for name, piece in expected.after.items():
            assert resumed.after[name].tensor.equal(piece.tensor), name
    ends = [native.open(Path(folder) / "4") for folder in (whole.save_folder, half.save_folder)]
    for name in ends[0].weight_names:
        for kind in native.KINDS:
            one, two = (end.fragment(name, kind, 0, end.weight(name).numel()) for end in ends)
            assert one.equal(two), (kind, name)


def held_by(context, path: str):
    """What this rank updates, and the class that does it."""
    _, engine, _ = training.build_engine(context, path)
    adam = engine.basic_optimizer
    found = [piece for pieces in getattr(adam, "pieces", {}).values() for piece in pieces]
    return type(adam).__name__, [(p.name, i) for p in found for i in range(p.start, p.start + p.count)]


def test_ranks_draw_for_other_elements(tmp_path: Path):
    """Every element is one rank's, and has its own number."""
    case = Case(layout=DATA2, layers=1, own=MOMENTS)
    held = Counter(
        element for _, own in run_ranks(held_by, DATA2, case.write(tmp_path), timeout_s=100) for element in own
    )
    assert held and set(held.values()) == {1}
    plain = Case(layers=1)
    assert run_ranks(held_by, Layout(), plain.write(tmp_path)) == [("AdamW", [])], "fp32 states: torch's, as ever"


@pytest.mark.parametrize(("own", "other"), [("", BOTH), (BOTH, "")], ids=["rounded", "widened"])
def test_checkpoints_of_the_other_kind_are_loaded(own: str, other: str, tmp_path: Path):
    """Loaded on another layout, and held against the checkpoint; fp32 is rounded to the nearest."""
    folder = str(tmp_path / "ckpt")
    wrote = Case(dtype="bfloat16", layers=1, steps=2, own=own, save_folder=folder, save_every=2)
    run_ranks(train, Layout(), write(wrote, tmp_path / "a"), wrote, timeout_s=100)
    reads = replace(wrote, own=other, layout=DATA2, steps=3, save_every=9)
    ranks = run_ranks(train, DATA2, write(reads, tmp_path / "b"), reads, keep_states, timeout_s=100)
    saved, dtype = native.open(Path(folder) / "2"), torch.bfloat16 if other else torch.float32
    for rank in ranks:
        assert rank.first_step == 2 and rank.extra
        for key, tensor in rank.extra.items():
            kind, name, start, _ = key.split(" ", 3)
            assert tensor.dtype == dtype
            stored = saved.fragment(name, kind, int(start), tensor.numel())
            assert stored.dtype == torch.float32 and tensor.equal(stored.to(dtype)), key
            assert own or stored.bfloat16().float().ne(stored).any() or kind == "master", "fp32 is not what bf16 holds"


def test_a_checkpoint_takes_half_the_place(tmp_path: Path):
    sizes = {}
    for own in ("", BOTH):
        case = Case(
            dtype="bfloat16", layers=1, steps=1, own=own, save_folder=str(tmp_path / f"c{bool(own)}"), save_every=1
        )
        run_ranks(train, Layout(), case.write(tmp_path), case, timeout_s=100)
        files = Path(case.save_folder, "1").glob("optimizer-*.safetensors")
        sizes[own] = sum(file.stat().st_size for file in files)
    assert sizes[BOTH] < 0.6 * sizes[""]
