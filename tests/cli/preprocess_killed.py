"""A run of `preprocess text` that kills itself at its N-th step: a write, a file opened or brought to disk, a new name.

Usage: preprocess_killed.py N ARGUMENTS… (of `internlm-ds`); with N 0 it runs through and prints the number of steps,
which differs from run to run: threads decide how often the journal is written. `names:N` counts only the files that get
the names a user sees; their number is always the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from internlm_ds.cli import main as command
from internlm_ds.data.rowfile import RowFile
from internlm_ds.preprocess import options

steps = 0
lock = threading.Lock()


def counted(function, counts=lambda *_: True):
    def call(*args, **keywords):
        global steps
        with lock:
            steps += counts(*args)
            if steps == kill_at and counts(*args):
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keywords)

    return call


def to_a_name_that_is_seen(source, target, *_):
    return not os.path.basename(target).startswith(".")


if __name__ == "__main__":
    kind, _, number = sys.argv[1].rpartition(":")
    kill_at = int(number)
    if kind == "names":
        os.replace = counted(os.replace, to_a_name_that_is_seen)
    else:
        for name in ("fsync", "fdatasync", "replace", "open"):
            setattr(os, name, counted(getattr(os, name)))
        RowFile._write = counted(RowFile._write)
    # small blocks, and a note of each as soon as the one before is on disk
    defaults = dict(zip(options.Work.__dataclass_fields__, options.Work.__init__.__defaults__))
    defaults |= {"block_bytes": 1500, "journal_s": 0.0}
    options.Work.__init__.__defaults__ = tuple(defaults.values())
    code = command.main(sys.argv[2:])
    print(steps)
    sys.exit(code)
