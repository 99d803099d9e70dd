"""`launch/pretrain.py` whose rank 1 alone meets an unforeseen error at its third batch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from internlm_ds.data.loader import TrainLoader
from internlm_ds.parallel.environment import detect
from internlm_ds.train.run import main

next_step = TrainLoader.next_step


def failing(loader: TrainLoader):
    batch = next_step(loader)
    if batch.index == 2 and detect().rank == 1:
        raise RuntimeError("cosmic ray on rank 1")
    return batch


if __name__ == "__main__":
    TrainLoader.next_step = failing
    sys.exit(main())
