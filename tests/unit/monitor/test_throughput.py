"""Rates and their averages; the golden test holds the exact numbers."""

from __future__ import annotations

from internlm_ds.monitor.throughput import ThroughputMeter


def test_rates_of_one_step():
    now = [10.0]
    meter = ThroughputMeter(world_size=4, flops_per_step=8e12, clock=lambda: now[0])
    meter.start()
    now[0] = 12.0
    found = meter.stop(tokens=800)
    assert found["tflops"] == 1.0
    assert found["tgs"] == found["tgs/last_tgs_1"] == found["tgs/tgs_all"] == found["tgs/tgs_SMA"] == 100.0
    assert found["tgs/last_tgs_10"] == 0
    assert found["step_time"] == 2.0


def test_averages_differ_as_they_should():
    meter = ThroughputMeter(world_size=1, flops_per_step=1.0)
    meter.record(tokens=100, seconds=1.0)
    found = meter.record(tokens=100, seconds=3.0)
    assert (found["tgs/tgs_all"], found["tgs/tgs_avg"]) == (50.0, round((100 + 33.33) / 2, 2))


def test_blocks_hold_their_last_complete_rate():
    meter = ThroughputMeter(world_size=1, flops_per_step=1.0)
    found = [meter.record(tokens=10 if step < 50 else 20, seconds=1.0) for step in range(105)]
    assert [f["tgs/last_tgs_10"] for f in found[8:11]] == [0, 10.0, 10.0]
    assert (found[58]["tgs/last_tgs_10"], found[59]["tgs/last_tgs_10"]) == (10.0, 20.0)
    assert (found[98]["tgs/last_tgs_50"], found[99]["tgs/last_tgs_50"]) == (10.0, 20.0)
    assert found[104]["tgs/tgs_SMA"] == 20.0


def test_a_step_without_duration_is_no_division_by_zero():
    assert ThroughputMeter(world_size=1, flops_per_step=1.0).record(tokens=1, seconds=0.0)["tgs"] > 0
