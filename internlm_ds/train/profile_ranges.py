"""Ranges of torch's profiler around the rooms of a step, laid while it profiles and taken away afterwards.

Laid from outside, over attributes of the objects of a run: a step that is not profiled pays nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from internlm_ds.engine.channels import Channels, Incoming
from internlm_ds.model.norm import LayerNorm, RmsNorm
from internlm_ds.train.profile_table import DATA, RANGE, WAITING

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "broadcast", "barrier"),
    *("all_gather_object", "all_to_all_single", "gather", "scatter"),
)
_ABSENT = object()


def lay(engine: Any, loader: Any, *, modules: bool) -> Callable[[], None]:
    """Lay ranges around a run's rooms; returns what takes them away.

    Args:
        engine, loader: Of the run.
        modules: Also around norms and attention, inside the model; not where it is compiled, which they would break up.
    """
    away = ExitStack()

    def around(owner: Any, name: str, room: str) -> None:
        if callable(getattr(owner, name, None)):
            away.callback(_lay_one(owner, name, room))

    around(loader, "next_step", DATA)
    around(engine.optimizer, "step", "optimizer")
    around(engine, "_exec_reduce_grads", "communication")
    around(engine.module, "loss_fn", "loss")
    for name in COLLECTIVES:
        around(dist, name, "communication")
    # what a stage waits for, on its own class: every message is another object
    around(Incoming, "wait", WAITING)
    for name in ("receive_spec", "arrived", "finish"):
        around(Channels, name, WAITING)
    for module in engine.module.modules() if modules else ():
        if isinstance(module, (RmsNorm, LayerNorm, torch.nn.RMSNorm, torch.nn.LayerNorm)):
            around(module, "forward", "norm")
        elif "attend" in vars(module):
            around(module, "attend", "attention")
    return away.close


def _lay_one(owner: Any, name: str, room: str) -> Callable[[], None]:
    function = getattr(owner, name)
    before = vars(owner).get(name, _ABSENT)

    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + room):
            return function(*args, **kwargs)

    setattr(owner, name, ranged)
    return lambda: delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)
