"""Which weights a run starts from: its own checkpoints, then what it was told, then new ones."""

from __future__ import annotations

import pytest
import torch

from internlm_ds.checkpoint.formats import hf, internlm, native
from internlm_ds.checkpoint.manager import PARTS, Start, content_parts, detect, find_checkpoints, plan_start
from internlm_ds.config.schema import CkptConfig, LoadInfo
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.ranks import Layout

ALL = frozenset(PARTS)


class Config:
    """As much of a configuration as is looked at."""

    def __init__(self, save=None, **ckpt):
        self.ckpt = CkptConfig(enable_save_ckpt=save is not None, save_ckpt_folder=save and str(save), **ckpt)


@pytest.fixture
def save(tiny_weights, tiny_arch):
    def write(folder, *, step, optimizer=True):
        fragments = [native.Fragment(n, k, 0, w.flatten()) for n, w in tiny_weights.items() for k in native.KINDS]
        return native.save(
            folder,
            weights=tiny_weights.items(),
            fragments=fragments if optimizer else (),
            train_state={"step_count": step},
            config_text="",
            layout=Layout(),
            arch=tiny_arch,
            dtype="float32",
        )

    return write


@pytest.fixture
def weights_folder(tmp_path, tiny_weights, tiny_arch):
    """InternLM weights."""
    folder = tmp_path / "given"
    folder.mkdir()
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=2)
    return folder


def damage(folder):
    (folder / "train_state.json").write_text("{}")


def test_new_run_starts_from_new_weights(tmp_path):
    start = plan_start(Config(tmp_path / "run"))
    assert start == Start(None, None, frozenset(), start.reason)
    assert start.reason == (
        f"model, optimizer, scheduler, sampler start anew (nothing to resume in {tmp_path / 'run'})"
    )
    assert not start.is_resume and not start.refresh_masters
    assert not (tmp_path / "run").exists(), "looking changes nothing"


def test_newest_own_checkpoint_is_resumed(tmp_path, save, weights_folder):
    for folder, step in (("9", 9), ("10", 10), ("snapshot/0", 12), ("snapshot/1", 8)):
        save(tmp_path / "run" / folder, step=step)
    start = plan_start(Config(f"local:{tmp_path}/run", load_ckpt_info=LoadInfo(str(weights_folder))))
    assert (start.path, start.kind, start.step, start.parts) == (tmp_path / "run/snapshot/0", "native", 12, ALL)
    assert start.is_resume and not start.refresh_masters
    assert start.reason == (
        f"model, optimizer, scheduler, sampler from {tmp_path}/run/snapshot/0 (native, auto_resume, step 12)"
    )


def test_normal_checkpoint_wins_over_a_snapshot_of_the_same_step(tmp_path, save):
    save(tmp_path / "run/snapshot/0", step=4)
    save(tmp_path / "run/4", step=4)
    assert plan_start(Config(tmp_path / "run")).path == tmp_path / "run/4"


def test_snapshots_kept_elsewhere_are_found(tmp_path, save):
    save(tmp_path / "run/4", step=4)
    save(tmp_path / "elsewhere/0", step=6)
    config = Config(tmp_path / "run", snapshot_ckpt_folder=str(tmp_path / "elsewhere"))
    assert plan_start(config).path == tmp_path / "elsewhere/0"


def test_damaged_checkpoint_is_passed_over(tmp_path, save):
    for step in (5, 10):
        save(tmp_path / "run" / str(step), step=step)
    damage(tmp_path / "run/10")
    start = plan_start(Config(tmp_path / "run"))
    assert start.path == tmp_path / "run/5"
    assert start.reason.endswith("1 newer but damaged passed over")
    assert "train_state.json" in start.warnings[0] and "falling back to an older checkpoint" in start.warnings[0]


def test_damaged_manifest_is_passed_over(tmp_path, save):
    for step in (5, 10):
        save(tmp_path / "run" / str(step), step=step)
    (tmp_path / "run/10/manifest.json").write_bytes(b"{}")
    assert plan_start(Config(tmp_path / "run")).step == 5


def test_only_damaged_ones_stop_the_run(tmp_path, save, run_threads):
    save(tmp_path / "run/5", step=5)
    damage(tmp_path / "run/5")
    with pytest.raises(
        CheckpointDamagedError, match=r"no good checkpoint is left(.|\n)*ckpt\.auto_resume=False"
    ) as caught:
        plan_start(Config(tmp_path / "run"))
    assert caught.value.exit_code == 4
    for result in run_threads(2, lambda comm: plan_start(Config(tmp_path / "run"), comm=comm)):
        assert isinstance(result, CheckpointDamagedError)


def test_ranks_agree(tmp_path, save, run_threads):
    for step in (5, 10):
        save(tmp_path / "run" / str(step), step=step)
    damage(tmp_path / "run/10")
    starts = run_threads(3, lambda comm: plan_start(Config(tmp_path / "run"), comm=comm))
    assert [start.path for start in starts] == [tmp_path / "run/5"] * 3


def test_unfinished_folders_are_not_looked_at(tmp_path, save):
    save(tmp_path / "run/.tmp-7-abcd", step=7)
    (tmp_path / "run/8").mkdir()
    assert plan_start(Config(tmp_path / "run")).path is None


def test_internlm_folder_among_the_own_gives_its_weights(tmp_path, weights_folder):
    (tmp_path / "run").mkdir()
    weights_folder.rename(tmp_path / "run/7")
    (tmp_path / "run/7/7.step").touch()
    start = plan_start(Config(tmp_path / "run"))
    assert (start.kind, start.step, start.parts, start.refresh_masters) == ("internlm", 7, {"model"}, True)
    assert "files of its other parts are not there" in start.reason
    (tmp_path / "run/7/model_tp0_pp0.pt").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"without model_tp0_pp0\.pt"):
        plan_start(Config(tmp_path / "run"))


def test_load_ckpt_info_counts_when_there_is_nothing_to_resume(tmp_path, weights_folder, tiny_arch, tiny_weights):
    info = LoadInfo(f"local:{weights_folder}", content=("model",))
    for config, why in (
        (Config(tmp_path / "run", load_ckpt_info=info), f"nothing to resume in {tmp_path}/run"),
        (Config(None, load_ckpt_info=info), "nothing to resume: saving is off"),
        (Config(tmp_path / "run", load_ckpt_info=info, auto_resume=False), "nothing to resume: auto_resume is off"),
    ):
        start = plan_start(config)
        assert (start.path, start.kind, start.parts) == (weights_folder, "internlm", {"model"})
        assert start.refresh_masters
        assert start.reason == (
            f"model from {weights_folder} (internlm, load_ckpt_info; {why}); optimizer, scheduler, sampler start anew"
        )
        assert torch.equal(start.weights(tiny_arch)["head.weight"], tiny_weights["head.weight"])


def test_saving_off_looks_nowhere(tmp_path, save):
    save(tmp_path / "run/5", step=5)
    config = Config(None)
    object.__setattr__(config.ckpt, "save_ckpt_folder", str(tmp_path / "run"))
    assert plan_start(config).path is None


def test_missing_path_is_an_error_never_new_weights(tmp_path):
    config = Config(None, load_ckpt_info=LoadInfo("local:llm_ckpts/xxxx", content=("model",)))
    with pytest.raises(
        CheckpointError, match="names local:llm_ckpts/xxxx, but llm_ckpts/xxxx does not exist; give"
    ) as caught:
        plan_start(config)
    assert caught.value.exit_code == 2
    start = plan_start(config, dry_run=True)
    assert "a run would stop here" in start.reason and start.warnings
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is no folder"):
        plan_start(Config(None, load_ckpt_info=LoadInfo(str(tmp_path / "file"))))


def test_native_and_hf_folders_can_be_named(tmp_path, save, tiny_weights, tiny_arch, tiny_model):
    save(tmp_path / "5", step=5)
    start = plan_start(Config(None, load_ckpt_info=LoadInfo(str(tmp_path / "5"), ("optimizer",), "native")))
    assert (start.kind, start.parts, start.step) == ("native", {"optimizer"}, 5)
    assert not start.refresh_masters
    start = plan_start(Config(None, load_ckpt_info=LoadInfo(str(tmp_path / "5"))))
    assert start.kind == "native" and start.is_resume, "a config that names no type takes what is there"
    assert torch.equal(start.weights(tiny_arch)["norm.weight"], tiny_weights["norm.weight"])
    (tmp_path / "hf").mkdir()
    hf.write(tmp_path / "hf", tiny_weights, model=tiny_model, arch=tiny_arch, dtype=torch.float32)
    start = plan_start(Config(None, load_ckpt_info=LoadInfo(str(tmp_path / "hf"), ("model",), "hf_llama")))
    assert start.kind == "hf"
    assert torch.equal(start.weights(tiny_arch)["norm.weight"], tiny_weights["norm.weight"])


def test_named_native_checkpoint_is_checked(tmp_path, save):
    save(tmp_path / "5", step=5)
    damage(tmp_path / "5")
    config = Config(None, load_ckpt_info=LoadInfo(str(tmp_path / "5"), ("model",), "native"))
    with pytest.raises(CheckpointDamagedError, match="train_state"):
        plan_start(config)
    assert plan_start(config, verify=False).step == 5


def test_parts_that_a_checkpoint_lacks(tmp_path, save, weights_folder):
    save(tmp_path / "5", step=5, optimizer=False)
    for folder, why in (
        (weights_folder, "its other parts are not there"),
        (tmp_path / "5", "it holds the weights only"),
    ):
        start = plan_start(Config(None, load_ckpt_info=LoadInfo(str(folder))))
        assert start.parts == {"model"} and why in start.reason
        for content in (("model", "optimizer"), ("Sampler",)):
            with pytest.raises(CheckpointError, match=rf'cannot be loaded from .*{why}.*content=\("model",\)'):
                plan_start(Config(None, load_ckpt_info=LoadInfo(str(folder), content)))


def test_folder_of_checkpoints_says_which_it_holds(tmp_path, save):
    save(tmp_path / "run/5", step=5)
    with pytest.raises(
        CheckpointError, match="no checkpoint of any known format; it holds checkpoints, name one of them: 5"
    ):
        plan_start(Config(None, load_ckpt_info=LoadInfo(str(tmp_path / "run"))))


def test_type_must_be_known_and_right(tmp_path, weights_folder):
    for kind, message in (
        ("mine", "ckpt_type = 'mine' cannot be loaded by this version; it loads native, internlm"),
        ("llama", "ckpt_type = 'llama', but .* is a checkpoint of type 'internlm'"),
        ("native", "ckpt_type = 'native', but .* is a checkpoint of type 'internlm'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plan_start(Config(None, load_ckpt_info=LoadInfo(str(weights_folder), ckpt_type=kind)))


def test_older_keys(tmp_path, weights_folder, save):
    start = plan_start(Config(None, load_model_only_folder=str(weights_folder)))
    assert start.parts == {"model"} and "load_model_only_folder" in start.reason
    save(tmp_path / "5", step=5)
    assert plan_start(Config(None, load_ckpt_folder=str(tmp_path / "5"))).parts == {"model", "optimizer", "sampler"}
    start = plan_start(Config(None, load_ckpt_folder=str(tmp_path / "5"), load_optimizer=False))
    assert start.parts == {"model", "sampler"} and start.refresh_masters
    with pytest.raises(CheckpointError, match="are both set; keep one"):
        plan_start(Config(None, load_ckpt_folder="a", load_model_only_folder="b"))


def test_storage_this_version_lacks_is_refused_before_anything(tmp_path):
    for config in (Config("volc:vc://bucket.host/run"), Config(None, load_ckpt_info=LoadInfo("ali://bucket.host/5"))):
        with pytest.raises(CheckpointError, match=r"is not supported; .* write boto3:s3://bucket"):
            plan_start(config)


def test_a_dry_run_asks_no_store():
    start = plan_start(Config(None, load_ckpt_info=LoadInfo("s3://bucket.127.0.0.1:9/5")), dry_run=True)
    assert start.path is None and "is looked at when the run starts" in start.warnings[0]


def test_content_names_parts_in_any_case():
    assert content_parts(("Model", "SAMPLER")) == {"model", "sampler"}
    assert content_parts("all") == content_parts(("all", "model")) == ALL
    with pytest.raises(CheckpointError, match="optimiser is not among model, optimizer, scheduler, sampler, all"):
        content_parts(("model", "optimiser"))
    with pytest.raises(CheckpointError, match="nothing is not among"):
        content_parts(())


def test_detection(tmp_path, save, weights_folder):
    save(tmp_path / "5", step=5)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").touch()
    assert detect(tmp_path / "hf") is None
    (tmp_path / "hf/pytorch_model-00001-of-00002.bin").touch()
    found = [detect(tmp_path / name) for name in ("5", "given", "hf", "gone")] + [detect(tmp_path)]
    assert found == ["native", "internlm", "hf", None, None]


def test_search_survives_a_circle_of_links(tmp_path, save):
    save(tmp_path / "run/5", step=5)
    (tmp_path / "run/again").symlink_to(tmp_path / "run")
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [5]
