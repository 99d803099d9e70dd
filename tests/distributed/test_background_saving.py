"""Checkpoints that are written while training goes on hold what those hold that it waits for."""

from __future__ import annotations

from pathlib import Path

import torch
from layout_runs import Case, train

from internlm_ds.checkpoint.formats import native
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

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
