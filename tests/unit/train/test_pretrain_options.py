"""The command line of `launch/pretrain.py`, as people and launchers write it; how a Ctrl-C ends a command."""

from __future__ import annotations

import pytest

from internlm_ds.errors import guarded
from internlm_ds.train.options import DEFAULT_SEED, Options, parse


def test_defaults():
    assert parse(["--config", "a.py"]) == Options(config="a.py", seed=DEFAULT_SEED, local_rank=-1)


def test_everything():
    words = (
        "--config a.py --set a=1 --set b.c=2 --overlay x.json --overlay y.json --run-dir r --launcher slurm --seed 7"
    )
    words += " --backend gloo --host h --port 5 --world-size 8 --dry-run --profile"
    assert parse(words.split()) == Options(
        config="a.py",
        set=("a=1", "b.c=2"),
        overlay=("x.json", "y.json"),
        run_dir="r",
        launcher="slurm",
        seed=7,
        backend="gloo",
        host="h",
        port=5,
        world_size=8,
        dry_run=True,
        profile=True,
    )


@pytest.mark.parametrize("word", ["--local_rank=1", "--local-rank=1"])
def test_what_launchers_add(word):
    assert parse([word, "--config", "a.py"]).local_rank == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--conf", "a.py"], "the following arguments are required: --config"),
        (["--config", "a.py", "--dry"], "unrecognized arguments: --dry"),
        (["--config", "a.py", "--launcher", "mpi"], "invalid choice: 'mpi'"),
        (["--config", "a.py", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_command_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert guarded(interrupted) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
