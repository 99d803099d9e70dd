"""A step asks the device for numbers a fixed few times, however many micro-batches it has.

On a GPU every one of them makes the host wait for all work so far. Borders of segments are read once for each
micro-batch and stage, before any work that they could wait for.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.verify import training
from internlm_ds.verify.case import Case


class Reads(TorchDispatchMode):
    """Counts numbers that go from a tensor to Python, by the line that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frame = next(f for f in reversed(traceback.extract_stack()[:-1]) if "torch/" not in f.filename)
            self.seen[f"{Path(frame.filename).name}:{frame.name}"] += 1
        return func(*args, **(kwargs or {}))


def reads_of_steps(context, path: str, case: Case) -> list[dict[str, int]]:
    _, engine, _ = training.build_engine(context, path)
    data = training.micro_batches(0, context, case)
    engine.train_step(data)
    counts = []
    for micro_batches in (data[:2], data):
        engine.train_step(micro_batches)
        with Reads() as reads:
            engine.train_step(micro_batches)
        counts.append(dict(reads.seen))
    return counts


def test_reads_do_not_grow_with_micro_batches(tmp_path: Path):
    case = Case(micro_batches=8, layers=2)
    (counts,) = run_ranks(reads_of_steps, Layout(), case.write(tmp_path), case)
    few, many = counts
    assert few == many, (few, many)
    assert sum(few.values()) <= 6, few
