"""What is measured between a layout and one process, and how a table says it."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch

from internlm_ds.errors import MachineError
from internlm_ds.layout.shards import Shard
from internlm_ds.testing.ranks import RankError
from internlm_ds.verify import run
from internlm_ds.verify.compare import BF16, FP32, compare
from internlm_ds.verify.ladder import ladder
from internlm_ds.verify.table import Verdict, Watch, heading, line, summary
from internlm_ds.verify.training import Piece, RankResult

TOP, BOTTOM = (
    Shard(rank=0, size=2, dim=0, length=4, spans=((0, 2),)),
    Shard(rank=1, size=2, dim=0, length=4, spans=((2, 4),)),
)
CLAIM = next(claim for claim in ladder(2) if claim.name == "tensor=2")


def weights(value: float, shard: Shard | None = None) -> dict[str, Piece]:
    return {"norm": Piece(torch.full((4,), value), None), "w": Piece(torch.full((2 if shard else 4,), value), shard)}


WHOLE = RankResult(weights(0.0), weights(1.0), [(4.0, 2.0), (3.0, 1.0)])
RANKS = [RankResult(weights(0.0, shard), weights(1.0, shard), WHOLE.outcomes) for shard in (TOP, BOTTOM)]


def failing(ranks: list[RankResult], tolerances=FP32) -> list[str]:
    return [str(measure) for measure in compare(ranks, WHOLE, tolerances) if not measure.holds]


def test_shards_that_make_the_whole_hold():
    assert failing(RANKS) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"outcomes": [(4.0, 2.0), (3.03, 1.0)]}, ["loss off by 1.0e-02 (step 1), allowed 1e-05"]),
        ({"outcomes": [(4.0, 1.0), (3.0, 1.0)]}, ["grad norm off by 5.0e-01 (step 0), allowed 1e-04"]),
        ({"outcomes": [(4.0, None), (3.0, 1.0)]}, ["grad norm off by inf (step 0), allowed 1e-04"]),
        ({"outcomes": [(math.nan, 2.0), (3.0, 1.0)]}, ["loss off by nan (step 0), allowed 1e-05"]),
        (
            {"outcomes": [(4.0, 2.0)]},
            [
                "loss off by inf (another number of steps), allowed 1e-05",
                "grad norm off by inf (another number of steps), allowed 1e-04",
            ],
        ),
        ({"before": weights(0.5, BOTTOM)}, ["initial weights off by 5.0e-01 (w), allowed 0e+00"]),
        (
            {"after": {**weights(1.0, BOTTOM), "norm": Piece(torch.full((4,), 1.5), None)}},
            ["replicas off by 5.0e-01 (norm), allowed 0e+00"],
        ),
        (
            {"after": {**weights(1.0), "w": Piece(torch.full((2,), 1.25), BOTTOM)}},
            ["final weights off by 2.5e-01 (w), allowed 1e-05"],
        ),
    ],
)
def test_what_differs_is_named(change: dict, expected: list[str]):
    assert failing([RANKS[0], replace(RANKS[1], **change)]) == expected


def test_weights_that_nobody_holds_are_named():
    lost = [replace(rank, after={"w": rank.after["w"]}) for rank in RANKS]
    assert failing(lost) == ["final weights off by inf (held: norm on one side only), allowed 1e-05"]


def test_bf16_weights_are_measured_by_the_way_they_went():
    moved = [replace(rank, after=weights(1.05, shard)) for rank, shard in zip(RANKS, (TOP, BOTTOM), strict=True)]
    assert failing(moved) and failing(moved, BF16) == []
    final = compare(moved, WHOLE, BF16)[-1]
    assert final.largest == pytest.approx(0.05) and final.where == "all weights"
    still = [replace(rank, after=rank.before) for rank in RANKS]
    assert failing(still, BF16) == ["final weights off by 1.0e+00 (all weights), allowed 1e-01"]


# ---- table ----------------------------------------------------------------------------------------------------------


def test_lines_stand_below_their_columns():
    good = Verdict(CLAIM, tuple(compare(RANKS, WHOLE, FP32)))
    columns = heading(2, backend="gloo", claims=[CLAIM]).splitlines()[-1]
    text = line(good)
    assert " ".join(text.split()) == "pass tensor=2 0.0e+00 (1e-05) 0.0e+00 (1e-04) 0.0e+00 (1e-05) equal"
    assert text.index("equal") == columns.index("replicas")
    assert text.index("0.0e+00") == columns.index("loss")


def test_failures_end_the_table_with_their_claim():
    wrong = [RANKS[0], replace(RANKS[1], outcomes=[(4.0, 1.0), (3.0, 1.0)])]
    bad = Verdict(CLAIM, tuple(compare(wrong, WHOLE, FP32)))
    broken = Verdict(CLAIM, (), failure="rank 1 raised: ValueError: no")
    assert line(bad).startswith("FAIL  tensor=2 ") and "5.0e-01 (1e-04)" in line(bad)
    assert line(broken).split(maxsplit=2) == ["FAIL", "tensor=2", "rank 1 raised: ValueError: no"]
    assert summary([bad, broken], total=3, seconds=61.2).splitlines() == [
        "",
        "1 of 3 claims hold (61 s)",
        "FAIL  tensor=2: grad norm off by 5.0e-01 (step 0), allowed 1e-04",
        "FAIL  tensor=2: rank 1 raised: ValueError: no",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_share_done_and_time_left():
    seconds = iter([0.0, 10.0, 10.0])
    terminal = Terminal()
    watch = Watch(4, stream=terminal, clock=lambda: next(seconds))
    watch.begin("data=2")
    watch.end()
    watch.begin("tensor=2")
    shown = [part for part in terminal.getvalue().split("\r\033[K") if part]
    assert shown == ["1/4 (0% done): data=2", "2/4 (25% done, about 30 s left): tensor=2"]


def test_a_file_gets_no_progress():
    stream = io.StringIO()
    watch = Watch(1, stream=stream)
    watch.begin("data=2")
    watch.end()
    assert stream.getvalue() == ""


# ---- walking --------------------------------------------------------------------------------------------------------


def test_nccl_without_gpus_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MachineError) as error:
        run.verify(ranks=2, backend="nccl")
    assert str(error.value) == (
        "--backend nccl needs a GPU for each of 2 ranks, and torch sees 1 here; "
        "use --backend gloo (CPU), or fewer --ranks"
    )


@pytest.mark.parametrize(
    ("gpus", "ranks", "expected"), [(0, None, ("gloo", 4)), (2, None, ("nccl", 2)), (2, 4, ("gloo", 4))]
)
def test_gpus_decide_what_nobody_says(gpus: int, ranks, expected, monkeypatch: pytest.MonkeyPatch, capsys):
    used = set()

    def ran(fn, layout, *args, timeout_s: float, backend: str):
        used.add(backend)
        raise RankError("rank 0 raised:\nTraceback\n  deep\nValueError: no")

    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(run, "run_ranks", ran)
    assert run.verify(ranks=ranks, quick=True) == 1
    out = capsys.readouterr().out
    assert used == {expected[0]} and f"up to {expected[1]} rank(s)" in out
    assert "one process fails: rank 0 raised: ValueError: no" in out
