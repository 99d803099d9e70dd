#!/usr/bin/env python
"""Train an InternLM configuration on DeepSpeed: `deepspeed launch/pretrain.py --config model_configs/7b.py`.

Also started by `torchrun`, `srun` or plain `python`. All logic lives in `internlm_ds.train`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from internlm_ds.train.run import main

if __name__ == "__main__":
    sys.exit(main())
