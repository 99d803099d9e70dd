"""Small objects and numbers between ranks; one rank's failure while a run is set up."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from internlm_ds.errors import CheckpointDamagedError, ConfigError, InternlmDsError, MachineError
from internlm_ds.layout.ranks import Layout
from internlm_ds.parallel import launch
from internlm_ds.parallel.comm import ProcessComm
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.parallel.environment import LaunchFacts
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.train.together import together


def test_objects_and_numbers_between_three_ranks():
    answers = run_ranks(_talk, Layout(data=3))
    assert [a["gather"] for a in answers] == [[{"rank": 0}, {"rank": 1}, {"rank": 2}], None, None]
    assert [a["broadcast"] for a in answers] == [("from", 0)] * 3
    assert [a["any"] for a in answers] == [(True, False)] * 3
    assert [a["largest"] for a in answers] == [15] * 3
    assert [a["size"] for a in answers] == [(0, 3), (1, 3), (2, 3)]
    said = ["rank 1: bad on 1", "bad on 1", "bad on 2"]
    assert [a["failure"] for a in answers] == [("CheckpointDamagedError", text, 4, True) for text in said]


def _talk(context: ParallelContext) -> dict:
    comm = ProcessComm(context.device)
    rank = context.rank
    assert together(comm, lambda: rank * 2) == rank * 2

    def fail_on_all_but_0() -> None:
        if rank > 0:
            raise CheckpointDamagedError(f"bad on {rank}")

    failure = None
    try:
        together(comm, fail_on_all_but_0)
    except InternlmDsError as error:
        failure = (type(error).__name__, str(error), error.exit_code, error.on_all_ranks)
    comm.barrier()
    return {
        "gather": comm.gather({"rank": rank}),
        "broadcast": comm.broadcast(("from", rank)),
        "any": (comm.any(rank == 1), comm.any(False)),
        "largest": comm.largest([2, 15, 0][rank]),
        "size": (comm.rank, comm.world_size),
        "failure": failure,
    }


def test_axes_of_four_ranks():
    answers = run_ranks(_axes, Layout(pipe=2, data=2))
    assert answers == [(2, 2, rank // 2, rank % 2) for rank in range(4)]


def _axes(context: ParallelContext) -> tuple[int, ...]:
    """Sizes of the groups, and this rank's place in each, as torch says."""
    groups = context.pipe.group, context.data.group
    assert context.tensor.group is None and dist.get_world_size() == 4
    return *map(dist.get_world_size, groups), *(dist.get_group_rank(group, context.rank) for group in groups)


@pytest.fixture
def own_environment(monkeypatch):
    """Whatever a test writes there is gone afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_one_process_needs_no_port(own_environment):
    context = launch.initialize(LaunchFacts("python", port=1), Layout())
    try:
        comm = ProcessComm()
        assert (comm.rank, comm.world_size, comm.gather(5), comm.broadcast(6), comm.any(True)) == (0, 1, [5], 6, True)
        assert context == ParallelContext.single() and context.is_log_rank
        comm.barrier()
        with pytest.raises(ConfigError, match=r"^wrong$") as error:
            together(comm, _raise_wrong)
        assert error.value.on_all_ranks
    finally:
        launch.shut_down()
    assert not dist.is_initialized()


def _raise_wrong() -> None:
    raise ConfigError("wrong")


def test_the_environment_that_deepspeed_reads(own_environment):
    for name in ("CROSS_RANK", "CROSS_SIZE", "DS_ACCELERATOR"):
        os.environ.pop(name, None)
    launch.write_environment(LaunchFacts("slurm", 9, 16, local_rank=1, local_size=8, host="a", port=5))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")
    assert [os.environ[name] for name in names] == ["9", "16", "1", "8", "a", "5", "1", "2"]
    launch.choose_accelerator("gloo")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_nccl_without_a_gpu(own_environment):
    with pytest.raises(
        MachineError, match=r"^--backend nccl needs a GPU, and torch sees none here; use --backend gloo"
    ):
        launch.choose_accelerator("nccl")


def test_rank_0_that_cannot_be_reached(own_environment):
    facts = LaunchFacts("torch", 1, 2, local_rank=1, local_size=2, host="127.0.0.1", port=1)
    with pytest.raises(MachineError, match=r"^rank 1 of 2 cannot meet the others at 127.0.0.1:1: .* is the port free"):
        launch.initialize(facts, Layout(data=2), timeout_s=1)


def test_only_deepspeed_leaves_a_launcher_behind(monkeypatch):
    family = {"parents": {50: 40}, "commands": {50: "python -u -m deepspeed.launcher.launch x", 40: "python deepspeed"}}
    monkeypatch.setattr(launch.os, "getppid", lambda: 50)
    monkeypatch.setattr(launch, "_parent_of", lambda pid: family["parents"].get(pid))
    monkeypatch.setattr(launch, "_command_of", lambda pid: family["commands"].get(pid, ""))
    gone = launch.launcher_is_gone()
    assert not gone()
    family["parents"][50] = 1
    assert gone()
    # torchrun in a shell that was closed goes on
    family["commands"] = {50: "python torchrun", 1: "init"}
    other = launch.launcher_is_gone()
    family["parents"][50] = 2
    assert not other()
