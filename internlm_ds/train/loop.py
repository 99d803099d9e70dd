"""The train loop: what happens for each batch, in InternLM's order, over anything that looks like an engine.

load → skip test → forward, backward, update → counters → metrics and log → guards → evaluation → checkpoint → stop
test. Knows neither DeepSpeed nor files: engine, loader, recorder, evaluator and checkpoints come in through the small
protocols below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from internlm_ds.errors import TrainingStoppedError
from internlm_ds.optim.schedules import Beta2Schedule, LrSchedule
from internlm_ds.train.state import TrainState


class Outcome(Protocol):
    """What a step gave; see `engine.StepOutcome`."""

    loss: float
    grad_norm: float | None

    @property
    def applied(self) -> bool: ...


class Engine(Protocol):
    """The part of the engine that the loop uses."""

    @property
    def current_loss_scale(self) -> float: ...

    def train_step(self, micro_batches: Sequence[Any]) -> Outcome: ...

    def set_hyperparameters(self, *, lr: float, betas: tuple[float, float]) -> None: ...


class Loader(Protocol):
    """Gives the batches; see `data.loader.TrainLoader`."""

    def next_step(self) -> Any: ...


class Checkpoints(Protocol):
    """Saves when it is time to."""

    def after_step(self, state: TrainState, *, applied: bool) -> bool:
        """Save if due; True when the run shall stop here."""

    def final(self, state: TrainState) -> None:
        """Save what was not saved yet, at the end of the run."""


@dataclass
class StepRecord:
    """Everything that is known of a trained batch, for the recorder."""

    batch: Any
    outcome: Outcome
    state: TrainState
    lr_used: float
    lr_next: float
    beta2_next: float
    loss_scale: float
    started: float
    train_started: float
    ended: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopSettings:
    """Plain values of the loop.

    Attributes:
        total_steps: Batches of the run; the loop ends at this batch index.
        beta1: Adam's first beta.
        data_size: Data-parallel ranks: tokens of a step are this rank's times them.
        valid_every: Evaluate after this many updates; 0 = never.
        max_bad_steps: Failed updates in a row that end the run; 0 = never.
        drift_every: Compare the ranks' copies after this many updates; 0 = never.
    """

    total_steps: int
    beta1: float
    data_size: int = 1
    valid_every: int = 0
    max_bad_steps: int = 0
    drift_every: int = 0


class TrainLoop:
    """Runs batches `state.batch_count … total_steps - 1`.

    Args:
        engine, loader, checkpoints: As the protocols say.
        lr, beta2: Schedules by number of successful updates.
        state: Counters; changed in place.
        step_metrics: Called after each step on every rank (it may communicate), gives the metric values.
        record: Called after each step with a `StepRecord`.
        evaluate: Called with the state when an evaluation is due.
        should_stop: Asked after each batch on every rank, with one answer for all: a signal arrived.
        batch_done: Called after each batch, skipped or not.
        check_replicas: Called when the ranks' copies of the parameters are to be compared; raises if they differ.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        *,
        settings: LoopSettings,
        lr: LrSchedule,
        beta2: Beta2Schedule,
        state: TrainState,
        checkpoints: Checkpoints,
        step_metrics: Callable[[], Mapping[str, Any]],
        record: Callable[[StepRecord], None],
        evaluate: Callable[[TrainState], None],
        should_stop: Callable[[], bool] = lambda: False,
        batch_done: Callable[[], None] = lambda: None,
        check_replicas: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.engine, self.loader, self.settings = engine, loader, settings
        self.lr, self.beta2, self.state = lr, beta2, state
        self.checkpoints, self.step_metrics, self.record = checkpoints, step_metrics, record
        self.evaluate, self.should_stop, self.batch_done, self.clock = evaluate, should_stop, batch_done, clock
        self.check_replicas = check_replicas

    def run(self) -> bool:
        """Train to the end, a stop request or the guard.

        Returns:
            True when the run reached `total_steps`, False when it was asked to stop before.
        Raises:
            TrainingStoppedError: Too many failed updates in a row; a last checkpoint is saved before.
            ReplicasDifferError: Copies of a parameter differ between ranks; nothing is saved.
        """
        try:
            while self.state.batch_count < self.settings.total_steps:
                stop_requested = self._one_batch()
                self.batch_done()
                if stop_requested or self.should_stop():
                    break
        except TrainingStoppedError:
            # whoever starts the run again has changed something: the count begins anew
            self.state.bad_steps_in_a_row = 0
            self.checkpoints.final(self.state)
            raise
        self.checkpoints.final(self.state)
        return self.state.batch_count >= self.settings.total_steps

    def _one_batch(self) -> bool:
        """Train one batch; True when the run shall stop."""
        started = self.clock()
        batch = self.loader.next_step()
        self.state.batch_count = batch.index + 1
        if batch.skipped:
            return False
        applied = self._train(batch, started)
        self._guard()
        if applied and self.settings.drift_every > 0 and self.state.step_count % self.settings.drift_every == 0:
            self.check_replicas()  # before a checkpoint would keep what has drifted
        every = self.settings.valid_every
        if applied and every > 0 and self.state.step_count % every == 0:
            self.evaluate(self.state)
        return self.checkpoints.after_step(self.state, applied=applied)

    def _train(self, batch: Any, started: float) -> bool:
        state, updates = self.state, self.state.step_count
        lr_used = self.lr.at(updates)
        self.engine.set_hyperparameters(lr=lr_used, betas=(self.settings.beta1, self.beta2.at(updates)))
        train_started = self.clock()
        outcome = self.engine.train_step(batch.micro_batches)
        if outcome.applied:
            state.step_count += 1
            state.num_consumed_tokens += batch.stats.num_tokens * self.settings.data_size
            state.bad_steps_in_a_row = 0
        else:
            state.inf_nan_skip_batches += 1
            state.bad_steps_in_a_row += 1
        metrics = self.step_metrics()
        self.record(
            StepRecord(
                batch=batch,
                outcome=outcome,
                state=state,
                lr_used=lr_used,
                lr_next=self.lr.at(state.step_count),
                beta2_next=self.beta2.at(state.step_count),
                loss_scale=self.engine.current_loss_scale,
                started=started,
                train_started=train_started,
                ended=self.clock(),
                metrics=metrics,
            )
        )
        return outcome.applied

    def _guard(self) -> None:
        limit, bad = self.settings.max_bad_steps, self.state.bad_steps_in_a_row
        if limit and bad >= limit:
            raise TrainingStoppedError(
                f"{bad} updates in a row failed (gradients not finite), the last at batch "
                f"{self.state.batch_count - 1}; internlm_ds.guard.max_bad_steps = {limit} ends the run. "
                "Lower adam.lr, look at the data of these batches, or leave them out with data.skip_batches"
            )
