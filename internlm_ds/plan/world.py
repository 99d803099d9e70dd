"""How many processes a configuration needs at least. What so many processes are laid out as is `layout`'s."""

from __future__ import annotations

from internlm_ds.config.schema import ParallelConfig


def smallest_world_size(parallel: ParallelConfig) -> int:
    """Processes for one data-parallel rank, or for as many as share optimizer states when `zero1` names a number.

    >>> from internlm_ds.config.schema import PipelineConfig, Zero1Config
    >>> smallest_world_size(ParallelConfig(zero1=Zero1Config(8), pipeline=PipelineConfig(2)))
    16
    """
    return max(1, parallel.pipeline.size) * max(1, parallel.tensor.size) * max(1, parallel.zero1.size)
