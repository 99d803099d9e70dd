"""DeepSpeed's ZeRO-1 optimizer with four of its habits mended.

* One verdict on a step's gradients, the same on every rank, for every precision: finite, infinite (an overflow) or NaN.
  DeepSpeed folds the last two into one flag; InternLM's loss scale backs off on the first only.
* The loss scale changes after the update that used it. DeepSpeed changes it before it unscales, so that the step at
  which the scale grows would be divided by twice its own scale.
* Gradients lie in one flat tensor where that is possible (`flat_gradients`), in place of three copies at each step.
* Sharding over a part of the data-parallel ranks: gradients are averaged over the ZeRO group, then this rank's
  partition over its replicas.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import torch
from deepspeed import comm as dist
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from internlm_ds.engine.flat_gradients import FlatGradients, possible
from internlm_ds.optim.loss_scale import DynamicLossScale

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Verdict(enum.Enum):
    """What the global gradient norm says about a step."""

    FINITE = "finite"
    OVERFLOW = "overflow"
    NAN = "nan"

    @classmethod
    def of(cls, norm: float) -> Verdict:
        """Verdict on a norm that was not masked."""
        if norm != norm:
            return cls.NAN
        return cls.OVERFLOW if norm == float("inf") else cls.FINITE


class InternlmLossScaler(LossScalerBase):
    """InternLM's rule in the shape DeepSpeed expects; the numbers live in a `DynamicLossScale`.

    DeepSpeed calls `update_scale` in the middle of a step; the update happens in `after_step` instead.
    """

    def __init__(self, state: DynamicLossScale):
        super().__init__(float(state.scale))
        self.state = state
        self.dynamic = True

    def update_scale(self, overflow: bool) -> None:
        pass

    def after_step(self, verdict: Verdict) -> None:
        """InternLM counts a NaN as a good step and backs off on infinity alone."""
        self.state.update(verdict is Verdict.OVERFLOW)
        self.refresh()

    def refresh(self) -> None:
        """Take over the scale after `state` was changed from outside (a checkpoint)."""
        self.cur_scale = float(self.state.scale)


class ZeroOptimizer(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with the mends above. `replica_group` is set by the engine before the first step."""

    replica_group: ProcessGroup | None = None
    replica_size: int = 1
    verdict: Verdict = Verdict.FINITE
    _norm: torch.Tensor | None = None
    _flat: FlatGradients | None = None

    def begin_step(self) -> None:
        """Before the first backward pass of a step."""
        if self._flat is None and possible(self):
            self._flat = FlatGradients(self)
        if self._flat is not None:
            self._flat.attach()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        if self._flat is not None and self._flat.attached:
            self.averaged_gradients.update(enumerate(self._flat.reduce()))
        else:
            super().reduce_gradients(pipeline_parallel)
        if self.replica_size > 1:
            for partition in self.averaged_gradients.values():
                for grad in partition or ():
                    dist.all_reduce(grad, group=self.replica_group)
                    grad.div_(self.replica_size)

    def step(self, closure=None) -> None:
        self._norm = self._raw_global_norm()
        self.verdict = Verdict.of(float(self._norm))
        super().step(closure)
        self._norm = None
        if isinstance(self.loss_scaler, InternlmLossScaler):
            self.loss_scaler.after_step(self.verdict)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        self.overflow = self.verdict is not Verdict.FINITE

    def scaled_global_norm(self, norm_type: float = 2) -> torch.Tensor:
        assert norm_type == 2 and self._norm is not None, "the norm is computed once, at the start of step()"
        # a negative norm is DeepSpeed's word for "not finite": it skips the step, in fp32 too
        return self._norm if self.verdict is Verdict.FINITE else torch.full_like(self._norm, -1.0)

    @torch.no_grad()
    def _raw_global_norm(self) -> torch.Tensor:
        """Norm of all gradients, still loss-scaled, fp32 `()`; infinity and NaN survive. One number on all ranks."""
        if self.cpu_offload:
            return self._offloaded_global_norm()
        grads: list[torch.Tensor] = []
        for i in range(len(self.bit16_groups)):
            own = (g for g in self.averaged_gradients[i] if not getattr(g, "_zero_padding", False))
            grads.extend(g for g, p in zip(own, self.params_in_partition[i]) if self._counts_here(p))
        squares = torch.zeros((), dtype=torch.float32, device=self.device)
        if grads:
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
            squares = norms.square().sum().to(self.device)
        dist.all_reduce(squares, group=self.dp_process_group)
        self._model_parallel_all_reduce(tensor=squares, op=dist.ReduceOp.SUM)
        return squares.sqrt()

    def _offloaded_global_norm(self) -> torch.Tensor:
        """With the optimizer on the host DeepSpeed keeps one flag for what is not finite: it counts as an overflow."""
        if self.has_overflow():
            return torch.full((), float("inf"), device=self.device)
        norm = super().scaled_global_norm()
        return torch.where(norm < 0, torch.full_like(norm, float("inf")), norm)

    def _counts_here(self, param: torch.nn.Parameter) -> bool:
        """A parameter that several ranks hold is counted once."""
        if getattr(param, "ds_pipe_replicated", False):
            return False
        return is_model_parallel_parameter(param) or self.model_parallel_rank == 0
