"""Garbage is collected and memory told of between batches, at the interval."""

from __future__ import annotations

import gc
import logging

import torch

from internlm_ds.train.housekeeping import Housekeeping


def test_garbage_is_collected_and_memory_told_of_at_the_interval(caplog):
    seen: list[int] = []
    housekeeping = Housekeeping(every=3, device=torch.device("cpu"))
    caplog.set_level(logging.INFO)
    gc.callbacks.append(lambda phase, info: seen.append(info["generation"]) if phase == "start" else None)
    try:
        for batch in range(1, 8):
            seen.clear()
            housekeeping.batch_done()
            assert (2 in seen) == (batch in (1, 3, 6)), batch
        assert len([r for r in caplog.records if "GiB resident" in r.message]) == 2
        assert gc.get_freeze_count() > 0
    finally:
        gc.callbacks.pop()
        housekeeping.close()
    assert gc.get_freeze_count() == 0
