"""Every shipped configuration loads, translates and plans, from the command line and without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "model_configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["convert-config", "plan"])
def test_shipped_config_loads_translates_and_plans(path: Path, command: str) -> None:
    quiet = ["--report", "none"] if command == "convert-config" else []
    done = subprocess.run(
        [sys.executable, "-m", "internlm_ds.cli.main", command, str(path), "--world-size", "8", *quiet],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_tutorials_model_has_the_recipe_for_fine_tuning() -> None:
    text = (ROOT / "model_configs" / "7b.py").read_text(encoding="utf-8")
    assert "    # load_ckpt_info=dict(path=MODEL_ONLY_FOLDER" in text
    assert "Supervised fine-tuning" in text


@pytest.mark.parametrize("name", ["TRAIN_FOLDER", "VOCAB_SIZE", "SAVE_CKPT_FOLDER", "TOTAL_STEPS", "SCHEDULE_STEPS"])
def test_the_demo_takes_its_constants_from_the_command_line(name: str) -> None:
    from internlm_ds import runspec

    value = "30" if name.endswith("STEPS") else "3000" if name == "VOCAB_SIZE" else "somewhere"
    config = runspec.resolve(ROOT / "model_configs" / "demo.py", overrides=[f"{name}={value}"], world_size=2).config
    found = {
        "TRAIN_FOLDER": config.data.train_folder,
        "VOCAB_SIZE": config.model.vocab_size,
        "SAVE_CKPT_FOLDER": config.ckpt.save_ckpt_folder,
        "TOTAL_STEPS": config.data.total_steps,
        "SCHEDULE_STEPS": config.lr_scheduler.total_steps,
    }[name]
    assert str(found) == value


def test_a_shorter_demo_keeps_schedule_and_run_together() -> None:
    from internlm_ds import runspec

    spec = runspec.resolve(ROOT / "model_configs" / "demo.py", overrides=["TOTAL_STEPS=30"], world_size=2)
    assert spec.config.lr_scheduler.total_steps == spec.config.data.total_steps == 30
    assert not spec.warnings
