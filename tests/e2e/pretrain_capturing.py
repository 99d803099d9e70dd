"""`pretrain.py` that also writes what each rank's loader handed to the training into the run directory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from internlm_ds.data.loader import StepBatch, TrainLoader
from internlm_ds.train.run import main

RUN_DIR = Path(sys.argv[sys.argv.index("--run-dir") + 1])
_next_step = TrainLoader.next_step


def next_step(self: TrainLoader) -> StepBatch:
    batch = _next_step(self)
    if not batch.skipped:
        tokens = [tokens.tolist() for (tokens, _), _ in batch.micro_batches]
        with open(RUN_DIR / f"delivered{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps({"index": batch.index, "tokens": tokens}) + "\n")
    return batch


TrainLoader.next_step = next_step

if __name__ == "__main__":
    sys.exit(main())
