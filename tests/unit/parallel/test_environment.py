"""Who started this process, from the variables that each launcher leaves; and what is said when they are torn."""

from __future__ import annotations

import subprocess
import sys

import pytest

from internlm_ds.errors import LayoutError
from internlm_ds.parallel.environment import DEFAULT_PORT, LaunchFacts, detect, first_host

DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "4711",
    "TORCHELASTIC_RUN_ID": "x",
}
# what `srun` adds to a step of an allocation, here the eleventh of 20 tasks on three nodes
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "10",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "20",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_NODELIST": "gpu[004-005,9]",
    "SLURM_STEP_NODELIST": "gpu[004-005,9]",
    "SLURM_GTIDS": "8,9,10,11,12,13,14,15",
}
# what a batch script's own shell sees of an allocation for 8 tasks
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_GTIDS": "0"}
ADVICE = "start it with `deepspeed`, `torchrun` or `srun`, which set them all, or unset them to train with one process"


def test_plain_python_is_one_process():
    assert detect(environ={}) == LaunchFacts("python")
    assert detect(environ={"LOCAL_RANK": "0"}, local_rank=0) == LaunchFacts("python")


def test_deepspeed():
    facts = detect(environ=DEEPSPEED, local_rank=1)
    assert facts == LaunchFacts("deepspeed", 9, 16, local_rank=1, local_size=8, host="node0", port=29501)


def test_torchrun():
    expected = LaunchFacts("torch", 3, 4, local_rank=1, local_size=2, host="node0", port=4711)
    assert detect(environ=TORCHRUN) == expected
    # its agent listens already: another port would leave all ranks waiting
    assert detect(environ=TORCHRUN, host="elsewhere", port=1) == expected


def test_one_process_under_a_launcher():
    assert detect(environ={"RANK": "0", "WORLD_SIZE": "1"}) == LaunchFacts("torch")
    assert detect("deepspeed", environ={"RANK": "0", "WORLD_SIZE": "1"}) == LaunchFacts("deepspeed")


def test_variables_without_a_port_take_the_default_and_options_win():
    few = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert detect(environ=few) == LaunchFacts("torch", 0, 2, local_size=2, port=DEFAULT_PORT)
    assert detect(environ=few, host="a", port=5) == LaunchFacts("torch", 0, 2, local_size=2, host="a", port=5)
    del few["LOCAL_RANK"]
    assert detect(environ={**few, "RANK": "1"}, local_rank=1).local_rank == 1


def test_srun():
    facts = detect(environ=SRUN)
    assert facts == LaunchFacts("slurm", 10, 20, local_rank=2, local_size=8, host="gpu004", port=15000 + 123456 % 20000)
    assert detect(environ={**SRUN, "SLURM_PROCID": "17", "SLURM_NODEID": "2"}).local_size == 4
    assert detect("slurm", environ=SRUN, host="10.0.0.1", port=99) == LaunchFacts(
        "slurm", 10, 20, local_rank=2, local_size=8, host="10.0.0.1", port=99
    )
    named = detect(environ={**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert (named.host, named.port) == ("head", 4000)


def test_srun_with_the_fewest_variables():
    few = {"SLURM_PROCID": "1", "SLURM_NPROCS": "2", "SLURM_LOCALID": "1"}
    assert detect(environ=few) == LaunchFacts("slurm", 1, 2, local_rank=1, local_size=2, port=15000)


def test_a_step_smaller_than_its_allocation():
    step = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_STEP_NODELIST": "gpu9", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "8"}
    facts = detect(environ=step)
    assert (facts.rank, facts.world_size, facts.local_size, facts.host) == (1, 2, 2, "gpu9")


def test_slurm_tasks_that_see_one_gpu_each():
    own = {**SRUN, "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "2"}
    assert detect(environ=own, local_rank=2) == detect(environ=own)
    assert (detect(environ=own).local_rank, detect(environ=own).local_size) == (0, 1)
    shared = {**own, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert (detect(environ=shared).local_rank, detect(environ=shared).local_size) == (2, 8)


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NODELIST": "gpu[1-2]"},
        BATCH_SCRIPT,
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["interactive allocation", "batch script", "step of one task"],
)
def test_slurm_without_several_tasks_is_one_process(environ):
    assert detect(environ=environ) == LaunchFacts("python")


def test_slurm_by_name_with_one_task():
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NODELIST": "gpu1", "SLURM_JOB_ID": "1"}
    assert detect("slurm", environ=step) == LaunchFacts("slurm", host="gpu1", port=15001)


def test_torchrun_inside_a_slurm_step():
    assert detect(environ={**SRUN, **TORCHRUN}).launcher == "torch"


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("alone", "alone"),
        ("a,b", "a"),
        ("a,node[1-2]", "a"),
        ("node[003-005,9],other", "node003"),
        ("SH-IDC1-10-140-0-[135,136]", "SH-IDC1-10-140-0-135"),
        ("rack[1-2]node[07-09]-ib,rack3node1-ib", "rack1node07-ib"),
    ],
)
def test_first_host(node_list, first):
    assert first_host(node_list) == first


@pytest.mark.parametrize(
    ("launcher", "environ", "message"),
    [
        ("slurm", {}, "--launcher slurm: the environment shows no launcher; SLURM_PROCID and SLURM_NTASKS must be set"),
        ("slurm", TORCHRUN, "--launcher slurm: the environment shows 'torch'; SLURM_PROCID and"),
        ("torch", {}, "--launcher torch: the environment shows no launcher; RANK, WORLD_SIZE and LOCAL_RANK must be"),
        (
            "deepspeed",
            SRUN,
            "--launcher deepspeed: the environment shows 'slurm'; RANK, WORLD_SIZE and LOCAL_RANK must",
        ),
    ],
)
def test_another_launcher_than_asked_for(launcher, environ, message):
    with pytest.raises(LayoutError) as error:
        detect(launcher, environ=environ)
    assert str(error.value).startswith(message) and str(error.value).endswith("or leave --launcher at auto")


@pytest.mark.parametrize("launcher", ["auto", "torch", "deepspeed"])
def test_torch_and_deepspeed_leave_the_same_variables(launcher):
    assert detect(launcher, environ=DEEPSPEED).rank == 9


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set, WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "WORLD_SIZE=4 is set, RANK is not"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "RANK=1 and WORLD_SIZE=4 are set, LOCAL_RANK is not"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK is 'one', an integer is needed"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is '', an integer is needed"),
        ({**SRUN, "SLURM_LOCALID": "?"}, "SLURM_LOCALID is '?', an integer is needed"),
    ],
)
def test_torn_variables(environ, message):
    with pytest.raises(LayoutError) as error:
        detect(environ=environ)
    assert str(error.value) == f"the launcher's variables are torn: {message}; {ADVICE}"


def test_more_of_torn_variables():
    with pytest.raises(LayoutError, match=r"^16 processes on nodes of 8, and MASTER_ADDR does not say where rank 0"):
        detect(environ={k: v for k, v in DEEPSPEED.items() if k != "MASTER_ADDR"})
    with pytest.raises(LayoutError, match=r"SLURM_PROCID=20 is not below SLURM_NTASKS=20"):
        detect(environ={**SRUN, "SLURM_PROCID": "20"})


def test_local_rank_must_agree():
    with pytest.raises(LayoutError, match=r"^--local_rank 0 contradicts LOCAL_RANK=1 of the environment$"):
        detect(environ=DEEPSPEED, local_rank=0)
    with pytest.raises(LayoutError, match=r"^--local_rank 5 contradicts SLURM_LOCALID=2 of the environment$"):
        detect(environ=SRUN, local_rank=5)
    with pytest.raises(
        LayoutError, match=r"^--local_rank 1, but no launcher's variables .* would train alone; start it"
    ):
        detect(environ={}, local_rank=1)
    assert detect(environ=DEEPSPEED, local_rank=-1) == detect(environ=DEEPSPEED, local_rank=None)


def test_no_torch_is_imported():
    code = "import sys, internlm_ds.parallel.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
