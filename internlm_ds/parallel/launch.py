"""The process groups of a run: writes what the libraries below expect in the environment, makes the groups, returns the
context.

Which process this is comes from `environment`. Nothing else in the package creates a group of ranks along an axis.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from internlm_ds.errors import MachineError
from internlm_ds.layout.ranks import Layout
from internlm_ds.parallel.context import Axis, ParallelContext
from internlm_ds.parallel.environment import LaunchFacts

DEFAULT_TIMEOUT_S = 1800


def initialize(
    facts: LaunchFacts, layout: Layout, *, backend: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> ParallelContext:
    """Make the process groups and say where this process stands.

    Args:
        facts: Of `detect`; its world size equals the layout's.
        layout: Ranks along each axis.
        backend: `nccl` or `gloo`; by default nccl with a GPU, gloo without.
        timeout_s: How long a collective may wait before every rank gives up.
    """
    assert facts.world_size == layout.world_size, (facts, layout)
    if facts.launcher != "python":
        end_with_parent()
    write_environment(facts, backend=backend)
    use_cuda = torch.cuda.is_available() and backend != "gloo"
    device = torch.device("cuda", facts.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group(facts, backend=backend or ("nccl" if use_cuda else "gloo"), timeout_s=timeout_s)
    return make_context(layout, rank=facts.rank, local_rank=facts.local_rank, device=device)


def write_environment(facts: LaunchFacts, *, backend: str | None = None) -> None:
    """Say in the environment what DeepSpeed and torch look for there, whichever launcher started us."""
    os.environ.update(
        RANK=str(facts.rank),
        WORLD_SIZE=str(facts.world_size),
        LOCAL_RANK=str(facts.local_rank),
        LOCAL_SIZE=str(facts.local_size),
        MASTER_ADDR=facts.host,
        MASTER_PORT=str(facts.port),
    )
    os.environ.setdefault("CROSS_RANK", str(facts.rank // max(1, facts.local_size)))
    os.environ.setdefault("CROSS_SIZE", str(max(1, facts.world_size // max(1, facts.local_size))))
    choose_accelerator(backend)


def choose_accelerator(backend: str | None = None) -> None:
    """Tell DeepSpeed, before it is imported, what this run computes on: it would guess, and not know of `backend`.

    Raises:
        MachineError: NCCL is asked for, and there is no GPU.
    """
    if backend == "nccl" and not torch.cuda.is_available():
        raise MachineError("--backend nccl needs a GPU, and torch sees none here; use --backend gloo, or leave it out")
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _init_process_group(facts: LaunchFacts, *, backend: str, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    if facts.world_size == 1:
        # a store in this process: one rank needs no port, so any number of runs share a machine
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(backend, rank=facts.rank, world_size=facts.world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise MachineError(
            f"rank {facts.rank} of {facts.world_size} cannot meet the others at {facts.host}:{facts.port}: {error}; "
            "are all processes started, can their nodes reach each other, is the port free on rank 0?"
        ) from error


def make_context(
    layout: Layout, *, rank: int, local_rank: int = 0, device: torch.device | str = "cpu"
) -> ParallelContext:
    """Groups along each axis, on an initialised `torch.distributed`; every rank calls it."""
    coord = layout.coord(rank)
    return ParallelContext(
        layout=layout,
        rank=rank,
        local_rank=local_rank,
        coord=coord,
        device=torch.device(device),
        pipe=_axis("pipe", layout.pipe_groups, rank=rank),
        data=_axis("data", layout.data_groups, rank=rank),
        tensor=_axis("tensor", layout.tensor_groups, rank=rank),
    )


def _axis(name: str, groups: tuple[tuple[int, ...], ...], *, rank: int) -> Axis:
    """This rank's handle on an axis. `new_group` is collective: every rank creates every group, in the same order."""
    mine = Axis.single(name)
    for ranks in groups:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks))
        if rank in ranks:
            mine = Axis(name, size=len(ranks), rank=ranks.index(rank), group=group)
    return mine


def end_with_parent() -> None:
    """Ask the kernel to end this process when its launcher dies, so that no worker is left behind (Linux only).

    It comes as SIGTERM, so that a training run saves first.
    """
    if not sys.platform.startswith("linux"):
        return
    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # the launcher died between the two lines: the signal will never come
        os.kill(os.getpid(), signal.SIGTERM)


def launcher_is_gone() -> Callable[[], bool]:
    """A question to ask now and then: has the `deepspeed` command that started our parent died?

    `deepspeed` starts a second process on this node, which is our parent and outlives it unnoticed; the kernel's signal
    comes for the parent alone. Any other launcher is the parent itself: always False.
    """
    parent = os.getppid()
    runner = _parent_of(parent)
    if "deepspeed.launcher.launch" not in _command_of(parent) or "deepspeed" not in _command_of(runner):
        return lambda: False
    return lambda: os.getppid() != parent or _parent_of(parent) != runner


def _parent_of(pid: int | None) -> int | None:
    """Source: proc(5), field 4 of `/proc/PID/stat`."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def _command_of(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def shut_down() -> None:
    """Leave the process groups; ranks wait for each other nowhere here, so a failing one can end."""
    if dist.is_initialized():
        dist.destroy_process_group()
