"""Names of files by which checkpoints of InternLM are known; without torch, so that a folder is told in a blink."""

from __future__ import annotations

import re

MODEL_FILE = re.compile(r"model_tp(\d+)_pp(\d+)\.pt$")
OTHER_SPLIT = re.compile(r"model_tp\d+_(wp\d+_pp\d+|pp\d+_dp\d+)\.pt$")
STEP_FILE = re.compile(r"(\d+)\.step$")
