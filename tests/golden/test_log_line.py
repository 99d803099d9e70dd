"""The log line: values that follow from clock and batch equal the reference's, keys stand in the tutorial's order.

The reference of 2024 joins `key=value` with blanks; ours joins them with commas, as the tutorial shows
(docs/compatibility.md, "Log line"). So its lines are taken apart here, and the values compared.
"""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
from cases import golden, read_json

from internlm_ds.data.collate import BatchStats
from internlm_ds.data.packing import Pack
from internlm_ds.monitor.log import LINE_KEYS, LONG_NAMES, format_metrics, parse_line
from internlm_ds.monitor.sinks import TensorboardSink
from internlm_ds.monitor.throughput import ThroughputMeter
from internlm_ds.plan.compute import flops_per_step

TFLOPS_TOLERANCE = 1e-12
BLANK_JOINED = re.compile(r"(tgs \(tokens/gpu/second\)|[^\s=]+)=(\{[^}]*\}|\S+)(?: |$)")


@pytest.fixture(name="cases")
def _cases() -> list[dict]:
    found = [read_json(path) for path in sorted(golden("log_line").rglob("*.json"))]
    assert found, "the kind log_line holds no case"
    return found


def test_throughput_equals_the_reference(cases):
    for case in cases:
        meter, now = _meter(case)
        for batch, line in zip(case["batches"], case["lines"], strict=True):
            tokens = _tokens(batch) * case["config"]["dp"]
            meter.start()
            now[0] += batch["time_before_fwd"] + batch["fwd_bwd"] + batch["time_after"]
            ours = meter.stop(tokens=tokens)
            expected = _apart(line)
            assert ours["tflops"] == pytest.approx(expected["tflops"], rel=TFLOPS_TOLERANCE)
            ours["tgs (tokens/gpu/second)"] = ours["tgs"]
            for key in (key for key in expected if key.startswith("tgs")):
                assert ours[key] == expected[key], (batch["step"], key)


def test_batch_numbers_of_the_line(cases):
    for case in cases:
        consumed = 0
        for batch, line in zip(case["batches"], case["lines"], strict=True):
            consumed += _tokens(batch) * case["config"]["dp"]
            expected = _apart(line)
            stats = BatchStats.of([_pack(borders) for borders in batch["cu_seqlens"]])
            assert expected["num_consumed_tokens"] == consumed
            assert expected["num_samples_in_batch"] == stats.num_samples
            assert expected["largest_length"] == stats.largest_length
            assert expected["largest_batch"] == stats.largest_batch
            assert expected["smallest_batch"] == stats.smallest_batch
            assert expected["micro_num"] == stats.num_packs
            assert expected["fwd_bwd_time"] == round(batch["fwd_bwd"], 2)


def test_our_line_of_the_reference_metrics_reads_back(cases):
    for case in cases:
        for line in case["lines"]:
            metrics = _apart(line)
            ours = format_metrics(metrics)
            read = parse_line(f"2024-03-01 00:00:00,000\tINFO step.py:1 in report_step -- {ours}")
            assert read is not None, ours
            short = {LONG_NAMES_BACK.get(key, key): value for key, value in _flat(metrics).items()}
            assert read.metrics == pytest.approx(short, nan_ok=True)
            keys = [pair.split("=")[0] for pair in ours.split(",")]
            assert keys[: len(LINE_KEYS) - 1] == [key for key in LINE_KEYS if key != "grad_norm"]


def test_tensorboard_calls_equal_the_reference(cases):
    for case in cases:
        calls: list[list] = []
        sink = TensorboardSink("unused", writer=_Recorder(calls))
        sink.write(_apart(case["lines"][0]), step_count=case["tensorboard_first_step"][0][-1])
        assert calls == case["tensorboard_first_step"]


LONG_NAMES_BACK = {long: short for short, long in LONG_NAMES.items()}


class _Recorder:
    """A tensorboard writer that notes who was called with what."""

    def __init__(self, calls: list[list]):
        self._calls = calls

    def add_scalar(self, tag, value, step):
        self._calls.append(["scalar", tag, step])

    def add_scalars(self, tag, values, step):
        self._calls.append(["scalars", tag, list(values), step])


def _meter(case: dict) -> tuple[ThroughputMeter, list[float]]:
    c, now = case["config"], [0.0]
    flops = flops_per_step(
        checkpoint=c["checkpoint"],
        seq_len=c["seq_len"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_layers"],
        vocab_size=c["vocab_size"],
        global_batch_size=c["micro_bsz"] * c["micro_num"] * c["dp"],
        mlp_ratio=c["mlp_ratio"],
    )
    return ThroughputMeter(world_size=c["world"], flops_per_step=flops, clock=lambda: now[0]), now


def _tokens(batch: dict) -> int:
    """Tokens of a batch on one rank."""
    return sum(borders[-1] for borders in batch["cu_seqlens"])


def _pack(borders: list[int]) -> Pack:
    blank = np.zeros(borders[-1], dtype=np.int64)
    return Pack(tokens=blank, labels=blank, cu_seqlens=np.array(borders, dtype=np.int32), type_ids=blank)


def _apart(line: str) -> dict:
    found = {key: _value(text) for key, text in BLANK_JOINED.findall(line)}
    assert found, line
    return found


def _value(text: str):
    return float(text) if text in ("nan", "inf", "-inf") else ast.literal_eval(text)


def _flat(metrics: dict) -> dict:
    flat: dict = {}
    for key, value in metrics.items():
        flat.update({f"{key}/{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat
