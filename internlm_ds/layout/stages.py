"""Which layers a pipeline stage holds: the uniform partition of InternLM or borders that a user gives, over blocks and
over the whole layer list.

Ranks are `ranks`'; turning a stage's layers into modules is `engine`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from internlm_ds.arch.spec import ModelArch
from internlm_ds.errors import LayoutError, Problem
from internlm_ds.layout.ranks import Layout, divisors

StageBounds = tuple[tuple[tuple[int, int], ...], ...]


def partition_uniform(num_layers: int, *, pipe: int, chunks: int = 1) -> list[list[tuple[int, int]]]:
    """Bounds of the blocks of each stage, one `(start, stop)` per chunk.

    The layers are cut into `chunks` equal runs; each run of n layers gives every stage `n // pipe`, and the *last*
    `n % pipe` stages one more.

    Returns:
        `[stage][chunk] -> (start, stop)`.
    Raises:
        LayoutError: `chunks` does not divide the layers, or a stage would get none.
    Source: InternEvo `partition_uniform`.

    >>> partition_uniform(10, pipe=4)
    [[(0, 2)], [(2, 4)], [(4, 7)], [(7, 10)]]
    """
    problem = _why_not(num_layers, pipe=pipe, chunks=chunks)
    if problem:
        raise LayoutError(problem)
    run = num_layers // chunks
    base, rest = divmod(run, pipe)
    parts: list[list[tuple[int, int]]] = [[] for _ in range(pipe)]
    for chunk in range(chunks):
        start = chunk * run
        for stage in range(pipe):
            stop = start + base + (1 if stage >= pipe - rest else 0)
            parts[stage].append((start, stop))
            start = stop
    return parts


def partition_at(borders: Sequence[int], *, pipe: int, chunks: int = 1) -> list[list[tuple[int, int]]]:
    """Bounds of the blocks of each stage where a user cuts them (`internlm_ds.pipeline_bounds`).

    Args:
        borders: `pipe * chunks + 1` rising numbers from 0 to the number of layers, in order of computation: all stages'
            first chunks, then all stages' second chunks, ….
    Returns:
        `[stage][chunk] -> (start, stop)`, as `partition_uniform`.
    Raises:
        LayoutError: Too many borders or too few, or a chunk without a layer.

    >>> partition_at([0, 1, 2, 4, 6], pipe=2, chunks=2)
    [[(0, 1), (2, 4)], [(1, 2), (4, 6)]]
    """
    count = pipe * chunks
    runs = list(pairwise(borders))
    if len(runs) != count or borders[0] != 0 or any(start >= stop for start, stop in runs):
        raise LayoutError(
            f"{list(borders)} does not cut the layers into {count} runs for {pipe} stage(s) of {chunks} chunk(s): "
            f"write {count + 1} rising numbers that start with 0"
        )
    return [[runs[chunk * pipe + stage] for chunk in range(chunks)] for stage in range(pipe)]


def stage_layers(arch: ModelArch, layout: Layout, *, borders: Sequence[int] | None = None) -> StageBounds:
    """Bounds of each stage over `arch.layers` (embedding, blocks, norm, head), one `(start, stop)` per chunk.

    Blocks are divided by `partition_at` where borders are given, else by `partition_uniform`; what comes before the
    first block goes with it, what comes after the last block with that one.

    Returns:
        `[stage][chunk] -> (start, stop)`; together the bounds cover every layer once.
    Raises:
        LayoutError: As `partition_at` and `partition_uniform`.
    """
    blocks = [index for index, layer in enumerate(arch.layers) if layer.kind == "block"]
    first, count, total = blocks[0], len(blocks), len(arch.layers)
    if borders is None:
        parts = partition_uniform(count, pipe=layout.pipe, chunks=layout.chunks)
    else:
        parts = partition_at(borders, pipe=layout.pipe, chunks=layout.chunks)
    return tuple(
        tuple((0 if start == 0 else start + first, total if stop == count else stop + first) for start, stop in stage)
        for stage in parts
    )


def check(num_layers: int, layout: Layout, *, line_of: Callable[[str], int | None]) -> list[Problem]:
    """What keeps so many layers from being divided evenly over the stages of a layout."""
    if layout.chunks > 1 and num_layers % layout.chunks:
        message = (
            f"must divide model.num_layers = {num_layers}; "
            f"possible here: {', '.join(str(k) for k in divisors(num_layers) if num_layers // k >= layout.pipe)}"
        )
        return [Problem("model.num_chunks", message, layout.chunks, line_of("model.num_chunks"))]
    if num_layers // layout.chunks < layout.pipe:
        chunked = f" / model.num_chunks = {layout.chunks}" if layout.chunks > 1 else ""
        message = (
            f"must be at most model.num_layers = {num_layers}{chunked}, so that each stage has a layer; "
            f"possible here: 1 to {max(1, num_layers // layout.chunks)}"
        )
        line = line_of("parallel.pipeline.size") or line_of("parallel.pipeline")
        return [Problem("parallel.pipeline", message, layout.pipe, line)]
    return []


def _why_not(num_layers: int, *, pipe: int, chunks: int) -> str:
    if pipe < 1 or chunks < 1 or num_layers < 1:
        return f"cannot divide {num_layers} layers over {pipe} stages of {chunks} chunks: each must be at least 1"
    if num_layers % chunks:
        return (
            f"{num_layers} layers cannot be cut into {chunks} equal chunks; "
            f"chunks possible here: {', '.join(map(str, divisors(num_layers)))}"
        )
    if num_layers // chunks < pipe:
        return (
            f"{num_layers} layers in {chunks} chunk(s) are too few for {pipe} stages: "
            f"at most {num_layers // chunks} stages have a layer each"
        )
    return ""
