"""metrics.jsonl is strict JSON on disk after each line; tensorboard gets numbers, and its absence is one line."""

from __future__ import annotations

import builtins
import json
import logging
import math

import numpy as np
import pytest

from internlm_ds.errors import MissingExtraError
from internlm_ds.monitor import log
from internlm_ds.monitor.memory import peak_allocated_bytes, peak_resident_bytes
from internlm_ds.monitor.sinks import MetricsFile, TensorboardSink, open_tensorboard


def test_each_line_is_strict_json_and_on_disk(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(
            {"step": 0, "loss": math.nan, "acc": {"cn": math.inf}, "lr": np.float64(0.5), "ok": True, "名": "值"}
        )
        assert _read(path) == [{"step": 0, "loss": None, "acc": {"cn": None}, "lr": 0.5, "ok": True, "名": "值"}]
        file.write({"step": np.int64(1), "path": tmp_path, "list": (1, -math.inf)})
    assert _read(path)[1] == {"step": 1, "path": str(tmp_path), "list": [1, None]}


def test_opening_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        with MetricsFile(path) as file:
            file.write({"step": step})
    assert [line["step"] for line in _read(path)] == [0, 1]


@pytest.mark.parametrize(
    "left, kept", [('{"step": 0}\n{"step": 1, "lo', [0]), ('{"step": 0}\n{"step": 1}', [0, 1]), ('{"st', []), ("", [])]
)
def test_a_torn_last_line_is_mended(tmp_path, left, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(left)
    with MetricsFile(path) as file:
        file.write({"step": 9})
    assert [line["step"] for line in _read(path)] == [*kept, 9]


def test_tensorboard_gets_numbers_only():
    writer = _Writer()
    sink = TensorboardSink("unused", writer=writer)
    sink.write({"loss": 1, "grad_norm": None, "name": "x", "parts": {"a": 2.0, "b": None}, "none": {}}, step_count=3)
    assert writer.calls == [("loss", 1.0, 3), ("parts", {"a": 2.0}, 3)]


def test_tensorboard_holds_a_queue_back():
    writer = _Writer()
    sink = TensorboardSink("unused", queue_length=2, writer=writer)
    sink.write({"loss": 1.0}, step_count=1)
    assert writer.calls == []
    sink.write({"loss": 2.0}, step_count=2)
    sink.write({"loss": 3.0}, step_count=3)
    assert [call[1] for call in writer.calls] == [1.0, 2.0]
    sink.write_texts({"job_name": "x"})
    sink.close()
    assert [call[1] for call in writer.calls] == [1.0, 2.0, "x", 3.0]


def test_absent_tensorboard_is_one_line(monkeypatch, tmp_path, caplog):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    log.close()
    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level(logging.WARNING, logger="internlm_ds"):
        assert open_tensorboard(tmp_path) is None
    assert len(caplog.records) == 1
    assert "pip install 'internlm-ds[tensorboard]'" in caplog.text and "enable_tb = False" in caplog.text
    with pytest.raises(MissingExtraError, match="writing tensorboard files needs the package tensorboard"):
        TensorboardSink(tmp_path)


def test_peak_memory_is_a_number_of_bytes():
    assert peak_resident_bytes() > 2**20
    assert peak_allocated_bytes() >= 0


class _Writer:
    """A tensorboard writer that notes its calls."""

    def __init__(self):
        self.calls: list[tuple] = []

    def add_scalar(self, tag, value, step):
        self.calls.append((tag, value, step))

    add_scalars = add_text = add_scalar

    def close(self):
        pass


def _read(path) -> list[dict]:
    def refuse(text):
        raise AssertionError(f"{text} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]
