"""The process groups of a run: writes what the libraries below expect in the environment, makes the groups, returns the
context.

Which process this is comes from `environment`. Nothing else in the package creates a group of ranks along an axis.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

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
    write_environment(facts)
    use_cuda = torch.cuda.is_available() and backend != "gloo"
    device = torch.device("cuda", facts.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group(facts, backend=backend or ("nccl" if use_cuda else "gloo"), timeout_s=timeout_s)
    return make_context(layout, rank=facts.rank, local_rank=facts.local_rank, device=device)


def write_environment(facts: LaunchFacts) -> None:
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
    choose_accelerator()


def choose_accelerator() -> None:
    """Tell DeepSpeed that this machine computes on its CPU; it would guess so too, with a warning."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _init_process_group(facts: LaunchFacts, *, backend: str, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    if facts.world_size == 1:
        # a store in this process: one rank needs no port, so any number of runs share a machine
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=facts.rank, world_size=facts.world_size, timeout=timeout)


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
    """Ask the kernel to end this process when its launcher dies, so that no worker is left behind (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # the launcher died between the two lines: the signal will never come
        os.kill(os.getpid(), signal.SIGTERM)


def shut_down() -> None:
    """Leave the process groups; ranks wait for each other nowhere here, so a failing one can end."""
    if dist.is_initialized():
        dist.destroy_process_group()
