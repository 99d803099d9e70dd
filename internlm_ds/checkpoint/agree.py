"""How the ranks of a job speak about a checkpoint, and how one rank's failure becomes everybody's.

Owns the small `Comm` protocol (the engine implements it over its process group) and `agree`. What one rank alone can
see, a full disk for instance, is agreed on here before anybody goes on: otherwise the others would wait in the next
collective for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from internlm_ds.errors import CheckpointDamagedError, CheckpointError, InternlmDsError

T = TypeVar("T")


class Comm(Protocol):
    """Collectives over all ranks of a job; objects are small and picklable."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def barrier(self) -> None: ...

    def gather(self, obj: Any) -> list[Any] | None:
        """The objects of all ranks in rank order on rank 0, None elsewhere."""

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's object, on every rank."""

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers, on every rank."""


class Solo:
    """The `Comm` of one process."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        return None

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        return obj

    def largest(self, value: int) -> int:
        return value


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """`action`'s result, or the exception it raised: for what must be reported before it is raised."""
    try:
        return action(), None
    except Exception as error:  # whatever it is, the other ranks have to hear of it first
        return None, error


def collect(comm: Comm, action: Callable[[], T], *, doing: str) -> list[T] | None:
    """Run `action` on every rank and gather the results on rank 0 (None elsewhere).

    Raises:
        CheckpointError: On all ranks, if `action` raised on any; the message names the ranks (`CheckpointDamagedError`
            if all failures are damage).
    """
    result, error = attempt(action)
    reports = comm.gather((result, _describe(error)))
    failures = [(rank, *failure) for rank, (_, failure) in enumerate(reports) if failure] if reports is not None else []
    _raise_everywhere(comm.broadcast(failures), error, doing=doing, world_size=comm.world_size)
    return None if reports is None else [value for value, _ in reports]


def on_first_rank(comm: Comm, action: Callable[[], T], *, doing: str) -> T:
    """Run `action` on rank 0 and give its result to every rank; if it raises, every rank raises."""
    result, error = attempt(action) if comm.rank == 0 else (None, None)
    failure = _describe(error)
    result, failures = comm.broadcast((result, [(0, *failure)] if failure else []))
    _raise_everywhere(failures, error, doing=doing, world_size=comm.world_size)
    return result


def _describe(error: Exception | None) -> tuple[str, bool] | None:
    """Message and whether it is damage; objects themselves might not survive the way to another rank."""
    if error is None:
        return None
    text = str(error) if isinstance(error, InternlmDsError) else f"{type(error).__name__}: {error}"
    return text, isinstance(error, CheckpointDamagedError)


def _raise_everywhere(
    failures: list[tuple[int, str, bool]], own: Exception | None, *, doing: str, world_size: int
) -> None:
    if not failures:
        return
    if world_size == 1 and isinstance(own, InternlmDsError):
        raise own
    kind = CheckpointDamagedError if all(damaged for _, _, damaged in failures) else CheckpointError
    shown = [f"rank {rank}: {text}" if world_size > 1 else text for rank, text, _ in failures[:8]]
    more = f"\n  and {len(failures) - 8} more ranks" if len(failures) > 8 else ""
    error = kind(f"{doing} failed: " + "\n  ".join(shown) + more)
    error.on_all_ranks = True
    raise error from own
