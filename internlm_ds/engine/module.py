"""The layer list as a DeepSpeed `PipelineModule`: our own stage bounds and chunks, layers built only where they live.

Which layers a stage holds is decided on paper by `layout.stages`; how a layer is made, by its `LayerEntry`. What a
stage recomputes follows InternLM: the first `int(blocks of the chunk * fraction)` blocks of each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology

from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.stages import StageBounds
from internlm_ds.model.layers import LayerEntry, num_recomputed


class EntrySpec(LayerSpec):
    """A `LayerEntry` as DeepSpeed's promise of a layer."""

    def __init__(self, entry: LayerEntry, *, recompute: bool):
        super().__init__(nn.Module)
        self.entry, self.recompute = entry, recompute

    def __repr__(self) -> str:
        return f"EntrySpec({self.entry.prefix}, recompute={self.recompute})"

    def build(self, log: bool = False) -> nn.Module:
        return self.entry.build(self.recompute)


class StageModule(PipelineModule):
    """A `PipelineModule` whose stage bounds were decided elsewhere, and whose stages may hold several chunks.

    Args:
        entries: The whole model's layers, in order.
        bounds: `[stage][chunk] -> (start, stop)` into `entries`.
        recompute_fraction: Share of each chunk's blocks whose activations are recomputed, 0 to 1.
        layout: Ranks along each axis.
        loss_fn: `(outputs, labels) -> scalar`, called where the model ends.

    Attributes:
        chunks: The layers of each chunk. On a single stage they follow one another, so they are one.
    """

    def __init__(
        self,
        entries: Sequence[LayerEntry],
        *,
        bounds: StageBounds,
        recompute_fraction: float,
        layout: Layout,
        loss_fn: Callable,
    ):
        object.__setattr__(self, "_stage_bounds", bounds)
        object.__setattr__(self, "chunks", [])
        recomputed = recomputed_entries(entries, bounds, fraction=recompute_fraction)
        super().__init__(
            [EntrySpec(entry, recompute=i in recomputed) for i, entry in enumerate(entries)],
            topology=ProcessTopology(axes=["pipe", "data", "model"], dims=[layout.pipe, layout.data, layout.tensor]),
            loss_fn=loss_fn,
        )

    def forward(self, inputs: Any, chunk: int = 0) -> Any:
        """The output of one chunk: what the next one takes, or the model's."""
        for layer in self.chunks[chunk]:
            inputs = layer(inputs)
        return inputs

    def _partition_layers(self, method: str = "uniform") -> None:
        runs = self._stage_bounds[self.stage_id]
        self.parts = [self._stage_bounds[0][0][0], *(stage[-1][1] for stage in self._stage_bounds)]
        self._set_bounds(runs[0][0], runs[-1][1])

    def _build(self) -> None:
        whole = self._local_start, self._local_stop
        for start, stop in self._stage_bounds[self.stage_id]:
            before = len(self.forward_funcs)
            self._set_bounds(start, stop)
            super()._build()
            self.chunks.append(self.forward_funcs[before:])
        if self.num_stages == 1:
            self.chunks[:] = [self.forward_funcs]
        self._set_bounds(*whole)

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that holds a layer."""
        for stage, runs in enumerate(self._stage_bounds):
            if any(start <= layer_idx < stop for start, stop in runs):
                return stage
        raise AssertionError(f"layer {layer_idx} is on no stage: {self._stage_bounds}")


def recomputed_entries(entries: Sequence[LayerEntry], bounds: StageBounds, *, fraction: float) -> frozenset[int]:
    """Indices of the entries whose activations are recomputed: the first blocks of each chunk."""
    chosen: set[int] = set()
    for start, stop in (run for stage in bounds for run in stage):
        blocks = [i for i in range(start, stop) if entries[i].is_block]
        chosen.update(blocks[: num_recomputed(len(blocks), fraction)])
    return frozenset(chosen)
