"""`launch/pretrain.py` with DeepSpeed's question "does this CPU compute in fp16?" answered yes: torch emulates it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from internlm_ds.parallel.launch import choose_accelerator
from internlm_ds.train.run import main

if __name__ == "__main__":
    choose_accelerator()
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    sys.exit(main())
