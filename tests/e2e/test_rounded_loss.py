"""What states in bf16 cost in loss: the debug configuration's 20 updates, beside the same with fp32 states."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs

pytestmark = pytest.mark.timeout(240)

CONFIG = tiny_runs.REPOSITORY / "model_configs" / "debug_cpu.py"
MOMENTS, MASTERS = "internlm_ds.moments_dtype=bfloat16", "internlm_ds.masters_dtype=bfloat16"


def losses(folder: Path, *overrides: str) -> list[float]:
    return [step["loss"] for step in tiny_runs.train(CONFIG, folder, *overrides)]


@pytest.mark.parametrize(("dtype", "states"), [("float32", (MOMENTS,)), ("bfloat16", (MOMENTS, MASTERS))])
def test_the_loss_is_that_of_fp32_states_within_half_a_percent(dtype: str, states: tuple[str, ...], tmp_path: Path):
    model = f"model.dtype=torch.{dtype}"
    exact, rounded = losses(tmp_path / "a", model), losses(tmp_path / "b", model, *states)
    assert len(exact) == len(rounded) == 20 and exact[-1] < 0.5 * exact[0], "it learns"
    assert rounded != exact
    assert rounded[-1] == pytest.approx(exact[-1], rel=5e-3)
