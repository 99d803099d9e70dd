"""One live run per save folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from internlm_ds.checkpoint import lock
from internlm_ds.checkpoint.lock import FolderLock
from internlm_ds.errors import CheckpointError


def test_second_owner_is_refused_until_the_first_lets_go(tmp_path):
    first = FolderLock(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        FolderLock(tmp_path / "run")
    assert f"{tmp_path / 'run'} is in use by another run: process {os.getpid()} on" in str(caught.value)
    assert "another ckpt.save_ckpt_folder" in str(caught.value) and str(first.path) in str(caught.value)
    first.release()
    FolderLock(tmp_path / "run").release()
    assert list((tmp_path / "run").iterdir()) == []


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import os, pathlib; from internlm_ds.checkpoint.lock import FolderLock; "
        f"FolderLock(pathlib.Path({str(tmp_path)!r})); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert (tmp_path / lock.NAME).exists()
    FolderLock(tmp_path).release()


def test_reused_process_number_does_not_count_as_alive(tmp_path):
    owner = {"host": lock.socket.gethostname(), "pid": os.getpid(), "process": "another boot:1"}
    (tmp_path / lock.NAME).write_text(json.dumps(owner))
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("text", [json.dumps({"host": "elsewhere", "pid": 1, "process": "x"}), ""])
def test_lock_of_another_machine_ages(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(CheckpointError, match="is in use by another run"):
        FolderLock(tmp_path, clock=lambda: time.time() + lock.DEAD_AFTER_S - 60)
    FolderLock(tmp_path, clock=lambda: time.time() + lock.DEAD_AFTER_S + 60).release()


def test_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_EVERY_S", 0.01)
    touched = threading.Event()
    monkeypatch.setattr(lock.os, "utime", lambda path: touched.set())
    owner = FolderLock(tmp_path)
    assert touched.wait(5)
    owner.release()


def test_release_leaves_a_lock_that_another_run_took(tmp_path):
    owner = FolderLock(tmp_path)
    owner.path.write_text(json.dumps({"host": "elsewhere"}))
    owner.release()
    assert owner.path.exists()


def test_many_that_find_a_dead_lock_give_it_to_one(tmp_path):
    (tmp_path / lock.NAME).write_text(json.dumps({"host": lock.socket.gethostname(), "pid": 2**22 + 1, "process": "x"}))
    results = []

    def take():
        try:
            results.append(FolderLock(tmp_path))
        except CheckpointError as error:
            results.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [result for result in results if isinstance(result, FolderLock)]
    assert len(held) == 1
    held[0].release()
