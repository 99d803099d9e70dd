"""A run that is converted to InternLM's format and taken up from there goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_runs

pytestmark = pytest.mark.timeout(240)


def converted(source, target, *options: str) -> None:
    command = [sys.executable, "-m", "internlm_ds.cli.main", "convert-checkpoint", str(source), str(target), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tiny_runs.REPOSITORY)
    assert done.returncode == 0, done.stderr


MOMENTS = "internlm_ds.moments_dtype=bfloat16"


@pytest.mark.parametrize(
    "states",
    [(), (MOMENTS,), ("model.dtype=torch.bfloat16", MOMENTS, "internlm_ds.masters_dtype=bfloat16")],
    ids=["fp32", "bf16-moments", "bf16-all"],
)
def test_there_and_back_again(tmp_path, states):
    config = tiny_runs.write_run(tmp_path / "run", stop_at=7)
    config.write_text(config.read_text().replace("drop_rate=0.1", "drop_rate=0.0"))  # no place for random states there
    before = tiny_runs.train(config, tmp_path / "a", *states)
    (tmp_path / "run" / "stop").write_text("10")
    straight = tiny_runs.train(config, tmp_path / "b", *states)

    split = ("--to", "internlm", "--content", "all", "--tensor", "2", "--pipeline", "2", "--zero1", "3")
    converted(tmp_path / "run/ckpt/7", tmp_path / "internlm/7", *split)
    converted(tmp_path / "internlm/7", tmp_path / "native/7", "--to", "native", "--content", "all")
    assert len(list((tmp_path / "internlm/7").glob("optimizer_tp*_pp*_zo*.pt"))) == 12

    for kind, folder in (("internlm", "internlm/7"), ("native", "native/7")):
        load = {"path": f"local:{tmp_path / folder}", "content": ("all",), "ckpt_type": kind}
        overrides = (f"ckpt.save_ckpt_folder=local:{tmp_path / kind / 'new'}", f"ckpt.load_ckpt_info={load}")
        after = tiny_runs.train(config, tmp_path / f"from_{kind}", *states, *overrides)
        assert after == straight, kind
    assert before[-1]["step_count"] == 7
