"""Twenty steps straight equal ten, a new process, and ten more: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import PRETRAIN, PRETRAIN_FP16, train, write_run

from internlm_ds.checkpoint.formats import native

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("dtype", "ranks", "overrides"),
    [
        ("float32", 1, []),
        ("float32", 2, []),
        ("float32", 2, ["parallel.pipeline=2"]),
        ("bfloat16", 1, []),
        ("float16", 1, ["grad_scaler.fp16.initial_scale=524288"]),
    ],
    ids=["fp32", "fp32-data2", "fp32-pipe2", "bf16", "fp16-overflow"],
)
def test_resumed_equals_straight(dtype: str, ranks: int, overrides: list[str], tmp_path: Path):
    overrides = [f"model.dtype=torch.{dtype}", *overrides]
    script = PRETRAIN_FP16 if dtype == "float16" else PRETRAIN
    straight = train(write_run(tmp_path / "a"), tmp_path / "a" / "run", *overrides, ranks=ranks, script=script)

    config = write_run(tmp_path / "b", stop_at=8)
    first = train(config, tmp_path / "b" / "run1", *overrides, ranks=ranks, script=script)
    assert first[-1]["step_count"] == 8
    (tmp_path / "b" / "stop").write_text("0")
    second = train(config, tmp_path / "b" / "run2", *overrides, ranks=ranks, script=script)

    assert second[0]["step"] == first[-1]["step"] + 1
    assert first + second == straight
    assert [s["step"] for s in straight] == [b for b in range(20) if b not in (4, 12, 13)]
    last = straight[-1]["step_count"]
    _assert_equal_checkpoints(tmp_path / "a" / "ckpt" / str(last), tmp_path / "b" / "ckpt" / str(last))
    if dtype == "float16":
        applied = [s["update_applied"] for s in straight]
        assert not all(applied[: len(first)]) and not all(applied[len(first) :]), "an overflow on each side"


def _assert_equal_checkpoints(a: Path, b: Path) -> None:
    one, two = native.open(a), native.open(b)
    assert one.weight_names == two.weight_names
    for name in one.weight_names:
        assert one.weight(name).equal(two.weight(name)), name
        numel = one.weight(name).numel()
        for kind in native.KINDS:
            assert one.fragment(name, kind, 0, numel).equal(two.fragment(name, kind, 0, numel)), (name, kind)
    assert one.train_state == two.train_state
