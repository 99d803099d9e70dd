"""Whole runs of the reference, from the command line: `launch/pretrain.py --config CASE/config.py`, unchanged.

Every step's loss, norm, rates, counters and metrics, the evaluations and the final weights.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import case_folders, golden, read_json

from internlm_ds.arch import BLUEPRINTS

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = case_folders("e2e", "expected.json")

RELATIVE = {"loss": 1e-5, "grad_norm": 1e-5, "lr_used": 1e-9, "lr": 1e-9, "adam_beta2": 1e-9, "loss_scale": 1e-9}
EXACT = [
    "step",
    "step_count",
    "micro_num",
    "num_consumed_tokens",
    "inf_nan_skip_batches",
    "num_samples_in_batch",
    "largest_length",
    "largest_batch",
    "smallest_batch",
]
# the others count the packs of data-parallel rank 0
EVERYWHERE = ["step", "step_count", "num_consumed_tokens", "inf_nan_skip_batches"]
METRIC_ABSOLUTE = 1.5e-4  # the reference rounds metrics to 4 decimals
WEIGHT_SUM_SQ_RELATIVE = 1e-5
# pipeline stages, tensor ranks, mode
LAYOUTS = {"pp2": (2, 1, "mtp"), "tp2": (1, 2, "mtp"), "pp2-tp2-msp": (2, 2, "msp")}

pytestmark = pytest.mark.timeout(300)


def test_there_are_cases():
    golden("e2e")
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_run_equals_reference(case: Path, tmp_path: Path):
    expected = _expected(case)
    ranks = expected["data_parallel_size"]
    lines = _train(case, tmp_path, ranks=ranks)
    _compare(lines, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_other_layouts_equal_reference(case: Path, layout: str, tmp_path: Path):
    expected, (stages, tensor, mode) = _expected(case), LAYOUTS[layout]
    model, parallel = expected["settings"]["model"], expected["settings"].get("parallel", {})
    if model["num_layers"] < stages or any(_size(parallel.get(axis, 1)) > 1 for axis in ("pipeline", "tensor")):
        pytest.skip("the case has too few layers, or stages or tensor ranks of its own")
    if model["num_attention_heads"] % tensor:
        pytest.skip("the case's heads do not divide")
    settings = [
        f"parallel.pipeline={stages}",
        f"parallel.tensor={{'size': {tensor}, 'mode': '{mode}'}}",
        "ckpt.enable_save_ckpt=True",
        f"ckpt.save_ckpt_folder='local:{tmp_path / 'saved'}'",
        "ckpt.checkpoint_every=float('inf')",
    ]
    lines = _train(case, tmp_path, ranks=stages * tensor * expected["data_parallel_size"], overrides=settings)
    _compare(lines, expected)
    _compare_weights(tmp_path / "saved" / str(expected["steps"][-1]["step_count"]), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_two_data_ranks_equal_reference(case: Path, tmp_path: Path):
    """Half the micro-batches on each of twice the ranks: the same packs, the same mean."""
    expected = _expected(case)
    data, ranks = expected["settings"]["data"], expected["data_parallel_size"]
    if data.get("micro_num", 1) % 2 or data.get("rampup_batch_size") or expected["evaluation"]:
        pytest.skip("the case's micro-batches do not halve, or its ramp-up and evaluation depend on their number")
    lines = _train(case, tmp_path, ranks=2 * ranks, overrides=[f"data.micro_num={data['micro_num'] // 2}"])
    _compare(lines, expected, of_first_data_rank=False)


def _size(value) -> int:
    return value if isinstance(value, int) else value.get("size", 1)


def _expected(case: Path) -> dict:
    expected = read_json(case / "expected.json")
    family = expected["settings"].get("model_type", "INTERNLM")
    if family not in BLUEPRINTS:
        pytest.skip(f"model family {family} does not exist in this version")
    return expected


def _train(case: Path, folder: Path, *, ranks: int, overrides: list[str] = ()) -> list[dict]:
    script = [
        str(REPOSITORY / "launch" / "pretrain.py"),
        "--config",
        str(case / "config.py"),
        "--run-dir",
        str(folder / "run"),
    ]
    for text in overrides:
        script += ["--set", text]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, *script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def _compare(lines: list[dict], expected: dict, *, of_first_data_rank: bool = True) -> None:
    steps = [line for line in lines if "validation" not in line]
    assert [s["step"] for s in steps] == [s["step"] for s in expected["steps"]]
    for got, want in zip(steps, expected["steps"], strict=True):
        where = f"step {want['step']}"
        renamed = {**want, "lr": want["lr_logged"]}
        for key, tolerance in RELATIVE.items():
            if key in renamed:
                assert got[key] == pytest.approx(renamed[key], rel=tolerance, abs=0), (where, key)
        for key in EXACT if of_first_data_rank else EVERYWHERE:
            if key in want:
                assert got[key] == want[key], (where, key)
        for key, value in want.items():
            if key in ("acc", "loss_from_metric") or key.startswith(("acc/", "loss/")):
                _close(got[key], value, where=(where, key))
            if key.startswith("tokens/"):
                assert got[key] == value, (where, key)
        # perplexity is the exponential of a loss: its tolerance grows with it
        _close(got["perplexity"], want["perplexity"], where=(where, "perplexity"), scale=want["perplexity"])
    _compare_evaluation([line for line in lines if "validation" in line], expected)


def _compare_evaluation(lines: list[dict], expected: dict) -> None:
    wanted = [
        {"validation": name, "step": entry["after_step"], "step_count": entry["step_count"], **values}
        for entry in expected["evaluation"] or []
        for name, values in _results(entry).items()
    ]
    assert sorted((w["validation"], w["step"]) for w in wanted) == sorted((g["validation"], g["step"]) for g in lines)
    for want in wanted:
        got = next(g for g in lines if (g["validation"], g["step"]) == (want["validation"], want["step"]))
        assert got["step_count"] == want["step_count"]
        for key in ("loss", "acc", "perplexity"):
            scale = want[key] if key == "perplexity" else 1.0
            _close(got[key], want[key], where=(want["validation"], want["step"], key), scale=scale or 1.0)


def _results(entry: dict) -> dict[str, dict[str, float]]:
    """`{set: {loss, acc, perplexity}}` of one evaluation: nested under the sets' names, or flat as `val/SET_loss`."""
    found: dict[str, dict[str, float]] = {}
    nested = entry.get("results", entry)
    for key, value in nested.items():
        if isinstance(value, dict):
            found[key] = {_short(name, key): number for name, number in value.items()}
        elif key.startswith("val/"):
            name, _, kind = key.removeprefix("val/").rpartition("_")
            found.setdefault(name, {})[_short(kind, name)] = value
    assert found, f"an evaluation without results: {entry}"
    return found


def _short(name: str, of: str) -> str:
    """`val/SET_plex`, `plex` -> `perplexity`."""
    kind = name.removeprefix(f"val/{of}_")
    return {"plex": "perplexity"}.get(kind, kind)


def _close(got: float | None, want: float | None, *, where: object, scale: float = 1.0) -> None:
    if want is None or math.isnan(want):
        assert got is None, where
        return
    assert got is not None and abs(got - want) <= METRIC_ABSOLUTE * max(1.0, abs(scale)), (where, got, want)


def _compare_weights(folder: Path, expected: dict) -> None:
    from internlm_ds.checkpoint.formats import native

    saved = native.open(folder)
    assert set(saved.weight_names) == set(expected["final_weights"])
    for name, want in expected["final_weights"].items():
        weight = saved.weight(name).double()
        assert list(weight.shape) == want["shape"], name
        assert float(weight.square().sum()) == pytest.approx(want["sum_sq"], rel=WEIGHT_SUM_SQ_RELATIVE), name
