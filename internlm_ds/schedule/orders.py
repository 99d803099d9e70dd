"""In which order a stage computes: forward and backward passes of all chunks and micro-batches, nothing else.

What has to be loaded, received and sent around each pass follows from the order alone and is added by `lists`.

Legend: P stages, V chunks per stage, M micro-batches, r this stage.
"""

from __future__ import annotations

from internlm_ds.errors import LayoutError
from internlm_ds.schedule.instructions import Backward, Forward, WeightGrad, Work

Order = tuple[Work, ...]


def one_f_one_b(stage: int, *, stages: int, micro_batches: int) -> Order:
    """P - r - 1 forward passes ahead, then forward and backward in turn, then what is left backward.

    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters (2021), section 2.2.1.

    >>> [f"{type(work).__name__[0]}{work.micro_batch}" for work in one_f_one_b(0, stages=2, micro_batches=3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    ahead = min(micro_batches, stages - stage - 1)
    order: list[Work] = [Forward(m) for m in range(ahead)]
    for m in range(micro_batches):
        if m + ahead < micro_batches:
            order.append(Forward(m + ahead))
        order.append(Backward(m))
    return tuple(order)


def interleaved(stage: int, *, stages: int, chunks: int, micro_batches: int) -> Order:
    """1F1B over the V chunks of each stage: P micro-batches through one chunk, then the same through the next.

    The k-th forward pass is chunk (k mod PV) // P of micro-batch (k // PV)·P + k mod P, the k-th backward pass the same
    with the chunks in reverse. 2(P - r - 1) + (V - 1)P forward passes run ahead; all of them if M = P.

    Raises:
        LayoutError: M is no multiple of P.
    Source: Narayanan et al. (2021), section 2.2.2, and Megatron-LM's order.
    """
    if micro_batches % stages:
        raise LayoutError(
            f"the interleaved schedule takes the micro-batches in groups of {stages}, one for each stage; "
            f"{micro_batches} of them do not divide"
        )
    total = micro_batches * chunks
    ahead = total if micro_batches == stages else min(total, 2 * (stages - stage - 1) + (chunks - 1) * stages)
    forward = [_place(k, stages=stages, chunks=chunks) for k in range(total)]
    order: list[Work] = [Forward(m, chunk) for m, chunk in forward[:ahead]]
    for k in range(total):
        if k + ahead < total:
            order.append(Forward(*forward[k + ahead]))
        m, chunk = forward[k]
        order.append(Backward(m, chunks - 1 - chunk))
    return tuple(order)


def zb_h1(stage: int, *, stages: int, micro_batches: int) -> Order:
    """1F1B in which the gradients of weights wait: stage r lets r micro-batches' pass by before it computes them.

    The gradient of the input, which the previous stage waits for, so leaves earlier; weights fill the gaps at the end.

    Source: Qi et al., Zero Bubble Pipeline Parallelism (2023), section 2.3, ZB-H1.
    """
    order: list[Work] = []
    for work in one_f_one_b(stage, stages=stages, micro_batches=micro_batches):
        order.append(work)
        if isinstance(work, Backward) and work.micro_batch >= stage:
            order.append(WeightGrad(work.micro_batch - stage))
    waiting = range(max(0, micro_batches - stage), micro_batches)
    return (*order, *(WeightGrad(m) for m in waiting))


def forward_only(*, stages: int, chunks: int, micro_batches: int) -> Order:
    """Evaluation: the order of `interleaved`'s forward passes, the same on every stage, for any M."""
    return tuple(
        Forward(m, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for m in range(first, min(first + stages, micro_batches))
    )


def _place(k: int, *, stages: int, chunks: int) -> tuple[int, int]:
    """Micro-batch and chunk of the k-th forward pass."""
    group, within = divmod(k, stages * chunks)
    return group * stages + within % stages, within // stages
