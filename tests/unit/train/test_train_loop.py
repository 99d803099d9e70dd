"""The train loop against a fake engine: what happens for each batch, in which order, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from internlm_ds.errors import ReplicasDifferError, TrainingStoppedError
from internlm_ds.optim.schedules import Beta2Schedule, LrSchedule
from internlm_ds.train.loop import LoopSettings, TrainLoop
from internlm_ds.train.state import TrainState

LR = LrSchedule(base_lr=1.0, total_steps=10, warmup_ratio=0.4)
BETA2 = Beta2Schedule(adam_beta2=0.5, init_beta2=0.9, c=0.8)
TOKENS = 100


@dataclass
class FakeOutcome:
    loss: float
    grad_norm: float | None
    applied: bool


class FakeRun:
    """Engine, loader, checkpoints, recorder and evaluator in one; writes down every call."""

    def __init__(self, *, failing=(), skipped=(), stop_at=None):
        self.failing, self.skipped, self.stop_at = failing, skipped, stop_at
        self.next_index = 0
        self.calls: list[tuple] = []
        self.records: list = []
        self.current_loss_scale = 8.0
        self.now = 0.0

    def next_step(self):
        index, self.next_index = self.next_index, self.next_index + 1
        self.calls.append(("load", index))
        skipped = index in self.skipped
        stats = SimpleNamespace(num_tokens=TOKENS)
        return SimpleNamespace(index=index, micro_batches=[] if skipped else [index], stats=stats, skipped=skipped)

    def set_hyperparameters(self, *, lr, betas):
        self.calls.append(("set", lr, betas))

    def train_step(self, micro_batches):
        (index,) = micro_batches
        self.calls.append(("train", index))
        good = index not in self.failing
        return FakeOutcome(10.0 - index, 0.5 if good else None, good)

    def after_step(self, state, *, applied):
        self.calls.append(("after", state.step_count, applied))
        return state.step_count == self.stop_at

    def final(self, state):
        self.calls.append(("final", state.step_count, state.batch_count))

    def record(self, record):
        self.calls.append(("record", record.batch.index))
        self.records.append(replace(record, state=replace(record.state)))

    def evaluate(self, state):
        self.calls.append(("evaluate", state.step_count))

    def clock(self):
        self.now += 1.0
        return self.now

    def names(self, *wanted):
        return [call for call in self.calls if call[0] in wanted]


def loop_of(fake: FakeRun, *, state=None, total_steps=4, **more):
    settings = {"beta1": 0.8, "data_size": 3, **more.pop("settings", {})}
    return TrainLoop(
        fake,
        fake,
        settings=LoopSettings(total_steps=total_steps, **settings),
        lr=LR,
        beta2=BETA2,
        state=state if state is not None else TrainState(),
        checkpoints=fake,
        step_metrics=lambda: fake.calls.append(("metrics",)) or {"acc": 0.25},
        record=fake.record,
        evaluate=fake.evaluate,
        clock=fake.clock,
        **more,
    )


def test_order_of_a_batch():
    fake = FakeRun()
    loop = loop_of(
        fake,
        total_steps=1,
        settings={"valid_every": 1},
        batch_done=lambda: fake.calls.append(("done",)),
        should_stop=lambda: fake.calls.append(("stop?",)),
    )
    assert loop.run() is True
    order = ["load", "set", "train", "metrics", "record", "evaluate", "after", "done", "stop?", "final"]
    assert [call[0] for call in fake.calls] == order


def test_counters_and_schedules_by_successful_updates():
    fake = FakeRun(failing={1, 2})
    state = TrainState()
    assert loop_of(fake, state=state).run() is True
    assert state == TrainState(batch_count=4, step_count=2, num_consumed_tokens=600, inf_nan_skip_batches=2)
    used = [(lr, beta2) for _, lr, (beta1, beta2) in fake.names("set") if beta1 == 0.8]
    # the failed updates use the rate of the second one again
    assert used == [(LR.at(k), BETA2.at(k)) for k in (0, 1, 1, 1)]
    assert BETA2.at(0) == 0.5 and BETA2.at(1) == 0.9


def test_a_record_holds_what_the_next_update_uses():
    fake = FakeRun(failing={1})
    loop_of(fake, total_steps=3).run()
    first, failed, third = fake.records
    assert (first.lr_used, first.lr_next, first.beta2_next) == (LR.at(0), LR.at(1), BETA2.at(1))
    assert (failed.lr_used, failed.lr_next) == (LR.at(1), LR.at(1))
    assert (third.state.step_count, third.state.inf_nan_skip_batches, third.state.bad_steps_in_a_row) == (2, 1, 0)
    assert failed.state.bad_steps_in_a_row == 1 and failed.outcome.grad_norm is None
    assert first.metrics == {"acc": 0.25} and first.loss_scale == 8.0
    assert (first.started, first.train_started, first.ended) == (1.0, 2.0, 3.0)
    assert failed.started == 4.0, "the clock starts before the batch is loaded"


def test_skipped_batches_are_seen_and_nothing_else():
    fake, state, done = FakeRun(skipped={0, 2}), TrainState(), []
    loop_of(fake, state=state, batch_done=lambda: done.append(state.batch_count)).run()
    assert [call[1] for call in fake.names("load")] == [0, 1, 2, 3]
    assert fake.names("train", "record", "after") == [
        *[("train", 1), ("record", 1), ("after", 1, True)],
        *[("train", 3), ("record", 3), ("after", 2, True)],
    ]
    assert state == TrainState(batch_count=4, step_count=2, num_consumed_tokens=600)
    assert done == [1, 2, 3, 4]
    assert fake.calls[-1] == ("final", 2, 4)


def test_evaluation_once_per_update():
    fake = FakeRun(failing={2, 3}, skipped={4})
    loop_of(fake, total_steps=8, settings={"valid_every": 2}).run()
    assert fake.names("evaluate") == [("evaluate", 2), ("evaluate", 4)]
    never = FakeRun()
    loop_of(never).run()
    assert never.names("evaluate") == []


def test_a_failed_last_step_is_followed_by_a_checkpoint():
    fake = FakeRun(failing={3})
    assert loop_of(fake).run() is True
    assert fake.names("after", "final")[-2:] == [("after", 3, False), ("final", 3, 4)]


def test_stop_file_ends_the_run():
    fake, asked = FakeRun(stop_at=2), []
    assert loop_of(fake, should_stop=lambda: asked.append(1)).run() is False
    assert fake.calls[-2:] == [("after", 2, True), ("final", 2, 2)]
    assert len(asked) == 1, "no rank asks about signals once all know that the run ends"


def test_a_signal_ends_the_run_after_its_batch():
    fake, answers = FakeRun(skipped={1}), iter([False, True])
    assert loop_of(fake, should_stop=lambda: next(answers)).run() is False
    assert fake.calls[-2:] == [("load", 1), ("final", 1, 2)], "asked after a skipped batch, too"


def test_a_stop_at_the_last_batch_is_a_finished_run():
    assert loop_of(FakeRun(), total_steps=1, should_stop=lambda: True).run() is True


def test_guard_saves_and_stops():
    fake, state = FakeRun(failing={1, 2, 3}), TrainState()
    loop = loop_of(fake, state=state, total_steps=9, settings={"max_bad_steps": 2, "valid_every": 1})
    with pytest.raises(TrainingStoppedError) as error:
        loop.run()
    assert error.value.exit_code == 3 and error.value.on_all_ranks
    assert str(error.value) == (
        "2 updates in a row failed (gradients not finite), the last at batch 2; internlm_ds.guard.max_bad_steps = 2 "
        "ends the run. Lower adam.lr, look at the data of these batches, or leave them out with data.skip_batches"
    )
    assert fake.calls[-2:] == [("record", 2), ("final", 1, 3)]
    # what is saved begins a new count: whoever starts again has changed something
    assert state == TrainState(batch_count=3, step_count=1, num_consumed_tokens=300, inf_nan_skip_batches=2)


def test_guard_counts_in_a_row_and_over_a_restart():
    good_between = FakeRun(failing={0, 2, 4})
    assert loop_of(good_between, total_steps=6, settings={"max_bad_steps": 2}).run() is True
    continued = FakeRun(failing={0})
    with pytest.raises(TrainingStoppedError, match=r"^2 updates in a row failed"):
        loop_of(continued, state=TrainState(bad_steps_in_a_row=1), settings={"max_bad_steps": 2}).run()
    off = FakeRun(failing=set(range(9)))
    assert loop_of(off, total_steps=9).run() is True


def test_resume_goes_on_where_the_state_says():
    fake = FakeRun()
    fake.next_index = 6
    state = TrainState.from_json(
        {"batch_count": 6, "step_count": 4, "num_consumed_tokens": 1200, "inf_nan_skip_batches": 1, "sampler": {}}
    )
    assert loop_of(fake, state=state, total_steps=8).run() is True
    assert [lr for _, lr, _ in fake.names("set")] == [LR.at(4), LR.at(5)]
    assert state.to_json() == {
        "batch_count": 8,
        "step_count": 6,
        "num_consumed_tokens": 1800,
        "inf_nan_skip_batches": 1,
        "bad_steps_in_a_row": 0,
    }


def test_a_finished_run_that_is_started_again_saves_at_most():
    fake = FakeRun()
    assert loop_of(fake, state=TrainState(batch_count=4, step_count=4)).run() is True
    assert fake.calls == [("final", 4, 4)]


def test_an_error_of_the_engine_saves_nothing():
    fake = FakeRun()
    fake.train_step = lambda micro_batches: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop_of(fake).run()
    assert fake.names("final") == []


def test_copies_are_compared_before_they_are_saved():
    fake = FakeRun(failing=[1])

    def look():
        fake.calls.append(("look",))
        if len(fake.names("look")) == 2:
            raise ReplicasDifferError("copies differ")

    loop = loop_of(fake, total_steps=9, settings={"drift_every": 2}, check_replicas=look)
    with pytest.raises(ReplicasDifferError):
        loop.run()
    # updates 1 (batch 0), 2 (batch 2), 3, 4 (batch 4); the failed update in between counts for nothing
    assert fake.names("look", "after", "final") == [
        ("after", 1, True),
        ("after", 1, False),
        ("look",),
        ("after", 2, True),
        ("after", 3, True),
        ("look",),
    ]
