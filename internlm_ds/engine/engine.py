"""Our engine: DeepSpeed's `PipelineEngine`, for one stage too, with schedules of our own and its known faults mended.

Its schedules know neither chunks nor zero bubbles, and its messages between neighbours wait for each other: the
instructions come from `schedule` here and are carried out in `instructions`. What stays DeepSpeed's is everything
around them: configuration, optimizer, reduction of gradients, the mean loss of a step.

Mended here: ZeRO-1 over a part of the data-parallel ranks, a loss scale by InternLM's rule. What the optimizer gets
wrong is mended in `optimizer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import deepspeed.runtime.engine as deepspeed_engine
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine

from internlm_ds.engine import sequence_gradients
from internlm_ds.engine.bf16_masters import WeightsAsMasters
from internlm_ds.engine.channels import Channels
from internlm_ds.engine.instructions import StageWorker
from internlm_ds.engine.optimizer import InternlmLossScaler, Verdict, ZeroOptimizer
from internlm_ds.optim.loss_scale import DynamicLossScale
from internlm_ds.schedule.instructions import Instructions
from internlm_ds.schedule.lists import Pipeline

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ZeroGroups:
    """Whom this rank shares optimizer states with, and who holds copies of its share.

    Attributes:
        shard: Ranks over which states are partitioned; None = all of data parallel.
        shard_size: Their number.
        replica: Ranks that hold the same partition; None when there is no other.
        replica_size, replica_rank: Their number and this rank's place among them.
    """

    shard: ProcessGroup | None = None
    shard_size: int = 1
    replica: ProcessGroup | None = None
    replica_size: int = 1
    replica_rank: int = 0


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave.

    Attributes:
        loss: Mean over micro-batches and data-parallel ranks of what was minimised.
        grad_norm: Global norm before clipping, without loss scale; None when the step was not applied.
        verdict: Finite, overflow or NaN: only a finite step is applied.
    """

    loss: float
    grad_norm: float | None
    verdict: Verdict

    @property
    def applied(self) -> bool:
        return self.verdict is Verdict.FINITE


class Engine(PipelineEngine):
    """`PipelineEngine` with the changes above. Built by `engine.build`.

    Args:
        zero_groups: Whom optimizer states are shared with.
        pipeline: How stages take turns.
        channels: To the neighbouring stages; None without any.
        weights_are_masters: Bf16 weights are updated themselves, not fp32 copies of them.
        args, kwargs: `PipelineEngine`'s.
    """

    def __init__(
        self,
        *args: Any,
        zero_groups: ZeroGroups,
        pipeline: Pipeline,
        channels: Channels | None,
        weights_are_masters: bool = False,
        **kwargs: Any,
    ):
        self.zero_groups, self.pipeline, self.weights_are_masters = zero_groups, pipeline, weights_are_masters
        # called with the engine between the last backward pass and the reduction of gradients
        self.on_gradients: Callable[[Engine], None] | None = None
        # what the log says of torch.compile; empty without
        self.compiled = ""
        # seconds of the last step from its first micro-batch to the reduction of gradients
        self.fwd_bwd_seconds = 0.0
        super().__init__(*args, **kwargs)
        self.using_bf16_optimizer = isinstance(self.optimizer, BF16_Optimizer)
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.replica_group = zero_groups.replica
            self.optimizer.replica_size = zero_groups.replica_size
        self._sequence_parallel_parameters = sequence_gradients.split_parameters(self.module)
        self.worker = StageWorker(self, pipeline=pipeline, stage=self.stage_id, channels=channels)

    # ---- what the train loop calls -------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Any]) -> StepOutcome:
        """One optimizer step over `micro_batches`, whose number may differ from the last step's (ramp-up)."""
        if len(micro_batches) != self.micro_batches:
            self.set_train_batch_size(self.micro_batch_size * len(micro_batches) * self.dp_world_size)
        started = time.perf_counter()
        self._gradients_ready = started
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.begin_step()
        loss = self.train_batch(iter(micro_batches))
        self.fwd_bwd_seconds = self._gradients_ready - started
        verdict = self._verdict()
        norm = float(self.get_global_grad_norm()) if verdict is Verdict.FINITE else None
        return StepOutcome(loss=float(loss), grad_norm=norm, verdict=verdict)

    def evaluate_batch(self, micro_batches: Sequence[Any]) -> float:
        """Mean loss of `micro_batches` over data-parallel ranks, in eval mode; the number of micro-batches is free.

        Every rank calls it with the same number. The module is left in training mode.
        """
        loss = float(self.eval_batch(iter(micro_batches), num_micro_batches=len(micro_batches)))
        self.module.train()
        return loss

    def set_hyperparameters(self, *, lr: float, betas: tuple[float, float]) -> None:
        """Learning rate and betas of the next update, for every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = lr, betas

    @property
    def current_loss_scale(self) -> float:
        """Scale of the next step's loss; 1 without loss scaling."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return 1.0 if scaler is None else float(scaler.cur_scale)

    @property
    def loss_scaler(self) -> InternlmLossScaler | None:
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return scaler if isinstance(scaler, InternlmLossScaler) else None

    def install_loss_scale(self, state: DynamicLossScale) -> None:
        """Let InternLM's rule decide the loss scale from now on."""
        self.optimizer.loss_scaler = InternlmLossScaler(state)
        self.optimizer.dynamic_loss_scale = True

    def logical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This stage's parameters by logical name."""
        for param in self.module.parameters():
            yield param.logical_name, param

    # ---- what DeepSpeed calls in train_batch and eval_batch ----------------------------------------------------------

    def _train_schedule(self) -> Instructions:
        return self._current_pipeline.training(self.stage_id, micro_batches=self.micro_batches)

    def _inference_schedule(self, micro_batches: int) -> Instructions:
        return self._current_pipeline.evaluation(self.stage_id, micro_batches=micro_batches)

    @property
    def _current_pipeline(self) -> Pipeline:
        """The first batch tells shapes: nobody can be ready for a message before it knows how large it will be."""
        return self.pipeline if self.worker.shapes_known else replace(self.pipeline, receive_ahead=False)

    def _exec_schedule(self, pipe_schedule: Instructions) -> None:
        """Carry out a batch's instructions; leaves what DeepSpeed makes the mean loss of."""
        at_an_end = self.is_first_stage() or self.is_last_stage()
        data = list(self.data_iterator) if at_an_end else []
        self.fwd_outputs = self.worker.run(pipe_schedule, data, micro_batches=self.micro_batches)
        if self.fwd_outputs:
            self.total_loss = sum(self.fwd_outputs)

    def _exec_reduce_grads(self) -> None:
        self._gradients_ready = time.perf_counter()
        if self._sequence_parallel_parameters:
            sequence_gradients.sum_over_tensor_ranks(self, self._sequence_parallel_parameters)
        if self.on_gradients is not None:
            self.on_gradients(self)
        super()._exec_reduce_grads()

    # ---- mends ----------------------------------------------------------------------------------------------------

    def _verdict(self) -> Verdict:
        if isinstance(self.optimizer, ZeroOptimizer):
            return self.optimizer.verdict
        # BF16_Optimizer keeps one flag; without a loss scale infinity and NaN mean the same: the step is skipped
        return Verdict.OVERFLOW if self.optimizer.overflow else Verdict.FINITE

    def _configure_zero_optimizer(self, optimizer):
        with self._sharded_over_zero_group():
            return super()._configure_zero_optimizer(optimizer)

    def _configure_bf16_optimizer(self, optimizer):
        with self._sharded_over_zero_group():
            return super()._configure_bf16_optimizer(optimizer)

    @contextmanager
    def _sharded_over_zero_group(self) -> Iterator[None]:
        """While the optimizer is made: our classes, and our group in the place of all data-parallel ranks."""
        full_group = self.seq_data_parallel_group
        theirs = deepspeed_engine.DeepSpeedZeroOptimizer, deepspeed_engine.BF16_Optimizer
        if self.zero_groups.shard is not None:
            self.seq_data_parallel_group = self.zero_groups.shard
        deepspeed_engine.DeepSpeedZeroOptimizer = ZeroOptimizer
        if self.weights_are_masters:
            deepspeed_engine.BF16_Optimizer = WeightsAsMasters
        try:
            yield
        finally:
            self.seq_data_parallel_group = full_group
            deepspeed_engine.DeepSpeedZeroOptimizer, deepspeed_engine.BF16_Optimizer = theirs
