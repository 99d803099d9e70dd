"""The layer list as a DeepSpeed `PipelineModule`: our own stage bounds, layers built only where they live.

Which layers a stage holds is decided on paper by `layout.stages`; how a layer is made, by its `LayerEntry`. What a
stage recomputes follows InternLM: the first `int(blocks of the stage * fraction)` blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn as nn
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology

from internlm_ds.layout.ranks import Layout
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
    """A `PipelineModule` whose stage bounds were decided elsewhere.

    Args:
        entries: The whole model's layers, in order.
        bounds: For each stage `(start, stop)` into `entries`.
        recompute_fraction: Share of each stage's blocks whose activations are recomputed, 0 to 1.
        layout: Ranks along each axis.
        loss_fn: `(outputs, labels) -> scalar`, called on the last stage.
    """

    def __init__(
        self,
        entries: Sequence[LayerEntry],
        *,
        bounds: Sequence[tuple[int, int]],
        recompute_fraction: float,
        layout: Layout,
        loss_fn: Callable,
    ):
        object.__setattr__(self, "_bounds", tuple(bounds))
        recomputed = recomputed_entries(entries, bounds, fraction=recompute_fraction)
        super().__init__(
            [EntrySpec(entry, recompute=i in recomputed) for i, entry in enumerate(entries)],
            topology=ProcessTopology(axes=["pipe", "data", "model"], dims=[layout.pipe, layout.data, layout.tensor]),
            loss_fn=loss_fn,
        )

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = [self._bounds[0][0], *(stop for _, stop in self._bounds)]
        self._set_bounds(*self._bounds[self.stage_id])


def recomputed_entries(
    entries: Sequence[LayerEntry], bounds: Sequence[tuple[int, int]], *, fraction: float
) -> frozenset[int]:
    """Indices of the entries whose activations are recomputed: the first blocks of each stage."""
    chosen: set[int] = set()
    for start, stop in bounds:
        blocks = [i for i in range(start, stop) if entries[i].is_block]
        chosen.update(blocks[: num_recomputed(len(blocks), fraction)])
    return frozenset(chosen)
