"""One rank's failure while a run is being set up becomes every rank's, said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from internlm_ds.errors import InternlmDsError
from internlm_ds.parallel.comm import ProcessComm

T = TypeVar("T")


def together(comm: ProcessComm, action: Callable[[], T]) -> T:
    """Run `action`, which must not communicate, on every rank.

    Raises:
        InternlmDsError: On all ranks, if `action` raised one on any: its own on a rank that has one, else that of the
            first that has, with its rank in front; `on_all_ranks` is set, so that rank 0 says it.
    """
    value: T | None = None
    own: InternlmDsError | None = None
    try:
        value = action()
    except InternlmDsError as error:
        own = error
    report = None if own is None else (comm.rank, type(own).__name__, str(own), own.exit_code)
    gathered = comm.gather(report)
    first = comm.broadcast(next((r for r in gathered if r is not None), None) if gathered is not None else None)
    if first is None:
        return value  # type: ignore[return-value]
    failure = own or _elsewhere(*first)
    failure.on_all_ranks = True
    raise failure


def _elsewhere(rank: int, name: str, text: str, exit_code: int) -> InternlmDsError:
    """Another rank's error as one of this rank: its class takes arguments of its own, so a plain one stands for it."""
    kind = type(name, (InternlmDsError,), {"exit_code": exit_code})
    return kind(f"rank {rank}: {text}")
