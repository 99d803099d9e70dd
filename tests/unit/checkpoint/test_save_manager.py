"""Saving during a run: each step once, the last one always, alone in its folder."""

from __future__ import annotations

import pytest

from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.manager import CheckpointManager, SaveTask
from internlm_ds.config.schema import CkptConfig
from internlm_ds.errors import CheckpointError
from internlm_ds.layout.ranks import Layout


def manager(folder, **changes):
    settings = {"checkpoint_every": 4, "oss_snapshot_freq": 2, "total_steps": 10, "last_saved": None, **changes}
    rest = {key: settings.pop(key) for key in ("total_steps", "last_saved", "comm") if key in settings}
    ckpt = CkptConfig(enable_save_ckpt=folder is not None, save_ckpt_folder=folder and f"local:{folder}", **settings)
    return CheckpointManager(ckpt, **rest)


def run(checkpoints, steps):
    """Folders that are saved when a run takes these step counts, by their names below the save folder."""
    saved = []
    for step in steps:
        task = checkpoints.after_step(step)
        if task.folder is not None:
            saved.append(task.folder)
            checkpoints.saved(task, step)
        if task.stop:
            break
    task = checkpoints.at_end(step)
    if task.folder is not None:
        saved.append(task.folder)
        checkpoints.saved(task, step)
    return saved


def test_snapshots_alternate_and_normal_ones_win(tmp_path):
    with manager(tmp_path) as checkpoints:
        names = [str(path.relative_to(tmp_path)) for path in run(checkpoints, range(1, 11))]
    assert names == ["snapshot/0", "4", "snapshot/1", "8", "10"]


def test_failed_updates_save_nothing_twice(tmp_path):
    with manager(tmp_path) as checkpoints:
        names = [path.name for path in run(checkpoints, [1, 4, 4, 4, 5])]
    assert names == ["4", "5"]


def test_final_checkpoint_always(tmp_path):
    with manager(tmp_path, checkpoint_every=float("inf"), oss_snapshot_freq=float("inf")) as checkpoints:
        assert [path.name for path in run(checkpoints, [1, 2, 2, 3])] == ["3"]


def test_resumed_step_is_not_saved_again(tmp_path):
    with manager(tmp_path, last_saved=4) as checkpoints:
        assert checkpoints.after_step(4) == SaveTask()
        assert checkpoints.at_end(4) == SaveTask()


def test_saving_off(tmp_path):
    with manager(None) as checkpoints:
        assert run(checkpoints, range(1, 11)) == []


def test_stop_file(tmp_path):
    stop = tmp_path / "control" / "stop"
    with manager(tmp_path / "run", stop_file_path=str(stop)) as checkpoints:
        assert stop.read_text() == "0"
        assert checkpoints.after_step(1) == SaveTask()
        stop.write_text("3\n")
        assert checkpoints.after_step(3) == SaveTask(tmp_path / "run" / "3", stop=True)
        stop.write_text("-5")
        assert checkpoints.after_step(5) == SaveTask(tmp_path / "run" / "5")


def test_stop_file_works_without_saving(tmp_path):
    (tmp_path / "stop").write_text("3")
    with manager(None, stop_file_path=str(tmp_path / "stop")) as checkpoints:
        assert checkpoints.after_step(3) == SaveTask(stop=True)


@pytest.mark.parametrize("text", ["three", "1.5", "\xff"])
def test_stop_file_that_is_no_number_is_a_warning(tmp_path, caplog, text):
    (tmp_path / "stop").write_text(text)
    with manager(tmp_path / "run", stop_file_path=str(tmp_path / "stop")) as checkpoints:
        assert checkpoints.after_step(1) == SaveTask()
    assert "cannot be read as a whole number" in caplog.text


def test_stop_file_is_read_once_for_all_ranks(tmp_path, run_threads):
    (tmp_path / "stop").write_text("3")

    def work(comm):
        with manager(tmp_path / "run", stop_file_path=str(tmp_path / "stop"), comm=comm) as checkpoints:
            return checkpoints.after_step(3).stop

    assert run_threads(2, work) == [True, True]


def test_folder_in_use_is_refused_on_all_ranks(tmp_path, run_threads):
    def work(comm):
        return manager(tmp_path, comm=comm)

    with manager(tmp_path):
        for result in run_threads(2, work):
            assert isinstance(result, CheckpointError)
            assert "is in use by another run" in str(result)
    manager(tmp_path).close()


def test_leftovers_of_a_killed_run_go(tmp_path, caplog):
    (tmp_path / ".tmp-5-abcd").mkdir()
    (tmp_path / "snapshot" / ".tmp-0-abcd").mkdir(parents=True)
    with manager(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "snapshot"]
    assert caplog.text.count("was unfinished: removed") == 2


def test_next_snapshot_spares_the_newest(tmp_path, tiny_weights, tiny_arch):
    for slot, step in (("0", 6), ("1", 4)):
        native.save(
            tmp_path / "snapshot" / slot,
            weights=tiny_weights.items(),
            train_state={"step_count": step},
            config_text="",
            layout=Layout(),
            arch=tiny_arch,
            dtype="float32",
        )
    with manager(tmp_path, last_saved=6) as checkpoints:
        assert checkpoints.after_step(10 - 4 + 4) == SaveTask(tmp_path / "10")
        assert checkpoints.after_step(14).folder == tmp_path / "snapshot" / "1"


def test_snapshots_may_lie_elsewhere(tmp_path):
    with manager(tmp_path / "run", snapshot_ckpt_folder=f"local:{tmp_path}/fast") as checkpoints:
        assert checkpoints.after_step(2).folder == tmp_path / "fast" / "0"


def test_storage_that_is_not_built_in(tmp_path):
    with pytest.raises(CheckpointError, match=r"volc is not supported; .* write boto3:s3://b/x"):
        CheckpointManager(CkptConfig(save_ckpt_folder="volc:vc://b.host/x"), total_steps=1)
