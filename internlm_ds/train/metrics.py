"""The loss function of the last stage, with the counting of tokens beside it, and a step's record as one dictionary.

Which numbers a step shows, under which names, is decided here; adding them over ranks is `model.metrics`', formatting
`monitor.log`'s, files `monitor.sinks`'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from internlm_ds.model.loss import chunked_cross_entropy, cross_entropy
from internlm_ds.model.metrics import TokenMetrics
from internlm_ds.monitor import log, memory
from internlm_ds.monitor.throughput import ThroughputMeter
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.parallel.linear_cross_entropy import PendingLogits
from internlm_ds.train.loop import StepRecord

IGNORED = -100  # the label of a position without a target


class StageLoss:
    """`loss_fn` of the pipeline: logits and `(labels, type_ids)` to the loss of one micro-batch; counts on the way.

    A head that leaves its product to the loss is computed in chunks, whose tokens are counted in the same pass.

    Args:
        label_smoothing: As `model.loss.cross_entropy`.
        dataset_types: Names in the order of type ids.
        context: Sums are added over its data axis.
        vocab_size: Whole size of the vocabulary that logits are split along over the tensor axis (`parallel_output`);
            None: every rank has whole logits.
    """

    def __init__(
        self,
        *,
        label_smoothing: float,
        dataset_types: Sequence[str],
        context: ParallelContext,
        vocab_size: int | None = None,
    ):
        self.label_smoothing, self.context = label_smoothing, context
        self.is_last_stage = context.pipe.rank == context.pipe.size - 1
        self._vocabulary: dict[str, Any] = (
            {} if vocab_size is None else {"tensor": context.tensor, "vocab_size": vocab_size}
        )
        self._training = TokenMetrics(dataset_types, device=context.device, **self._vocabulary)
        self._validation = TokenMetrics((), device=context.device, **self._vocabulary)
        self._evaluating = False

    def __call__(self, logits: torch.Tensor | PendingLogits, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        targets, type_ids = labels
        if isinstance(logits, PendingLogits):
            return self._in_chunks(logits, targets, type_ids)
        if self._evaluating:
            self._validation.update(logits, targets)
            return self._loss(logits, targets)
        self._training.update(logits, targets, type_ids)
        # unpacked data has micro-batches without a sample: their mean over no target would make the step's loss NaN;
        # they count 0, with a gradient of 0 (labels that are never -100 keep NaN out of the backward pass)
        has_targets = (targets != IGNORED).any()
        return self._loss(logits, torch.where(has_targets, targets, 0)) * has_targets

    def _in_chunks(self, pending: PendingLogits, targets: torch.Tensor, type_ids: torch.Tensor) -> torch.Tensor:
        loss, tokens = chunked_cross_entropy(pending, targets, label_smoothing=self.label_smoothing)
        if self._evaluating:
            self._validation.update_from(tokens, targets)
            return loss
        self._training.update_from(tokens, targets, type_ids)
        return torch.where((targets != IGNORED).any(), loss, 0.0)  # as above: 0, with a gradient of 0

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets, label_smoothing=self.label_smoothing, **self._vocabulary)

    def finish_step(self) -> dict[str, Any]:
        """Metrics since the last call; empty on stages without logits. Collective over the last stage's data axis."""
        return dict(self._training.finish(self.context.data.group)) if self.is_last_stage else {}

    @contextmanager
    def validating(self) -> Iterator[Callable[[], Mapping[str, Any]]]:
        """Count what happens inside apart from training; gives the function that closes the count."""
        self._evaluating = True
        try:
            yield lambda: self._validation.finish(self.context.data.group) if self.is_last_stage else {}
        finally:
            self._evaluating = False


# the keys of the tutorial's log line, in its order, by their names in metrics.jsonl; the rest of a record follows
_SHORT_NAMES = {long: short for short, long in log.LONG_NAMES.items()}
TUTORIAL_KEYS = [_SHORT_NAMES.get(key, key) for key in log.LINE_KEYS]


class RecordBuilder:
    """Turns a `StepRecord` into the dictionary that the log line and metrics.jsonl show.

    Args:
        meter: Throughput since the run's start.
        data_size: Data-parallel ranks.
        peak_flops: Of one device, per second; None when unknown: `mfu` and `hfu` are None then.
        recompute_fraction: Share of blocks whose forward runs twice; `hfu` counts it.
        fwd_bwd_seconds: Gives the time that the last step spent before its gradients were reduced.
    """

    def __init__(
        self,
        *,
        meter: ThroughputMeter,
        data_size: int,
        peak_flops: float | None,
        model_flops_per_step: float,
        hardware_flops_per_step: float,
        world_size: int,
        micro_num: int,
        fwd_bwd_seconds: Callable[[], float],
    ):
        self.meter, self.data_size, self.peak_flops = meter, data_size, peak_flops
        self.model_flops, self.hardware_flops = model_flops_per_step, hardware_flops_per_step
        self.world_size, self.micro_num, self.fwd_bwd_seconds = world_size, micro_num, fwd_bwd_seconds

    def __call__(self, r: StepRecord) -> dict[str, Any]:
        seconds = r.ended - r.started
        speed = self.meter.record(tokens=r.batch.stats.num_tokens * self.data_size, seconds=seconds)
        stats, state = r.batch.stats, r.state
        values: dict[str, Any] = {
            "step": r.batch.index,
            "loss": r.outcome.loss,
            "lr": r.lr_next,
            "loss_scale": r.loss_scale,
            "grad_norm": r.outcome.grad_norm,
            "micro_num": len(r.batch.micro_batches),
            "num_consumed_tokens": state.num_consumed_tokens,
            "inf_nan_skip_batches": state.inf_nan_skip_batches,
            "num_samples_in_batch": stats.num_samples,
            "largest_length": stats.largest_length,
            "largest_batch": stats.largest_batch,
            "smallest_batch": stats.smallest_batch,
            "adam_beta2": r.beta2_next,
            "fwd_bwd_time": round(self.fwd_bwd_seconds(), 2),
            **speed,
            **self._utilisation(seconds, share=len(r.batch.micro_batches) / self.micro_num),
            **r.metrics,
            "step_count": state.step_count,
            "lr_used": r.lr_used,
            "update_applied": r.outcome.applied,
            "time": time.time(),
            "step_time": seconds,
            "memory_allocated_peak": memory.peak_allocated_bytes(),
        }
        return {**{key: values[key] for key in TUTORIAL_KEYS}, **values}

    def _utilisation(self, seconds: float, *, share: float) -> dict[str, float | None]:
        """Model and hardware flops utilisation, 0 to 1; `share` is the step's part of a full one during ramp-up."""
        if self.peak_flops is None:
            return {"mfu": None, "hfu": None}
        available = seconds * self.world_size * self.peak_flops
        return {"mfu": self.model_flops * share / available, "hfu": self.hardware_flops * share / available}


# dense fp16/bf16 peak of one device in flops per second, by a word of its name; from the vendors' data sheets
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "A800": 312e12, "H800": 989e12}


def device_peak_flops(device: torch.device) -> float | None:
    """Peak of the device in half precision; None when it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_FLOPS.items() if all(part in name for part in word.split())), None)
