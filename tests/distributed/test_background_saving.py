"""Checkpoints that are written while training goes on hold what those hold that it waits for."""

from __future__ import annotations

from pathlib import Path

import torch
from layout_runs import Case, train

from internlm_ds.checkpoint.formats import native
from internlm_ds.engine import state
from internlm_ds.layout.ranks import Layout
from internlm_ds.plan.report import stage_memory
from internlm_ds.runspec import resolve
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.translate import translate

LAYOUT = Layout(data=2, zero=2)


def test_background_saves_equal_those_that_are_waited_for(tmp_path: Path):
    folders = {}
    for in_background in (False, True):
        folder = tmp_path / str(in_background)
        folder.mkdir()
        case = Case(layout=LAYOUT, steps=4, save_folder=str(folder), save_every=1, in_background=in_background)
        run_ranks(train, LAYOUT, case.write(folder), case)
        folders[in_background] = folder
    for step in range(1, 5):
        waited, beside = (native.open(folders[kind] / str(step)) for kind in (False, True))
        assert waited.train_state == beside.train_state
        for name, weight in waited.weights.items():
            assert torch.equal(beside.weight(name), weight), (step, name)
            for kind in native.KINDS:
                pieces = [c.fragment(name, kind, 0, weight.numel()) for c in (waited, beside)]
                assert torch.equal(*pieces), (step, kind, name)
    assert not [path for path in folders[True].iterdir() if path.name.startswith(".")]


def test_the_plan_counts_the_copy(tmp_path: Path):
    case = Case(layout=LAYOUT, steps=1, save_folder=str(tmp_path), save_every=1, in_background=True)
    path = case.write(tmp_path)
    first, _ = run_ranks(train, LAYOUT, path, case, saved)
    spec = resolve(path, world_size=LAYOUT.world_size)
    (stage,) = stage_memory(spec, spec.config, translate(spec).ds_config)
    (copy,) = stage.host
    size, tensors = first.extra
    # the buffer has room to begin every tensor where any dtype may, and a slice of a parameter may be one of two
    assert 0 <= size - copy.nbytes <= 64 * (1 + 3 * 2) * tensors


def saved(engine) -> tuple[int, int]:
    """Bytes that a rank copies which saves everything it has, and how many parameters there are."""
    return state.saved_bytes(engine, weights=True, fragments=True), sum(1 for _ in engine.logical_parameters())
