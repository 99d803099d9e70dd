"""Saving beside the training: what a rank owns is copied into a buffer on the host, a thread writes the copy.

The training waits for the copy alone. The buffer is made once, its pages are touched while the first steps run, and it
is used again for every save: a copy into memory that the process holds already is several times faster than one into
new memory. It costs the size of what the rank saves. At most one save is under way; a second one waits for it.

What is written, and how, is the format's; when, the manager's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from internlm_ds.checkpoint.agree import Comm, collect
from internlm_ds.checkpoint.formats.native import Fragment, Weight

log = logging.getLogger(__name__)

_ALIGNED = 64


class HostBuffer:
    """Memory on the host that copies of tensors are laid into, one after another; it grows and is never given back."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._warming: threading.Thread | None = None

    def warm(self, size: int, *, pinned: bool = False) -> None:
        """Make the buffer hold `size` bytes and touch its pages, in a thread."""

        def work() -> None:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self._memory.fill_(0)

        self._warming = threading.Thread(target=work, name="checkpoint-buffer", daemon=True)
        self._warming.start()

    def copy(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of tensors on the host, valid until the next call; all have arrived when it returns."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None
        sources = [tensor.detach() for tensor in tensors]
        on_device = [tensor.device for tensor in sources if tensor.is_cuda]
        needed = sum(_room(tensor) for tensor in sources)
        if needed > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._memory = torch.empty(needed, dtype=torch.uint8, pin_memory=bool(on_device))
        copies, place = [], 0
        for source in sources:
            size = source.numel() * source.element_size()
            target = self._memory[place : place + size].view(source.dtype).view(source.shape)
            copies.append(target.copy_(source, non_blocking=True))
            place += _room(source)
        for device in set(on_device):
            torch.cuda.synchronize(device)
        return copies


def _room(tensor: torch.Tensor) -> int:
    """Bytes that a copy takes, so that the next one begins where any dtype may."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


class BackgroundSaver:
    """Saves in a thread of each rank. All ranks call its methods together, in the same order.

    Args:
        comm: Over all ranks, for the thread that calls.
        thread_comm: Over all ranks as well, and used by nobody else: two threads must not share one.
    """

    def __init__(self, *, comm: Comm, thread_comm: Comm):
        self._comm, self._thread_comm = comm, thread_comm
        self.buffer = HostBuffer()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_busy(self) -> bool:
        """A save was started and its end not yet noted."""
        return self._thread is not None

    def start(
        self,
        save: Callable[..., Any],
        *,
        weights: Iterable[Weight],
        fragments: Iterable[Fragment],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy what is to be saved and return; a thread calls `save(comm=…, weights=…, fragments=…)` with the copies.

        A save that is still under way is waited for first.

        Args:
            done: Called in the thread when `save` has returned.
        Raises:
            CheckpointError: On all ranks, if the save before this one failed.
        """
        self.wait()
        weights, fragments = [Weight(*weight) for weight in weights], list(fragments)
        copies = self.buffer.copy([*(w.tensor for w in weights), *(f.tensor for f in fragments)])
        held = {
            "weights": [w._replace(tensor=copy) for w, copy in zip(weights, copies)],
            "fragments": [replace(f, tensor=copy) for f, copy in zip(fragments, copies[len(weights) :])],
        }
        del weights, fragments

        def work() -> None:
            try:
                save(comm=self._thread_comm, **held)
                done()
            except Exception as error:
                log.error("saving in the background failed: %s", error)
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Note the end of a save that every rank has ended; nothing happens if there is none.

        Raises:
            CheckpointError: On all ranks, if it failed on any.
        """
        if self._thread is not None and not self._comm.largest(int(self._thread.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Until the save that is under way, if there is one, has ended; raises as `poll`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None

        def outcome() -> None:
            if error is not None:
                raise error

        collect(self._comm, outcome, doing="saving in the background")

    def close(self) -> None:
        """Let the save that is under way end; whether it was good is in the log. Not for all ranks together."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
