"""When the compiled kernels are at hand: loaded behind the first batches, never waited for.

Importing numba takes about half a second, compiling the kernels a few more the first time (numba keeps the result on
disk). A run that reads little never pays for it; one that reads much makes its first batches with numpy while a thread
loads `row_kernel`, and goes over to it when it is there. Both give the same batches bit for bit, so nobody sees when.
"""

from __future__ import annotations

import logging
import os
import threading
from types import ModuleType

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_module: ModuleType | None = None
_thread: threading.Thread | None = None
_unusable = False


def loaded() -> ModuleType | None:
    """`row_kernel` if it is ready, else None: then numpy does the work."""
    return _module


def load() -> ModuleType | None:
    """Load `row_kernel` now, compiling it if need be; None if numba cannot be used here (said once in the log)."""
    global _module, _unusable
    with _lock:
        if _module is None and not _unusable:
            try:
                from internlm_ds.data import row_kernel

                _module = row_kernel
            except Exception as error:  # numba absent, too new for this Python, or without a place for its cache
                _unusable = True
                logger.warning("numba cannot be used (%s): rows are parsed with numpy, about five times slower", error)
    return _module


def load_in_background() -> None:
    """Start loading in a thread; returns at once, does nothing if that was done before."""
    global _thread
    if _module is None and _thread is None and not _unusable:
        # no daemon: a process that ends waits for it, seconds at worst. One that ended in the middle of an import would
        # leave a lock behind, on which the interpreter may wait for ever.
        _thread = threading.Thread(target=load, name="internlm-ds-kernels")
        _thread.start()


def _in_forked_child() -> None:
    """A child lacks the thread that was loading, and may have inherited import locks that nobody will release."""
    global _lock, _thread, _unusable
    _lock = threading.Lock()
    if _module is None and _thread is not None:
        _unusable = True
    _thread = None


os.register_at_fork(after_in_child=_in_forked_child)
