"""When a checkpoint is due."""

from __future__ import annotations

import math

import pytest

from internlm_ds.checkpoint.policy import Decision, SavePolicy, decide

POLICY = SavePolicy(checkpoint_every=4, snapshot_every=2, total_steps=9)
NEVER = SavePolicy(checkpoint_every=math.inf, snapshot_every=math.inf, total_steps=9)


@pytest.mark.parametrize(
    ("step", "policy", "signal", "kind", "stop"),
    [
        (0, POLICY, 0, None, False),
        (1, POLICY, 0, None, False),
        (2, POLICY, 0, "snapshot", False),
        (4, POLICY, 0, "normal", False),
        (9, POLICY, 0, "normal", False),
        (5, NEVER, 5, "normal", True),
        (5, NEVER, -5, "normal", False),
        (6, NEVER, 5, None, False),
        (3, NEVER, 0, None, False),
        (9, NEVER, 0, "normal", False),
        (3, SavePolicy(0, 1, 9), 0, None, False),
    ],
)
def test_decision(step, policy, signal, kind, stop):
    assert decide(step, policy, stop_signal=signal) == Decision(kind, stop=stop)
