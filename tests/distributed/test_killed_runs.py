"""A run whose ranks are killed at any moment, again and again: it goes on from the last complete checkpoint each time,
ends with the weights of an undisturbed run, and leaves nothing unfinished behind."""

from __future__ import annotations

import inspect
import random
import time
from pathlib import Path

import pytest
import torch
from layout_runs import Case, train

from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.manager import find_checkpoints
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing import ranks
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)

STEPS = 6


def start(path: str, case: Case, store: Path):
    """The ranks of a run, each a process; nobody waits for them."""
    where = (inspect.getfile(train), train.__module__, train.__qualname__)
    processes, pipes = ranks._start(where, case.layout, (path, case), meeting=ranks.Meeting(str(store), 60.0, "gloo"))
    for pipe in pipes:
        pipe.close()  # nobody reads: a rank that has finished must not wait until its result is taken
    return processes


def kill_at_a_random_moment(processes, folder: Path, chance: random.Random) -> None:
    """All ranks, or one alone, most often while something is being saved or the newest checkpoint is read."""
    wait_for_save = chance.random() < 0.8
    known = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    deadline = time.monotonic() + 60
    while wait_for_save and time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if folder.is_dir() and {path.name for path in folder.iterdir()} - known - {".lock"}:
            break
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.06 if wait_for_save else 3.0))
    # ranks that never met wait for one that does not come until their launcher ends them: there is none here
    have_met = wait_for_save and any(process.is_alive() for process in processes)
    victims = [chance.choice(processes)] if have_met and chance.random() < 0.5 else processes
    for process in victims:
        process.kill()
    for process in processes:
        process.join(45)
        assert not process.is_alive(), f"a rank still waits for one of {victims} that was killed"


def newest(folder: Path) -> int:
    """Step that the next start must go on from."""
    steps = [c.step for c in find_checkpoints(folder) if not c.damage]
    return max(steps, default=0)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = native.open(folder / str(STEPS))
    held = {}
    for name, weight in checkpoint.weights.items():
        held[name] = weight
        held |= {f"{kind} {name}": checkpoint.fragment(name, kind, 0, weight.numel()) for kind in native.KINDS}
    return held


def disturbed(case: Case, folder: Path, expected: dict[str, torch.Tensor], *, kills: int, seed: int) -> None:
    chance, path = random.Random(seed), case.write(folder)
    saved = Path(case.save_folder)
    for number in range(kills):
        kill_at_a_random_moment(start(path, case, folder / f"store{number}"), saved, chance)
    step = newest(saved)
    for rank in run_ranks(train, case.layout, path, case, timeout_s=200):
        assert rank.first_step == step
    found = contents(saved)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert sorted(path.name for path in saved.iterdir()) == [str(step) for step in range(1, STEPS + 1)]


def case_in(folder: Path, layout: Layout, *, in_background: bool) -> Case:
    folder.mkdir(parents=True)
    saved = str(folder / "saved")
    return Case(layout=layout, steps=STEPS, save_folder=saved, save_every=1, in_background=in_background)


def undisturbed(layout: Layout, folder: Path) -> dict[str, torch.Tensor]:
    case = case_in(folder, layout, in_background=False)
    run_ranks(train, layout, case.write(folder), case, timeout_s=200)
    return contents(Path(case.save_folder))


def test_a_run_that_is_killed_twice_ends_as_if_nothing_had_been(tmp_path: Path):
    layout = Layout(data=2, zero=2)
    expected = undisturbed(layout, tmp_path / "calm")
    case = case_in(tmp_path / "killed", layout, in_background=True)
    disturbed(case, tmp_path / "killed", expected, kills=2, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", [Layout(data=2, zero=2), Layout(pipe=2)], ids=str)
def test_a_hundred_kills(layout: Layout, tmp_path: Path):
    expected = undisturbed(layout, tmp_path / "calm")
    for seed in range(10):
        folder = tmp_path / f"killed{seed}"
        case = case_in(folder, layout, in_background=bool(seed % 2))
        disturbed(case, folder, expected, kills=5, seed=seed)
