"""Tables and JSON of leaves."""

from __future__ import annotations

import json
import math

from internlm_ds.config.render import as_json, table
from internlm_ds.config.schema import Leaf

LEAVES = [
    Leaf("SEQ_LEN", 64, "file", line=3, helper=True, note="helper constant"),
    Leaf("JOB_NAME", "x", "override"),
    Leaf("ckpt.checkpoint_every", math.inf, "default"),
    Leaf("data.seq_len", 64, "file", line=2, file="base.py"),
    Leaf("parallel.zero1.size", (1, -math.inf, math.nan), "file", line=9, written="parallel.zero1"),
]


def test_table() -> None:
    assert table(LEAVES, path="c.py") == (
        "SEQ_LEN               = 64              c.py:3  # helper constant\n"
        "\n"
        "JOB_NAME              = 'x'             override\n"
        "\n"
        "ckpt.checkpoint_every = inf             default\n"
        "\n"
        "data.seq_len          = 64              base.py:2\n"
        "\n"
        "parallel.zero1        = (1, -inf, nan)  c.py:9"
    )
    assert table([], path="c.py") == ""


def test_json_is_strict() -> None:
    rows = [as_json(leaf, path="c.py") for leaf in LEAVES]
    text = json.dumps(rows, allow_nan=False)
    assert json.loads(text)[2]["value"] == "inf"
    assert rows[3] == {"key": "data.seq_len", "value": 64, "origin": "file", "file": "base.py", "line": 2, "note": ""}
    assert rows[1]["file"] is None
    assert (rows[4]["key"], rows[4]["value"]) == ("parallel.zero1", [1, "-inf", "nan"])
