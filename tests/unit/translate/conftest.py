"""Real runs for the tests of translation: a shipped configuration with overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_ds import runspec
from internlm_ds.runspec import RunSpec

MODEL_CONFIGS = Path(__file__).resolve().parents[3] / "model_configs"


@pytest.fixture
def spec_of() -> Callable[..., RunSpec]:
    """`spec_of(*overrides, config="debug_cpu", world_size=1)`."""

    def make(*overrides: str, config: str = "debug_cpu", world_size: int = 1) -> RunSpec:
        return runspec.resolve(MODEL_CONFIGS / f"{config}.py", overrides=overrides, world_size=world_size)

    return make
