"""`launch/pretrain.py` one of whose ranks meets an unforeseen error in its third batch.

`FAIL_RANK` says which (1), `FAIL_AT` where: in the `loader` (default), `forward`, `backward` or `optimizer`. The time
of it goes into the file `FAILED_FILE`, if that is set. At `weights` it is no error: one bit of them changes.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from internlm_ds.parallel.environment import detect
from internlm_ds.parallel.launch import choose_accelerator
from internlm_ds.train.run import main

RANK, PLACE = int(os.environ.get("FAIL_RANK", "1")), os.environ.get("FAIL_AT", "loader")


def hit() -> None:
    if "FAILED_FILE" in os.environ:
        Path(os.environ["FAILED_FILE"]).write_text(str(time.time()))
    raise RuntimeError(f"cosmic ray on rank {RANK}")


def flip_a_bit(replicas) -> None:
    _, weight = replicas._own[0]
    weight.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def strike(owner: type, name: str, *, per_step: int = 1, hit=lambda owner: hit()) -> None:
    """Let the third step's first call of a method fail."""
    method, calls = getattr(owner, name), []

    def struck(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2 * per_step + 1:
            hit(args[0])
        return method(*args, **kwargs)

    setattr(owner, name, struck)


if __name__ == "__main__":
    choose_accelerator()
    if detect().rank == RANK:
        from internlm_ds.data.loader import TrainLoader
        from internlm_ds.engine.engine import Engine
        from internlm_ds.engine.instructions import StageWorker
        from internlm_ds.parallel.replicas import ReplicaCheck

        if PLACE == "loader":
            strike(TrainLoader, "next_step")
        elif PLACE == "weights":
            strike(ReplicaCheck, "check", hit=flip_a_bit)
        elif PLACE == "optimizer":
            strike(Engine, "_exec_optimizer_step")
        else:
            strike(StageWorker, f"_{PLACE}", per_step=2)  # micro-batches
    sys.exit(main())
