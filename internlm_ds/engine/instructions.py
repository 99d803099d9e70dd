"""Carries out a stage's instructions: what `schedule` wrote down happens here to tensors.

Order, and what waits for what, are the schedule's; messages are `channels`'; reducing gradients and updating parameters
are the engine's. Nothing is kept longer than needed: an output belongs to the network once it is sent (only its place
in the autograd graph is remembered), an input is free once its gradient is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch.autograd.graph import GradientEdge, get_gradient_edge

from internlm_ds.attention.segments import Segments
from internlm_ds.engine.channels import ACTIVATION, GRADIENT, Channels, Incoming, MessageSpec, Value, as_tuple
from internlm_ds.errors import LayoutError
from internlm_ds.parallel import deferred
from internlm_ds.parallel.deferred import WeightGrads
from internlm_ds.schedule.instructions import (
    Backward,
    Forward,
    Instruction,
    Load,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    WeightGrad,
    Work,
)
from internlm_ds.schedule.lists import Pipeline

if TYPE_CHECKING:
    from internlm_ds.engine.engine import Engine
    from internlm_ds.engine.module import StageModule

Place = tuple[int, int]  # (micro-batch, chunk)


class _Kept:
    """What a batch's instructions leave for each other, by micro-batch and chunk; empty at its end."""

    def __init__(self) -> None:
        self.inputs: dict[Place, Value] = {}
        self.labels: dict[Place, Value] = {}
        self.outputs: dict[Place, Value] = {}
        self.losses: dict[Place, torch.Tensor] = {}
        self.edges: dict[Place, list[GradientEdge | None]] = {}
        # floating inputs that came from another stage, which waits for their gradients
        self.leaves: dict[Place, list[torch.Tensor]] = {}
        self.coming: dict[Place, Incoming] = {}
        self.coming_grads: dict[Place, Incoming] = {}
        self.weights: dict[Place, list[deferred.Pending]] = {}

    def names(self) -> list[str]:
        """What is not empty."""
        return [name for name, held in vars(self).items() if held]


class StageWorker:
    """One stage at its instructions.

    Args:
        engine: Its module computes, its optimizer is told of backward passes, it reduces and updates.
        pipeline: Of which this is a stage.
        stage: Which.
        channels: To the neighbours; None for a pipeline of one stage.
    """

    def __init__(self, engine: Engine, *, pipeline: Pipeline, stage: int, channels: Channels | None):
        self.engine, self.pipeline, self.stage, self.channels = engine, pipeline, stage, channels
        # shapes of the messages that come into a chunk and that leave it, once they were seen
        self._specs_in: dict[int, MessageSpec] = {}
        self._specs_out: dict[int, MessageSpec] = {}
        # whether all messages' shapes are known: only then can a receive be posted before the one it follows arrives
        self.shapes_known = False
        self._weight_grads = _put_off_weights(engine.module) if pipeline.kind == "zb-h1" else None
        self._kept = _Kept()
        self._data: Sequence[Any] = ()
        self._losses: list[torch.Tensor] = []
        self._num_micro_batches = 0
        self._do: dict[type[Instruction], Callable[[Any], None]] = {
            Load: self._load,
            Forward: self._forward,
            Backward: self._backward,
            WeightGrad: self._weight_grad,
            SendActivation: self._send_activation,
            RecvActivation: self._recv_activation,
            SendGrad: self._send_grad,
            RecvGrad: self._recv_grad,
            ReduceGrads: lambda _: engine._exec_reduce_grads(),
            OptimizerStep: lambda _: engine._exec_optimizer_step(),
        }

    def run(
        self, instructions: Sequence[Instruction], data: Sequence[Any], *, micro_batches: int
    ) -> list[torch.Tensor]:
        """Do all instructions of a batch.

        Args:
            instructions: Of this stage.
            data: `(inputs, labels)` of each micro-batch; used where the model starts and ends only.
            micro_batches: Their number, by which each one's gradient is divided.
        Returns:
            Losses of the micro-batches in the order in which they were computed, `()`; empty before the last stage.
        Raises:
            LayoutError: A message does not look like the first one of its chunk.
        """
        self._kept, self._data, self._losses = _Kept(), data, []
        self._num_micro_batches = micro_batches
        for instruction in instructions:
            self._do[type(instruction)](instruction)
        if self.channels is not None:
            self.channels.finish()
        assert not self._kept.names(), f"the schedule left something behind: {self._kept.names()}"
        self._data, self.shapes_known = (), True
        return self._losses

    # ---- passes ----------------------------------------------------------------------------------------------------

    def _load(self, work: Load) -> None:
        inputs, labels = self._data[work.micro_batch]
        if self.pipeline.is_first(self.stage, work.chunk):
            self._kept.inputs[_place(work)] = moved = _on_device(inputs, self.engine.device)
            _keep_borders(as_tuple(moved), as_tuple(inputs))
        if self.pipeline.is_last(self.stage, work.chunk):
            self._kept.labels[_place(work)] = _on_device(labels, self.engine.device)

    def _forward(self, work: Forward) -> None:
        place, module = _place(work), self.engine.module
        if place in self._kept.coming:
            self._arrive(place)
        outputs = module(self._kept.inputs.pop(place), work.chunk)
        if not self.pipeline.is_last(self.stage, work.chunk):
            self._kept.outputs[place] = outputs
            return
        loss = outputs if module.loss_fn is None else module.loss_fn(outputs, self._kept.labels.pop(place))
        self._losses.append(loss.detach())
        if torch.is_grad_enabled():
            self._kept.losses[place] = loss

    def _backward(self, work: Backward) -> None:
        engine, place = self.engine, _place(work)
        names = [*engine.engine_timers.backward_timers, *engine.engine_timers.backward_inner_timers]
        engine._start_timers(names)
        engine.optimizer.backward_prologue()
        if self.pipeline.is_last(self.stage, work.chunk):
            loss = self._kept.losses.pop(place) / self._num_micro_batches
            engine.optimizer.scale_if_loss(loss).backward()
        else:
            grads = self._kept.coming_grads.pop(place).wait()
            self.channels.arrived((ACTIVATION, place))  # a gradient came back: the activation is there
            edges = self._kept.edges.pop(place)
            used = [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if edge is not None]
            torch.autograd.backward([edge for edge, _ in used], [grad for _, grad in used])
        engine.optimizer.backward_epilogue()
        if self._weight_grads is not None:
            self._kept.weights[place] = self._weight_grads.take()
        engine._stop_timers(names)

    def _weight_grad(self, work: WeightGrad) -> None:
        optimizer = self.engine.optimizer
        optimizer.backward_prologue()
        deferred.accumulate(self._kept.weights.pop(_place(work)))
        _hand_over(optimizer)

    # ---- messages --------------------------------------------------------------------------------------------------

    def _send_activation(self, work: SendActivation) -> None:
        place = _place(work)
        outputs = self._kept.outputs.pop(place)
        self._announce(work.chunk, MessageSpec.of(outputs))
        tensors = as_tuple(outputs)
        self.channels.send(ACTIVATION, tensors, key=(ACTIVATION, place))
        if torch.is_grad_enabled():
            floating = [t for t in tensors if t.is_floating_point()]
            self._kept.edges[place] = [get_gradient_edge(t) if t.requires_grad else None for t in floating]

    def _announce(self, chunk: int, spec: MessageSpec) -> None:
        """Before a chunk's first message, say what its messages look like."""
        known = self._specs_out.get(chunk)
        if known is None:
            self._specs_out[chunk] = spec
            self.channels.send_spec(ACTIVATION, spec)
        elif known != spec:
            raise LayoutError(
                f"stage {self.stage} would send {spec.tensors}, but all messages of a run look like its first: "
                f"{known.tensors}; give every micro-batch the same length"
            )

    def _recv_activation(self, work: RecvActivation) -> None:
        spec = self._specs_in.get(work.chunk)
        if spec is None:
            spec = self._specs_in[work.chunk] = self.channels.receive_spec(ACTIVATION)
        self._kept.coming[_place(work)] = self.channels.receive(ACTIVATION, spec)

    def _arrive(self, place: Place) -> None:
        """Turn an awaited activation into a chunk's input."""
        tensors = self._kept.coming.pop(place).wait()
        if torch.is_grad_enabled():
            self._kept.leaves[place] = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        self._kept.inputs[place] = tensors[0] if self._specs_in[place[1]].bare else tensors

    def _send_grad(self, work: SendGrad) -> None:
        place = _place(work)
        leaves = self._kept.leaves.pop(place)
        # the other side waits for every one, also for what these layers did not use
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        self.channels.send(GRADIENT, grads, key=(GRADIENT, place))

    def _recv_grad(self, work: RecvGrad) -> None:
        spec = self._specs_out[work.chunk].gradient
        self._kept.coming_grads[_place(work)] = self.channels.receive(GRADIENT, spec)


def _place(work: Work) -> Place:
    return work.micro_batch, work.chunk


def _on_device(value: Any, device: torch.device) -> Value:
    if torch.is_tensor(value):
        return value.to(device)
    return tuple(tensor.to(device) for tensor in value)


def _keep_borders(moved: Sequence[torch.Tensor], host: Sequence[torch.Tensor]) -> None:
    """Attention reads the borders of segments on the host: from where they came, without waiting for a device."""
    match moved, host:
        case (_, there), (_, here) if here is not there and here.dtype is torch.int32 and here.dim() == 1:
            Segments.know(there, here)


def _put_off_weights(module: StageModule) -> WeightGrads:
    """Let the linear layers of blocks leave their weight gradients to `WeightGrad`.

    The head, which is a linear layer itself, does not: to wait it would keep gradients as wide as the vocabulary.
    """
    weight_grads = WeightGrads()
    for entry in module.forward_funcs:
        for layer in entry.modules():
            if layer is not entry and hasattr(layer, "weight_grads"):
                layer.weight_grads = weight_grads
    return weight_grads


def _hand_over(optimizer: Any) -> None:
    """Add gradients that autograd did not compute to the optimizer's sums, as its hooks do with those that it did."""
    if not (isinstance(optimizer, BF16_Optimizer) and optimizer.immediate_grad_update):
        optimizer.backward_epilogue()
        return
    for i, group in enumerate(optimizer.bf16_groups):
        for j, parameter in enumerate(group):
            if parameter.grad is not None:
                optimizer.accumulate_hp_grads_and_remove_lp(parameter, i, j)
