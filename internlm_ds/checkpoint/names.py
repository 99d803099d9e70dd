"""Names of files: those by which checkpoints of InternLM are known, and which are allowed inside a checkpoint.

Without torch, so that a folder is told in a blink.
"""

from __future__ import annotations

import re

MODEL_FILE = re.compile(r"model_tp(\d+)_pp(\d+)\.pt$")
OTHER_SPLIT = re.compile(r"model_tp\d+_(wp\d+_pp\d+|pp\d+_dp\d+)\.pt$")
META_FILE = re.compile(r"(?:consolidated\.(\d+)\.pth|model_t(\d+)\.pt)$")
STEP_FILE = re.compile(r"(\d+)\.step$")


def is_plain(name: object) -> bool:
    """Is it the name of a file in a checkpoint's own folder, and no way out of it?

    >>> [is_plain(name) for name in ("weights.safetensors", "../x", "/etc/x", "a\\\\b", "", "..")]
    [True, False, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
