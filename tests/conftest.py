"""Settings of all tests: one thread per process, the helpers beside the tests importable, no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for folder in ("golden", "e2e", "distributed", "unit/checkpoint", "unit/data/doctor"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

# a busy machine is no failure, and a failure is one on every machine: no deadline, the same examples each time
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Long loops run in `make soak` only."""
    if os.environ.get("INTERNLM_DS_SOAK") == "1":
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="a long loop: make soak"))
