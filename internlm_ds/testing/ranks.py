"""`run_ranks`: a function on several ranks of this machine, for tests of anything that is split or replicated.

Ranks meet over a file, so no port is taken; each has one thread. If one raises, the others are stopped and its
traceback is the one you see. Shipped, because people who bring their own model family test it the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from internlm_ds.layout.ranks import Layout

# imported once, in the process that ranks are forked from: a rank then starts in a tenth of a second
PRELOAD = ["numpy", "torch.distributed", "torch._dynamo", "torch._inductor.compile_fx", "internlm_ds.train.assemble"]


class RankError(AssertionError):
    """A rank failed; holds its traceback as text."""


def run_ranks(
    fn: Callable[..., Any], layout: Layout, *args: Any, timeout_s: float = 60.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(context, *args)` on `layout.world_size` processes.

    Args:
        fn: A function at module level; gets this rank's `ParallelContext`.
        layout: Ranks along each axis.
        args: Picklable.
        timeout_s: For all of it; ranks still running then are killed.
        backend: `gloo` (on the CPU), or `nccl` (a GPU for each rank).
    Returns:
        What each rank returned, in rank order (picklable).
    Raises:
        RankError: A rank raised, died or did not finish in time.
    """
    where = (inspect.getfile(fn), fn.__module__, fn.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Meeting(str(Path(folder) / "store"), timeout_s, backend)
        processes, pipes = _start(where, layout, args, meeting=meeting)
        try:
            return _collect(processes, pipes, timeout_s=timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet, how long they wait for each other, and over what they talk."""

    store: str
    timeout_s: float
    backend: str


def _start(where: tuple[str, str, str], layout: Layout, args: tuple[Any, ...], *, meeting: Meeting):
    on_cpu = meeting.backend == "gloo"
    # a process that was forked from one that has looked for GPUs cannot use them
    context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
    # read by the fork server when it starts: ranks must not take a thread per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if on_cpu:
        # DeepSpeed asks when it is imported, which the fork server does
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context.set_forkserver_preload(PRELOAD)
    processes, pipes = [], []
    for rank in range(layout.world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(theirs, where, layout, rank, meeting, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def _collect(processes: Sequence[Any], pipes: Sequence[Connection], *, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting)} did not finish within {timeout_s:g} s")
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            try:
                good, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not good:
                raise RankError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    where: tuple[str, str, str],
    layout: Layout,
    rank: int,
    meeting: Meeting,
    args: tuple[Any, ...],
) -> None:
    try:
        value = _call(where, layout, rank, meeting, args)
        _send(pipe, True, value)
    except BaseException:
        _send(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # a peer may be gone: process groups are not worth waiting for
        os._exit(0)


def _send(pipe: Connection, good: bool, value: Any) -> None:
    # by value: multiprocessing's own pickler would share a tensor's memory, which ends with this process
    pipe.send_bytes(pickle.dumps((good, value)))


def _call(where: tuple[str, str, str], layout: Layout, rank: int, meeting: Meeting, args: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    from internlm_ds.parallel.environment import LaunchFacts
    from internlm_ds.parallel.launch import make_context, write_environment

    torch.set_num_threads(1)
    size = layout.world_size
    write_environment(LaunchFacts("torch", rank, size, local_rank=rank, local_size=size), backend=meeting.backend)
    device = torch.device("cpu")
    if meeting.backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        meeting.backend,
        store=dist.FileStore(meeting.store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=meeting.timeout_s),
    )
    function: Any = _module(where[0], where[1])
    for name in where[2].split("."):
        function = getattr(function, name)
    value = function(make_context(layout, rank=rank, local_rank=rank, device=device), *args)
    # a rank that leaves early would break the connections that others still make; one that failed is reported before
    dist.barrier()
    return value


def _module(path: str, name: str) -> ModuleType:
    """The module a test function lives in, loaded from its file: test files are in no package."""
    if name in sys.modules and name != "__main__":
        return sys.modules[name]
    if name.partition(".")[0] == "internlm_ds":
        return importlib.import_module(name)
    for folder in (str(Path(path).parent), str(Path(path).parent.parent / "golden")):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    name = "ranks_main" if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
