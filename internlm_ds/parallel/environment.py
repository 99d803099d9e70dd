"""Who started this process: the only reader of RANK, WORLD_SIZE and their relatives. Imports no torch.

Four doors lead here: the `deepspeed` launcher, `torchrun`, `srun` and plain `python` for one process. `detect` reads
the environment into a `LaunchFacts`; `launch` makes the process groups from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from internlm_ds.errors import LayoutError

DEFAULT_PORT = 29500
ADVICE = "start it with `deepspeed`, `torchrun` or `srun`, which set them all, or unset them to train with one process"


@dataclass(frozen=True)
class LaunchFacts:
    """What the environment says about this process.

    Attributes:
        launcher: `deepspeed`, `torch`, `slurm` or `python`.
        rank, world_size: Among all processes of the job.
        local_rank, local_size: Among those of this node that share its devices.
        host, port: Where rank 0 listens; unused by a single process.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT


def detect(
    launcher: str = "auto",
    *,
    host: str | None = None,
    port: int | None = None,
    local_rank: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> LaunchFacts:
    """Recognise the launcher from the environment.

    Args:
        launcher: `auto`, or the one that must have started us.
        host, port: Where rank 0 listens, in place of the environment's word. torchrun listens itself: ignored there.
        local_rank: What `--local_rank` said, -1 or None when it was not given.
        environ: The environment; `os.environ` by default.
    Raises:
        LayoutError: The launcher asked for left no trace, the variables are torn, or `--local_rank` contradicts them.
    """
    env = os.environ if environ is None else environ
    given = local_rank if local_rank is not None and local_rank >= 0 else None
    found = _found_launcher(env, asked=launcher)
    if launcher not in ("auto", found):
        raise LayoutError(
            f"--launcher {launcher}: the environment shows {_names(found)}; "
            f"{_TRACES[launcher]} must be set, or leave --launcher at auto"
        )
    if found == "python":
        facts = _alone(given)
    else:
        facts = _from_slurm(env) if found == "slurm" else _from_variables(env, launcher=found, local_rank=given)
        _check_local_rank(given, facts, env)
    if "TORCHELASTIC_RUN_ID" in env and found != "slurm":
        return facts
    return replace(facts, host=host or facts.host, port=port or facts.port)


_TRACES = {
    "deepspeed": "RANK, WORLD_SIZE and LOCAL_RANK",
    "torch": "RANK, WORLD_SIZE and LOCAL_RANK",
    "slurm": "SLURM_PROCID and SLURM_NTASKS",
}


def _found_launcher(env: Mapping[str, str], *, asked: str) -> str:
    if asked == "slurm" and "SLURM_PROCID" in env:
        return "slurm"
    if "RANK" in env and "WORLD_SIZE" in env:
        if asked in ("deepspeed", "torch"):  # both leave the same three variables
            return asked
        # the deepspeed launcher sets CROSS_SIZE, torchrun sets TORCHELASTIC_RUN_ID
        return "deepspeed" if "CROSS_SIZE" in env and "TORCHELASTIC_RUN_ID" not in env else "torch"
    if "RANK" in env or "WORLD_SIZE" in env:
        there, lacks = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise LayoutError(f"the launcher's variables are torn: {there}={env[there]} is set, {lacks} is not; {ADVICE}")
    return "slurm" if _is_srun_step(env) else "python"


def _is_srun_step(env: Mapping[str, str]) -> bool:
    """Is this one of several tasks that `srun` started?

    An interactive allocation sets SLURM_JOB_ID for a plain shell too, but no SLURM_PROCID. A batch script's own shell
    has SLURM_PROCID=0 and the allocation's SLURM_NTASKS, but only `srun` sets SLURM_STEP_NUM_TASKS. A step of one task
    (`srun --pty bash`) is a plain process.
    """
    if "SLURM_PROCID" not in env or ("SLURM_GTIDS" in env and "SLURM_STEP_NUM_TASKS" not in env):
        return False
    return _slurm_tasks(env) > 1


def _alone(local_rank: int | None) -> LaunchFacts:
    if local_rank:
        raise LayoutError(
            f"--local_rank {local_rank}, but no launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK) are set: every "
            f"process would train alone; {ADVICE.split(', which')[0]}"
        )
    return LaunchFacts("python")


def _check_local_rank(given: int | None, facts: LaunchFacts, env: Mapping[str, str]) -> None:
    # a Slurm task that sees its own device only is local rank 0 for us, whatever its SLURM_LOCALID is
    if given in (None, facts.local_rank) or (facts.launcher == "slurm" and str(given) == env.get("SLURM_LOCALID")):
        return
    name = "SLURM_LOCALID" if facts.launcher == "slurm" else "LOCAL_RANK"
    raise LayoutError(f"--local_rank {given} contradicts {name}={env.get(name, facts.local_rank)} of the environment")


def _from_variables(env: Mapping[str, str], *, launcher: str, local_rank: int | None) -> LaunchFacts:
    rank, world_size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise LayoutError(
            f"the launcher's variables are torn: RANK={rank} is not below WORLD_SIZE={world_size}; {ADVICE}"
        )
    if "LOCAL_RANK" not in env and local_rank is None and world_size > 1:
        raise LayoutError(
            f"the launcher's variables are torn: RANK={rank} and WORLD_SIZE={world_size} are set, LOCAL_RANK is not; "
            f"{ADVICE}"
        )
    local_size = _integer(env, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE", default=world_size)
    if local_size < world_size and "MASTER_ADDR" not in env:
        raise LayoutError(
            f"{world_size} processes on nodes of {local_size}, and MASTER_ADDR does not say where rank 0 listens; "
            f"{ADVICE}"
        )
    return LaunchFacts(
        launcher,
        rank=rank,
        world_size=world_size,
        local_rank=_integer(env, "LOCAL_RANK", default=local_rank or 0),
        local_size=local_size,
        host=env.get("MASTER_ADDR", "127.0.0.1"),
        port=_integer(env, "MASTER_PORT", default=DEFAULT_PORT),
    )


def _from_slurm(env: Mapping[str, str]) -> LaunchFacts:
    rank, world_size = _integer(env, "SLURM_PROCID"), _slurm_tasks(env)
    if not 0 <= rank < world_size:
        raise LayoutError(f"Slurm's variables are torn: SLURM_PROCID={rank} is not below SLURM_NTASKS={world_size}")
    local_rank, local_size = _integer(env, "SLURM_LOCALID", default=0), _slurm_tasks_on_node(env, world_size=world_size)
    if _has_own_device(env):
        local_rank, local_size = 0, 1
    nodes = _first_of(env, "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST") or "127.0.0.1"
    # a step's port must differ from that of another job on the node: derived from the job, the same on all its ranks
    port = 15000 + _integer(env, "SLURM_JOB_ID", default=0) % 20000
    return LaunchFacts(
        "slurm",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        host=env.get("MASTER_ADDR") or first_host(nodes),
        port=_integer(env, "MASTER_PORT", default=port),
    )


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of this step; the allocation may have room for more."""
    name = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if n in env), "SLURM_NTASKS")
    return _integer(env, name, default=1)


def _slurm_tasks_on_node(env: Mapping[str, str], *, world_size: int) -> int:
    """Tasks on this node: entry SLURM_NODEID of a list like `8(x2),4`, which means 8, 8, 4."""
    text = _first_of(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text or str(world_size))
        for _ in range(int(times or 1))
    ]
    node = _integer(env, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else counts[-1] if counts else world_size


def _has_own_device(env: Mapping[str, str]) -> bool:
    """Did `--gpus-per-task` hide all devices but one from each task? It is device 0 of every task then."""
    visible = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return "SLURM_GPUS_PER_TASK" in env and len(visible) == 1


def first_host(node_list: str) -> str:
    """First host of a Slurm node list.

    >>> first_host("node[003-005,9],other")
    'node003'
    >>> first_host("SH-IDC1-10-140-0-[135,136]")
    'SH-IDC1-10-140-0-135'
    >>> first_host("rack[1-2]node[07-09]-ib,rack3node1-ib")
    'rack1node07-ib'
    >>> first_host("alone,other")
    'alone'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    assert first is not None, "an empty match is a match"
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first.group())


def _first_of(env: Mapping[str, str], *names: str) -> str | None:
    return next((env[name] for name in names if env.get(name)), None)


def _integer(env: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        found = "is not set" if text is None else f"is {text!r}"
        raise LayoutError(
            f"the launcher's variables are torn: {name} {found}, an integer is needed; {ADVICE}"
        ) from None


def _names(launcher: str) -> str:
    return "no launcher" if launcher == "python" else repr(launcher)
