"""Evaluation on the validation sets: InternLM's averages over the engine's evaluation of one batch.

Source: the reference's `evaluate_on_val_dls`: a set's loss is the sum of its batches' losses over `batches + 1e-6`;
each batch's loss is the mean over its micro-batches. Accuracy and perplexity are token-weighted over the whole set.
Here the loss is the mean over data-parallel ranks too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from internlm_ds.train.state import TrainState

BATCHES_EPSILON = 1e-6


class Evaluating(Protocol):
    """The part of the engine that evaluation uses."""

    def evaluate_batch(self, micro_batches: Sequence[Any]) -> float: ...


def evaluate(
    engine: Evaluating,
    loaders: Mapping[str, Any],
    *,
    validation_metrics: Callable[[], AbstractContextManager[Callable[[], Mapping[str, Any]]]],
) -> dict[str, dict[str, float | None]]:
    """Evaluate every set; called by all ranks.

    Args:
        loaders: By name; iterating one gives lists of micro-batches, the same number on every rank.
        validation_metrics: A context in which micro-batches are counted apart from training; gives a function that
        closes the
            count (it communicates) and returns `acc` and `perplexity`, empty where the logits are not.
    Returns:
        Per set `loss`, `acc`, `perplexity`.
    """
    return {name: _evaluate_set(engine, loader, validation_metrics) for name, loader in loaders.items()}


def _evaluate_set(engine: Evaluating, loader: Any, validation_metrics: Any) -> dict[str, float | None]:
    total, batches = 0.0, 0
    with validation_metrics() as finish:
        for micro_batches in loader:
            total += engine.evaluate_batch(micro_batches)
            batches += 1
        values = finish()
    return {
        "loss": total / (batches + BATCHES_EPSILON),
        "acc": values.get("acc"),
        "perplexity": values.get("perplexity"),
    }


def log_results(logger: logging.Logger, results: Mapping[str, Mapping[str, Any]], state: TrainState) -> None:
    """One line per set, worded as InternLM's."""
    for name, r in results.items():
        logger.info(
            "Validation on %s: step=%d,val/%s_loss=%s,val/%s_acc=%s,val/%s_plex=%s",
            *(name, state.step_count, name, r["loss"], name, r["acc"], name, r["perplexity"]),
        )
