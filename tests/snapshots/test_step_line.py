"""The log line of a step, byte for byte: people's scripts read it."""

from __future__ import annotations

from pathlib import Path

from internlm_ds.monitor.log import format_metrics

STORED = Path(__file__).parent / "step_line.txt"

# in the order of metrics.jsonl, to show that the line has an order of its own
STEP = {
    "step": 1,
    "loss": 11.613704681396484,
    "lr": 6.000000000000001e-07,
    "loss_scale": 65536.0,
    "grad_norm": 65.150786641452,
    "micro_num": 4,
    "num_consumed_tokens": 262144,
    "inf_nan_skip_batches": 0,
    "num_samples_in_batch": 16,
    "largest_length": 2048,
    "largest_batch": 5,
    "smallest_batch": 3,
    "adam_beta2": 0.95,
    "fwd_bwd_time": 3.67,
    "tgs": 4274.45,
    "tflops": 189.83371103277346,
    "mfu": None,
    "acc": 0.0226,
    "perplexity": 127.2038,
    "acc/cn": 0.0597,
    "tokens/cn": 67,
    "loss/cn": float("nan"),
    "step_count": 2,
    "lr_used": 4.0000000000000003e-07,
    "update_applied": True,
    "memory_allocated_peak": 41000000000,
}


def test_step_line_is_as_promised(same_as_stored):
    failed = {**STEP, "step": 2, "grad_norm": None, "update_applied": False, "loss_scale": 32768.0}
    same_as_stored(STORED, format_metrics(STEP) + "\n" + format_metrics(failed) + "\n")
