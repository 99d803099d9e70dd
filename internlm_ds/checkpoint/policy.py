"""When a run saves: InternLM's rule as one pure function of the number of successful updates.

Who remembers what was saved already, and where to, is the manager.

Source: InternEvo `CheckpointManager.is_now_to_save_ckpt` (March 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SavePolicy:
    """Intervals in successful updates; infinity means never.

    Attributes:
        checkpoint_every: Interval of normal checkpoints.
        snapshot_every: Interval of snapshots (InternLM's `oss_snapshot_freq`); 0 and 1 switch them off.
        total_steps: A normal checkpoint is due here, whatever the intervals.
    """

    checkpoint_every: float
    snapshot_every: float
    total_steps: int


@dataclass(frozen=True)
class Decision:
    """What is due after an update: a checkpoint of a kind, or none; and whether the run ends on purpose."""

    kind: Literal["normal", "snapshot"] | None = None
    stop: bool = False


def decide(step_count: int, policy: SavePolicy, *, stop_signal: int = 0) -> Decision:
    """What is due after `step_count` successful updates.

    Args:
        stop_signal: The number in the stop file, 0 for none: k > 0 asks to save and stop at step k, k < 0 to save at
            step |k|.

    >>> decide(6, SavePolicy(checkpoint_every=3, snapshot_every=2, total_steps=7))
    Decision(kind='normal', stop=False)
    """
    if step_count <= 0:
        return Decision()
    snapshot = policy.snapshot_every > 1 and step_count % policy.snapshot_every == 0
    asked = stop_signal != 0 and step_count == abs(stop_signal)
    every = policy.checkpoint_every > 0 and step_count % policy.checkpoint_every == 0
    if asked or every or step_count == policy.total_steps:
        return Decision("normal", stop=asked and stop_signal > 0)
    return Decision("snapshot" if snapshot else None)
