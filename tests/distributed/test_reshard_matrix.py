"""A run goes on at any other layout: from A to B and back, weights and moments bit for bit, and A's next loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from layout_runs import Case, FakeLoader

from internlm_ds.checkpoint.formats import native
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.verify import training

pytestmark = pytest.mark.timeout(600)

LAYOUTS = {
    "1": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipe=2),
    "tp2-pp2": Layout(tensor=2, pipe=2),
    "dp2-zero2": Layout(data=2, zero=2),
    "pp2-2chunks": Layout(pipe=2, chunks=2),
}
ALL = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
FEW = [("1", "tp2-pp2"), ("tp2-pp2", "dp2-zero2")]
STEPS = 3


@dataclass(frozen=True)
class Stop:
    """A checkpoint to load, and what to do then: save it anew, and perhaps take the next step."""

    load: str
    save: str
    next_step: bool = False


def visit(context, path: str, case: Case, stops: list[Stop], train_first: str = "") -> list[float | None]:
    """On every rank of a layout: first train and save if asked to, then one stop after the other."""
    from internlm_ds.parallel import rng
    from internlm_ds.parallel.comm import ProcessComm

    rng.seed_everything(training.SEED)
    spec, engine, _ = training.build_engine(context, path)
    losses: list[float | None] = []
    place = (engine, spec, context, ProcessComm())
    if train_first:
        training.take_steps(context, spec, engine, replace(case, steps=STEPS))
        save(*place, Path(train_first))
        losses.append(next_loss(context, spec, engine, case))
    for stop in stops:
        load(*place, Path(stop.load))
        save(*place, Path(stop.save))
        losses.append(next_loss(context, spec, engine, case) if stop.next_step else None)
    return losses


def next_loss(context, spec, engine, case: Case) -> float:
    ((loss, _),) = training.take_steps(context, spec, engine, replace(case, steps=STEPS + 1), first=STEPS)
    return loss


def run_checkpoints(engine, spec, context, comm, folder: Path):
    """A run's checkpoints, whatever its configuration says of them: to load from here, or to save to here."""
    from internlm_ds.train.checkpoints import RunCheckpoints

    ckpt = replace(spec.config.ckpt, auto_resume=True, enable_save_ckpt=True, save_ckpt_folder=str(folder))
    config = replace(spec.config, ckpt=ckpt)
    return RunCheckpoints(engine, FakeLoader(), spec=replace(spec, config=config), context=context, comm=comm)


def save(engine, spec, context, comm, folder: Path) -> None:
    from internlm_ds.train.state import TrainState

    checkpoints = run_checkpoints(engine, spec, context, comm, folder)
    checkpoints.final(TrainState(step_count=STEPS, batch_count=STEPS))
    checkpoints.close()


def load(engine, spec, context, comm, folder: Path) -> None:
    from internlm_ds.train.state import TrainState

    state = TrainState()
    checkpoints = run_checkpoints(engine, spec, context, comm, folder)
    checkpoints.restore(state)
    checkpoints.close()
    assert state.step_count == STEPS


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, by logical name, whole."""
    checkpoint = native.open(folder / str(STEPS))
    held = dict(checkpoint.weights)
    for name, shape in checkpoint.shapes.items():
        for kind in native.KINDS:
            held[f"{kind} {name}"] = checkpoint.fragment(name, kind, 0, torch.Size(shape).numel())
    return held


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{what}: {name}"


def case_of(name: str, dtype: str) -> Case:
    layout = LAYOUTS[name]
    model = (*Case().model, ("num_chunks", layout.chunks)) if layout.chunks > 1 else Case().model
    return Case(layout=layout, dtype=dtype, model=model)


@pytest.mark.parametrize(
    ("pairs", "dtype"),
    [
        pytest.param(FEW, "float32", id="some-fp32"),
        pytest.param([("dp2-zero2", "pp2-2chunks")], "bfloat16", id="some-bf16"),
        pytest.param(ALL, "float32", id="all-fp32", marks=pytest.mark.soak),
        pytest.param(ALL, "bfloat16", id="all-bf16", marks=pytest.mark.soak),
    ],
)
def test_there_and_back(pairs: list[tuple[str, str]], dtype: str, tmp_path: Path):
    # one visit of a layout does all that is to be done there
    cases = {name: case_of(name, dtype) for name in LAYOUTS}
    paths = {}
    for name, case in cases.items():
        (tmp_path / name).mkdir()
        paths[name] = case.write(tmp_path / name)

    def visit_all(name: str, stops: list[Stop], train_first: str = "") -> list[float | None]:
        case = cases[name]
        return run_ranks(visit, case.layout, paths[name], case, stops, train_first, timeout_s=300)[0]

    stayed, starts = {}, {}
    for name in sorted({a for a, _ in pairs}):
        (stayed[name],) = visit_all(name, [], str(tmp_path / name / "start"))
        starts[name] = contents(tmp_path / name / "start")
    for there in sorted({b for _, b in pairs}):
        froms = [a for a, b in pairs if b == there]
        visit_all(there, [Stop(str(tmp_path / a / "start"), str(tmp_path / a / there)) for a in froms])
        for a in froms:
            assert_equal(contents(tmp_path / a / there), starts[a], what=f"{a} to {there}")
    for home in sorted({a for a, _ in pairs}):
        theres = [b for a, b in pairs if a == home]
        stops = [Stop(str(tmp_path / home / b), str(tmp_path / home / f"{b}-back"), next_step=True) for b in theres]
        for there, loss in zip(theres, visit_all(home, stops), strict=True):
            assert_equal(contents(tmp_path / home / f"{there}-back"), starts[home], what=f"{home}, {there} and back")
            assert loss == pytest.approx(stayed[home], rel=1e-6), f"{home}, {there} and back"
