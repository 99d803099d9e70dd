"""A conversion that is killed leaves no result, or the whole one, and the next one leaves no trace of it."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from internlm_ds.checkpoint.formats import native
from internlm_ds.convert.run import Request, convert
from internlm_ds.layout.ranks import Layout


def killed_after(seconds: float, request: Request) -> None:
    child = os.fork()
    if child == 0:
        try:
            convert(request)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.soak)])
@pytest.mark.parametrize("target", ["hf", "internlm"])
def test_killed_conversions(tmp_path, tiny_model, tiny_arch, tiny_weights, target, kills):
    native.save(
        tmp_path / "7",
        weights=tiny_weights.items(),
        train_state={},
        config_text="",
        layout=Layout(),
        arch=tiny_arch,
        dtype="float32",
        model=tiny_model,
    )
    request = Request(str(tmp_path / "7"), str(tmp_path / "out"), None, target)
    started = time.perf_counter()
    convert(request)
    usual, chance = time.perf_counter() - started, random.Random(kills)
    good = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for _ in range(kills):
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()
        killed_after(chance.uniform(0, usual), request)
        if not (tmp_path / "out").exists():
            convert(request)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "out"]
        found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert found.keys() == good.keys()
        weights = {name for name in good if name.endswith((".safetensors", ".json"))}
        assert all(found[name] == good[name] for name in weights)
