"""What a run must carry over a restart, apart from tensors: one value, JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of a run, named as in InternLM.

    Attributes:
        batch_count: Index of the next batch.
        step_count: Successful updates.
        num_consumed_tokens: Tokens of successful updates, over all data-parallel ranks.
        inf_nan_skip_batches: Batches whose update failed.
        bad_steps_in_a_row: Failed updates since the last good one.
    """

    batch_count: int = 0
    step_count: int = 0
    num_consumed_tokens: int = 0
    inf_nan_skip_batches: int = 0
    bad_steps_in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainState:
        known = {f.name for f in fields(cls)}
        return cls(**{k: int(v) for k, v in data.items() if k in known})
