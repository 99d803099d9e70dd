"""The last k checkpoints stay; nothing else is ever touched."""

from __future__ import annotations

import fcntl
import os

import pytest

from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.retention import remove_older
from internlm_ds.checkpoint.storage.local import CONVERTING, LocalStorage
from internlm_ds.layout.ranks import Layout


def save(folder, step):
    native.save(
        folder, weights=[], train_state={}, config_text="", layout=Layout(), arch=None, dtype="float32", step=step
    )


@pytest.fixture
def folder(tmp_path):
    for step in (2, 4, 6, 8, 10):
        save(tmp_path / str(step), step)
    save(tmp_path / "snapshot" / "0", 5)
    (tmp_path / "3").mkdir()  # somebody else's
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_stay_by_default(folder):
    assert remove_older(folder, newest=10, keep=0) == []


def test_the_last_ones_stay(folder):
    assert [path.name for path in remove_older(folder, newest=10, keep=2)] == ["6", "4", "2"]
    assert names(folder) == ["10", "3", "8", "snapshot"]


def test_damaged_ones_do_not_count_and_later_steps_stay(folder):
    (folder / "6" / "manifest.json").write_text("{}")
    assert [path.name for path in remove_older(folder, newest=8, keep=2)] == ["2"]
    assert names(folder) == ["10", "3", "4", "6", "8", "snapshot"]


def test_leftovers_of_dead_conversions_go_and_those_of_live_ones_stay(tmp_path):
    dead, live = (tmp_path / f"{CONVERTING}{name}-abcd" for name in ("dead", "live"))
    dead.mkdir()
    live.mkdir()
    descriptor = os.open(live, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    storage, other = LocalStorage(), LocalStorage()
    own = storage.make_temporary(tmp_path / "new", prefix=CONVERTING)
    assert names(tmp_path) == sorted([live.name, own.name])
    second = other.make_temporary(tmp_path / "new", prefix=CONVERTING)
    assert own.exists()
    storage.publish(own, tmp_path / "new")
    other.remove(second)
    assert names(tmp_path) == [live.name, "new"]
    os.close(descriptor)
    storage.remove(storage.make_temporary(tmp_path / "x", prefix=CONVERTING))
    assert names(tmp_path) == ["new"]
