"""One rank raises somewhere in a step, and no launcher would end the others: all end soon, and name the cause."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from internlm_ds.layout.ranks import Layout
from internlm_ds.parallel.first_failure import Failure, FirstFailure
from internlm_ds.schedule import instructions as words
from internlm_ds.testing import ranks as testing_ranks
from internlm_ds.verify.case import Case

pytestmark = pytest.mark.timeout(120)

PP2_DP2 = Layout(pipe=2, data=2, zero=2)
LONGEST_S = 20.0
RAY = "RuntimeError: cosmic ray"

# (instruction, rank that raises at it); ranks 0 and 1 are the first stage
PLACES = [
    *[("Load", 0), ("Forward", 1), ("SendActivation", 0), ("RecvGrad", 1), ("Backward", 0)],
    *[("Load", 3), ("RecvActivation", 2), ("Forward", 3), ("Backward", 2), ("SendGrad", 3)],
    *[("ReduceGrads", rank) for rank in (1, 2)],
    *[("OptimizerStep", rank) for rank in (0, 3)],
    *[("loader", rank) for rank in range(4)],
]


@pytest.mark.parametrize(("where", "rank"), PLACES, ids=lambda value: str(value))
def test_a_rank_that_raises_ends_all(where: str, rank: int, tmp_path: Path):
    codes, texts, seconds = end_of_ranks(Case(layout=PP2_DP2, steps=3), tmp_path, where, rank, "raise")
    assert codes == [1] * 4 and seconds < LONGEST_S
    _assert_cause_is_last(texts, rank)


@pytest.mark.parametrize("where", ["WeightGrad", "SendGrad"])
def test_a_rank_that_raises_in_a_zero_bubble_schedule(where: str, tmp_path: Path):
    case = Case(layout=Layout(pipe=2), steps=3, own='pipeline_schedule="zb-h1"')
    codes, texts, seconds = end_of_ranks(case, tmp_path, where, 1, "raise")
    assert codes == [1] * 2 and seconds < LONGEST_S
    _assert_cause_is_last(texts, 1)


def test_a_rank_that_raises_before_shapes_are_known(tmp_path: Path):
    codes, texts, seconds = end_of_ranks(Case(layout=PP2_DP2, steps=3), tmp_path, "Forward", 0, "raise at once")
    assert codes == [1] * 4 and seconds < LONGEST_S
    _assert_cause_is_last(texts, 0)


def test_a_peer_that_notices_nothing_is_ended_by_its_watch(tmp_path: Path):
    """As with NCCL, where a peer waits for its time limit although the other process is gone."""
    codes, texts, seconds = end_of_ranks(Case(layout=PP2_DP2, steps=3), tmp_path, "Forward", 3, "raise, 0 is stuck")
    assert codes == [1] * 4 and seconds < LONGEST_S
    _assert_cause_is_last(texts, 3)


def test_a_rank_that_is_killed_ends_all(tmp_path: Path):
    codes, texts, seconds = end_of_ranks(Case(layout=PP2_DP2, steps=3), tmp_path, "Backward", 2, "kill")
    assert codes == [1, 1, -signal.SIGKILL, 1] and seconds < LONGEST_S
    (first,) = [rank for rank in (0, 1, 3) if f"rank {rank}: Traceback" in texts[rank]]
    for other in {0, 1, 3} - {first}:
        assert texts[other].splitlines()[-1].startswith(f"rank {other} ends, because rank {first} failed: "), texts


def _assert_cause_is_last(texts: list[str], rank: int) -> None:
    for other, text in enumerate(texts):
        last = text.splitlines()[-1]
        if other == rank:
            assert f"rank {rank}: Traceback" in text and last == RAY, text
        else:
            assert last == f"rank {other} ends, because rank {rank} failed: {RAY}", text


def end_of_ranks(case: Case, folder: Path, where: str, rank: int, how: str) -> tuple[list[int], list[str], float]:
    """Exit codes of all ranks, what each said on stderr, and seconds from the failure to the last one's end."""
    arguments = (case.write(folder), case, str(folder), where, rank, how)
    place = (__file__, __name__, _fail.__qualname__)
    meeting = testing_ranks.Meeting(str(folder / "store"), 100.0, "gloo")
    processes, _ = testing_ranks._start(place, case.layout, arguments, meeting=meeting)
    try:
        for process in processes:
            process.join(60)
        ended = time.time()
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    texts = [(folder / f"{r}.txt").read_text() for r in range(case.layout.world_size)]
    assert (folder / "failed").exists(), texts
    return codes, texts, ended - float((folder / "failed").read_text())


def _fail(context, path: str, case: Case, folder: str, where: str, rank: int, how: str) -> None:
    """Train on this rank as `Training.run` does, with a ray that hits `rank`; does not return."""
    from internlm_ds.train import failure
    from internlm_ds.verify.training import build_engine, take_steps

    os.dup2(os.open(f"{folder}/{context.rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    first = FirstFailure.of_job(rank=context.rank, world_size=context.layout.world_size)
    failure.watch_peers(first, rank=context.rank)
    try:
        spec, engine, _ = build_engine(context, path)

        def hit() -> None:
            Path(folder, "failed").write_text(str(time.time()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("cosmic ray")

        def between_steps(step: int) -> None:
            if context.rank == rank and where == "loader":
                hit()
            if context.rank == 0 and "0 is stuck" in how:
                threading.Event().wait()

        if context.rank == rank and where != "loader":
            _strike(engine.worker, getattr(words, where), hit, at_once=how.endswith("at once"))
        take_steps(context, spec, engine, case, after_step=between_steps)
    except Exception as error:
        failure.end_process(error, rank=context.rank, first=first)


def _strike(worker, kind: type, hit, *, at_once: bool) -> None:
    """Let the worker fail at an instruction of the first or the second step, its second of the kind if there is one."""
    do, steps = worker._do[kind], {"seen": 0}
    run = worker.run

    def counted(*args, **kwargs):
        steps["seen"] += 1
        steps["of this step"] = 0
        return run(*args, **kwargs)

    def struck(work) -> None:
        steps["of this step"] += 1
        per_step = 1 if kind in (words.ReduceGrads, words.OptimizerStep) else 2
        if steps["seen"] == (1 if at_once else 2) and steps["of this step"] == per_step:
            hit()
        do(work)

    worker.run, worker._do[kind] = counted, struck


def test_the_first_failure_wins_and_is_seen_once():
    store = dist.HashStore()
    one, two = (FirstFailure(store, rank=rank, world_size=2) for rank in range(2))
    expected = Failure(1, "OSError: disk full", 2)
    assert two.report("OSError: disk full", exit_code=2) == expected
    assert one.report("RuntimeError: connection closed", exit_code=1) == expected
    assert one.report("again", exit_code=1) == expected
    started = time.monotonic()
    one.linger()
    assert time.monotonic() - started < 1, "both ranks know"


def test_a_watch_sees_a_failure_and_a_stopped_one_does_not():
    store, seen, told = dist.HashStore(), [], threading.Event()
    quick = {"world_size": 3, "poll_s": 0.01, "grace_s": 0.0}
    watching, stopped, failing = (FirstFailure(store, rank=rank, **quick) for rank in range(3))

    def tell(failure: Failure) -> None:
        seen.append(failure)
        told.set()

    watching.watch(tell)
    stopped.watch(lambda failure: seen.append("stopped"))
    stopped.stop()
    failing.report("KeyError: 'x'", exit_code=1)
    assert told.wait(10) and seen == [Failure(2, "KeyError: 'x'", 1)]
    watching.stop()
    assert seen == [Failure(2, "KeyError: 'x'", 1)]


def test_the_failed_rank_is_there_until_the_others_have_noted_why():
    """Whether a peer learns of it from its watch, or because its own collective breaks first."""
    store, noted = dist.HashStore(), []
    polls = {0: 0.05, 1: 60.0, 2: 60.0}
    ranks = [FirstFailure(store, rank=rank, world_size=3, poll_s=polls[rank], grace_s=60.0) for rank in polls]
    for rank in ranks:
        rank.watch(lambda failure: pytest.fail("within the grace"), note=noted.append)
    _, breaking, failing = ranks
    failure = failing.report("OSError: disk full", exit_code=2)
    assert breaking.report("RuntimeError: connection closed", exit_code=1) == failure
    failing.linger()
    assert noted == [failure, failure], "the failed rank notes nothing of itself"
    for rank in ranks:
        rank.stop()


def test_a_store_that_is_gone_ends_nothing(tmp_path: Path):
    class Gone:
        def clone(self):
            return dist.HashStore()

    first = FirstFailure(Gone(), rank=0, world_size=2, poll_s=0.01)

    class Broken:
        def __getattr__(self, name):
            def fail(*args):
                raise dist.DistNetworkError("connection closed")

            return fail

    first._store = Broken()
    first.watch(lambda failure: pytest.fail("nobody said that a rank failed"))
    first._thread.join(10)
    assert not first._thread.is_alive()
    assert first.report("RuntimeError: connection closed", exit_code=1) == Failure(
        0, "RuntimeError: connection closed", 1
    )
    first.linger()
    first.stop()
