"""Who started this process: the only reader of RANK, WORLD_SIZE and their relatives. Imports no torch.

Four doors lead here: the `deepspeed` launcher, `torchrun`, `srun` and plain `python` for one process. `detect` reads
the environment into a `LaunchFacts`; `launch` makes the process groups from it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from internlm_ds.errors import LayoutError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class LaunchFacts:
    """What the environment says about this process.

    Attributes:
        launcher: `deepspeed`, `torch`, `slurm` or `python`.
        rank, world_size: Among all processes of the job.
        local_rank, local_size: Among those of this node.
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
        host, port: Override where rank 0 listens.
        local_rank: What `--local_rank` said, -1 or None when it was not given.
        environ: The environment; `os.environ` by default.
    Raises:
        LayoutError: The launcher asked for left no trace, or `--local_rank` contradicts LOCAL_RANK.
    """
    env = os.environ if environ is None else environ
    found = _found_launcher(env)
    if launcher not in ("auto", found):
        if launcher == "deepspeed" and found == "torch":
            found = "deepspeed"
        elif launcher == "torch" and found == "deepspeed":
            found = "torch"
        else:
            raise LayoutError(
                f"--launcher {launcher}: the environment shows {found!r}; "
                f"{_TRACES[launcher]} must be set, or leave --launcher at auto"
            )
    facts = _from_slurm(env) if found == "slurm" else _from_variables(env, launcher=found)
    if local_rank is not None and local_rank >= 0 and found != "python" and local_rank != facts.local_rank:
        raise LayoutError(f"--local_rank {local_rank} contradicts LOCAL_RANK={facts.local_rank} of the environment")
    return replace(facts, host=host or facts.host, port=port or facts.port)


_TRACES = {
    "deepspeed": "RANK, WORLD_SIZE and LOCAL_RANK",
    "torch": "RANK, WORLD_SIZE and LOCAL_RANK",
    "slurm": "SLURM_PROCID and SLURM_NTASKS",
    "python": "nothing",
}


def _found_launcher(env: Mapping[str, str]) -> str:
    if "RANK" in env and "WORLD_SIZE" in env:
        # the deepspeed launcher sets CROSS_SIZE, torchrun sets TORCHELASTIC_RUN_ID
        return "deepspeed" if "CROSS_SIZE" in env and "TORCHELASTIC_RUN_ID" not in env else "torch"
    # an interactive allocation sets SLURM_JOB_ID for a plain shell too; SLURM_PROCID comes from srun alone,
    # and a `bash` step of one task is a plain process
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", env.get("SLURM_NPROCS", "1"))) > 1:
        return "slurm"
    return "python"


def _from_variables(env: Mapping[str, str], *, launcher: str) -> LaunchFacts:
    if launcher == "python":
        return LaunchFacts("python")
    try:
        world_size = int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", env["RANK"]))
        return LaunchFacts(
            launcher,
            rank=int(env["RANK"]),
            world_size=world_size,
            local_rank=local_rank,
            local_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(world_size)))),
            host=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env.get("MASTER_PORT", str(DEFAULT_PORT))),
        )
    except (KeyError, ValueError) as error:
        raise LayoutError(
            f"the launcher's variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT are torn: {error}"
        ) from None


def _from_slurm(env: Mapping[str, str]) -> LaunchFacts:
    rank = int(env["SLURM_PROCID"])
    world_size = int(env.get("SLURM_NTASKS", env.get("SLURM_NPROCS", "1")))
    node_list = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1")))
    # a step's port must differ from that of another job on the node: derived from the job, the same on all its ranks
    port = 15000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    return LaunchFacts(
        "slurm",
        rank=rank,
        world_size=world_size,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_size=_slurm_tasks_on_node(env, world_size=world_size),
        host=env.get("MASTER_ADDR") or _first_host(node_list),
        port=int(env.get("MASTER_PORT", str(port))),
    )


def _slurm_tasks_on_node(env: Mapping[str, str], *, world_size: int) -> int:
    """Tasks on this node from `SLURM_TASKS_PER_NODE` (`8(x2),4`) or `SLURM_NTASKS_PER_NODE`."""
    text = env.get("SLURM_NTASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(world_size)))
    match = re.match(r"\d+", text)
    return int(match.group()) if match else world_size


def _first_host(node_list: str) -> str:
    """First host of a Slurm node list: `node[3-5,9],other` -> `node3`.

    >>> _first_host("node[003-005,9],other")
    'node003'
    >>> _first_host("SH-IDC1-10-140-0-[135,136]")
    'SH-IDC1-10-140-0-135'
    >>> _first_host("alone")
    'alone'
    """
    if "[" not in node_list.split(",", 1)[0]:
        return node_list.split(",", 1)[0]
    try:
        out = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
        return out.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        prefix, _, rest = node_list.partition("[")
        return prefix + re.split(r"[-,\]]", rest, maxsplit=1)[0]
