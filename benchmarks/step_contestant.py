#!/usr/bin/env python
"""A contestant of `step.py`: a process (or one a rank) that takes steps when told.

Started as `step_contestant.py FACTS`; reads a number of steps from standard input, answers with one line of JSON: their
seconds, the last loss, the peak memory. All contestants train a Llama of the same sizes on the same tokens with AdamW
and clipping to 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_facts import Facts, Step


def main() -> None:
    facts, rank = Facts.loads(sys.argv[1]), int(os.environ["RANK"])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    if facts.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if facts.kind not in ("plain", "matmul"):
        backend = "nccl" if facts.device == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.FileStore(facts.store, facts.world_size), rank=rank, world_size=facts.world_size
        )
    step = _contestant(facts.kind)(facts, rank)
    print("ready", file=answers)
    for line in sys.stdin:
        times, loss = [], 0.0
        for _ in range(int(line)):
            started = _now(facts)
            loss = step()
            times.append(_now(facts) - started)
        print(json.dumps({"seconds": times, "loss": loss, "peak_mb": _peak_mb(facts)}), file=answers)
    os._exit(0)  # the other ranks may be gone


def _contestant(kind: str) -> Callable[[Facts, int], Step]:
    """What makes its step; another's libraries are not loaded."""
    if kind == "matmul":
        return matmul
    if kind == "ours":
        from step_ours import ours

        return ours
    if kind == "torchtitan":
        from step_titan import torchtitan

        return torchtitan
    import step_peers

    return {"plain": step_peers.plain, "hf": step_peers.hugging_face}[kind]


def _now(facts: Facts) -> float:
    """Seconds, when every rank has come so far."""
    import torch
    import torch.distributed as dist

    if facts.device == "cuda":
        torch.cuda.synchronize()
    if facts.world_size > 1:
        dist.barrier()
    return time.perf_counter()


def _peak_mb(facts: Facts) -> float:
    import resource

    import torch

    if facts.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def matmul(facts: Facts, rank: int) -> Step:
    """The product that a block does most of, over and over: what the device can do at all. Returns flops per second."""
    import torch

    sizes, dtype = facts.sizes, getattr(torch, facts.sizes.dtype)
    a = torch.randn(sizes.rows * sizes.seq, sizes.hidden, device=facts.device, dtype=dtype)
    b = torch.randn(sizes.hidden, 2 * sizes.mlp, device=facts.device, dtype=dtype)
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    count = max(10, int((2e13 if facts.device == "cuda" else 5e10) / flops))

    def step() -> float:
        started = _now(facts)
        for _ in range(count):
            a @ b
        return count * flops / (_now(facts) - started)

    return step


if __name__ == "__main__":
    main()
