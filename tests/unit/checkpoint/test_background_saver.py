"""Saving beside the training: what was copied is what is saved, one at a time, and nobody misses a failure."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from internlm_ds.checkpoint.agree import Solo
from internlm_ds.checkpoint.background import BackgroundSaver, HostBuffer
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.formats.native import KINDS, Fragment, Weight
from internlm_ds.errors import CheckpointError
from internlm_ds.layout.ranks import Layout


def writer(folder, **changes):
    arguments = {
        "train_state": {},
        "config_text": "",
        "layout": Layout(),
        "arch": None,
        "dtype": "float32",
        "step": 1,
        **changes,
    }
    return partial(native.save, folder, **arguments)


def test_what_is_saved_is_what_was_copied(tmp_path):
    weight = torch.arange(12.0).view(3, 4).t()  # not contiguous
    moment, half = torch.arange(5.0), torch.ones(3, dtype=torch.bfloat16)
    fragments = [
        Fragment(n, k, 0, torch.full((t.numel(),), 2.0)) for n, t in (("w", weight), ("h", half)) for k in KINDS
    ]
    fragments[0] = Fragment("w", "master", 0, torch.cat([moment, torch.zeros(7)]))
    go_on = threading.Event()
    saver = BackgroundSaver(comm=Solo(), thread_comm=Solo())

    def save(**owned):
        go_on.wait(10)
        writer(tmp_path / "1")(**owned)

    expected = weight.clone(), fragments[0].tensor.clone()
    saver.start(save, weights=[Weight("w", weight), Weight("h", half)], fragments=fragments)
    weight.fill_(-1)  # the next update comes before anything is written
    fragments[0].tensor.fill_(-1)
    half.fill_(-1)
    saver.poll()
    assert saver.is_busy and not (tmp_path / "1").exists()
    go_on.set()
    saver.wait()
    checkpoint = native.open(tmp_path / "1")
    assert checkpoint.weight("w").equal(expected[0])
    assert checkpoint.weight("h").equal(torch.ones(3, dtype=torch.bfloat16))
    assert checkpoint.fragment("w", "master", 0, 12).equal(expected[1])
    assert not saver.is_busy


def test_a_second_save_waits_for_the_first(tmp_path):
    running, most = [0], [0]
    saver = BackgroundSaver(comm=Solo(), thread_comm=Solo())

    def save(number, *, comm, weights, fragments):
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert all(weight.tensor.eq(number).all() for weight in weights)
        running[0] -= 1

    for number in range(5):
        saver.start(partial(save, number), weights=[Weight("w", torch.full((100_000,), float(number)))], fragments=[])
    saver.wait()
    assert most == [1]


def test_the_buffer_is_used_again():
    buffer = HostBuffer()
    buffer.warm(4096)
    first = buffer.copy([torch.ones(7), torch.ones(9, dtype=torch.bfloat16)])
    place = first[0].data_ptr()
    second = buffer.copy([torch.zeros(3, 2), torch.arange(4)])
    assert second[0].data_ptr() == place and second[1].tolist() == [0, 1, 2, 3]
    assert buffer._memory.numel() == 4096
    (large,) = buffer.copy([torch.ones(2000)])
    assert large.sum() == 2000


@pytest.mark.parametrize("ends", ["wait", "poll", "start"])
def test_a_failure_on_one_rank_is_raised_on_all(ends, run_threads):
    def rank(comm):
        saver = BackgroundSaver(comm=comm, thread_comm=Solo())

        def save(**owned):
            if comm.rank == 1:
                raise OSError("the disk is full")

        def end():
            if ends == "start":
                saver.start(lambda **owned: None, weights=[], fragments=[])
            while ends == "poll" and saver.is_busy:
                saver.poll()
            saver.wait()

        saver.start(save, weights=[], fragments=[])
        with pytest.raises(CheckpointError, match="saving in the background failed: rank 1: OSError: the disk is full"):
            end()
        assert not saver.is_busy
        saver.start(lambda **owned: None, weights=[], fragments=[])
        saver.wait()

    assert run_threads(3, rank) == [None] * 3
