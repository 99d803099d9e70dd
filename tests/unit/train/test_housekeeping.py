"""Garbage is collected and memory told of between batches, at the interval."""

from __future__ import annotations

import gc
import logging
import platform
import subprocess
import sys

import pytest
import torch

from internlm_ds.train.housekeeping import Housekeeping, keep_freed_memory


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


SCRIPT = """
import resource, sys, torch
from internlm_ds.train.housekeeping import Housekeeping, keep_freed_memory

def pages_that_a_block_takes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu = torch.device("cpu")
if sys.argv[1] == "keep":
    assert keep_freed_memory(cpu)
first, second = pages_that_a_block_takes(), pages_that_a_block_takes()
Housekeeping(every=1, device=cpu).batch_done()
print(first, second, pages_that_a_block_takes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
@pytest.mark.timeout(120)
def test_freed_memory_serves_the_next_micro_batch_until_the_run_tidies_up():
    def pages(how: str) -> list[int]:
        command = [sys.executable, "-c", SCRIPT, how]
        return [int(n) for n in subprocess.run(command, capture_output=True, check=True, timeout=50).stdout.split()]

    # a page may be large: a block takes 16 of 4 MB
    first, second, tidied = pages("leave")
    assert min(first, second, tidied) >= 16
    first, second, tidied = pages("keep")
    assert second == 0 and min(first, tidied) >= 16


def test_other_devices_have_an_allocator_of_their_own():
    assert not keep_freed_memory(torch.device("cuda"))
