"""`ds_configs/generated/` is what `convert-config` makes of the shipped model configurations, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_ds import runspec
from internlm_ds.translate import render, translate

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "ds_configs" / "generated"
RANKS = {"7b": 8, "7b_internlm2": 8, "7b_llama2": 8, "20b": 32, "debug_cpu": 1, "demo": 2}


def stored(name: str) -> Path:
    return GENERATED / f"{name}.{RANKS[name]}ranks.json"


@pytest.mark.parametrize("name", sorted(RANKS))
def test_generated_json_is_current(name: str, same_as_stored: Callable[[Path, str], None]) -> None:
    spec = runspec.resolve(ROOT / "model_configs" / f"{name}.py", world_size=RANKS[name])
    same_as_stored(stored(name), render.ds_json(translate(spec).ds_config))


def test_every_model_config_has_a_snapshot_and_no_other_exists() -> None:
    assert {path.stem for path in (ROOT / "model_configs").glob("*.py")} == set(RANKS)
    assert set(GENERATED.glob("*")) == {stored(name) for name in RANKS}
