"""Tensor and sequence parallel runs against one process: losses, norms, weights, checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_runs import Case, RankResult, accumulation_dtypes, assert_close, assert_follows, merged, train

from internlm_ds.arch import internlm as internlm_arch
from internlm_ds.checkpoint.formats import hf, internlm, native
from internlm_ds.convert.run import Request, convert
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

TP2, TP4, PP2_TP2 = Layout(tensor=2), Layout(tensor=4), Layout(pipe=2, tensor=2)
PLAIN = Case()
VOCAB_SPLIT = (("embed_split_hidden", False),)
ODD = Case(vocab=131, model=VOCAB_SPLIT)
WHOLE_LOGITS = (("embed_split_hidden", False), ("parallel_output", False))
CASES = {
    "tp2": replace(PLAIN, layout=TP2),
    "tp2-sp": replace(PLAIN, layout=TP2, mode="msp"),
    "tp4": replace(PLAIN, layout=TP4),
    "pp2-tp2": replace(PLAIN, layout=PP2_TP2),
    "pp2-tp2-sp-recompute": replace(PLAIN, layout=PP2_TP2, mode="msp", model=(*PLAIN.model, ("checkpoint", 0.5))),
    "dp2-tp2-sp": replace(PLAIN, layout=Layout(data=2, tensor=2, zero=2), mode="msp"),
    "pp2-tp2-dp2": replace(PLAIN, layout=Layout(pipe=2, data=2, tensor=2, zero=2)),
    "vocabulary-131-tp4": replace(ODD, layout=TP4),
    "vocabulary-131-tp4-sp-whole-logits": replace(ODD, layout=TP4, mode="msp", model=WHOLE_LOGITS),
}


@pytest.mark.parametrize("name", CASES)
def test_tensor_layout_follows_one_process(name: str, single, tmp_path: Path):
    case = CASES[name]
    ranks = run_ranks(train, case.layout, case.write(tmp_path), case, timeout_s=200)
    assert_follows(ranks, single(case), clip=case.clip)


@pytest.mark.parametrize("mode", ["mtp", "msp"])
def test_bf16_sums_in_fp32_on_stages_of_tensor_ranks(mode: str, single, tmp_path: Path):
    case = Case(layout=PP2_TP2, mode=mode, dtype="bfloat16", steps=6)
    ranks = run_ranks(_train_and_look, case.layout, case.write(tmp_path), case, timeout_s=200)
    whole = single(case)
    for rank in ranks:
        assert rank.extra == {"torch.float32"}
        assert_close(rank.losses, whole.losses, relative=2e-3, what="loss")
        assert_close(rank.norms, whole.norms, relative=2e-2, what="norm")
    merged(ranks, "after")  # replicas are equal


def _train_and_look(context, path: str, case: Case) -> RankResult:
    return train(context, path, case, hook=accumulation_dtypes)


def test_a_shard_without_its_flag_makes_the_norm_wrong(single, tmp_path: Path):
    """The reason why the blueprint writes the flags: the losses of the first steps would not show it."""
    case = Case(layout=TP2, steps=1)
    ranks = run_ranks(_train_without, TP2, case.write(tmp_path), case, "tensor_model_parallel", timeout_s=100)
    expected = single(Case()).outcomes[0]
    assert_close(ranks[0].losses, [expected[0]], relative=1e-5, what="loss")
    with pytest.raises(AssertionError, match="norm differs"):
        assert_close(ranks[0].norms, [expected[1]], relative=1e-4, what="norm")


def test_a_norm_without_its_flag_drifts_apart(tmp_path: Path):
    case = Case(layout=TP2, mode="msp", steps=1)
    ranks = run_ranks(_train_without, TP2, case.write(tmp_path), case, "sequence_parallel", timeout_s=100)
    with pytest.raises(AssertionError, match=r"replicas of norm\.weight differ"):
        merged(ranks, "after")


def _train_without(context, path: str, case: Case, flag: str) -> RankResult:
    return train(context, path, case, hook=lambda engine: _drop_flag(engine, flag))


def _drop_flag(engine, flag: str) -> None:
    for name, parameter in engine.logical_parameters():
        if name in ("head.weight", "norm.weight") and hasattr(parameter, flag):
            delattr(parameter, flag)
    engine._sequence_parallel_parameters = [p for p in engine._sequence_parallel_parameters if hasattr(p, flag)]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[RankResult]]:
    """A run on two tensor ranks, saved after step 5 of 10, and its results."""
    folder = tmp_path_factory.mktemp("saved")
    case = _saving(TP2, folder)
    ranks = run_ranks(train, TP2, case.write(folder), case, timeout_s=100)
    (folder / "10").rename(folder.parent / f"{folder.name}-final")
    return folder, ranks


def _saving(layout: Layout, folder: Path) -> Case:
    return replace(ODD, layout=layout, save_folder=str(folder))


def test_shards_are_written_by_their_owners_and_read_whole(saved, single):
    folder, ranks = saved
    assert_follows(ranks, single(ODD), clip=ODD.clip)
    checkpoint = native.open(folder.parent / f"{folder.name}-final")
    for name, weight in merged(ranks, "after").items():
        assert checkpoint.weight(name).equal(weight), name
        assert checkpoint.fragment(name, "master", 0, weight.numel()).equal(weight.flatten())
    files = {p.key: p.file for p in checkpoint.manifest.parameters}
    assert files["head.weight@tensor1"].startswith("weights-rank00001")
    assert files["norm.weight"].startswith("weights-rank00000") and "norm.weight@tensor1" not in files
    assert files["blocks.0.mixer.out_proj.bias"].startswith("weights-rank00000")
    sizes = {file: (checkpoint.folder / file).stat().st_size for file in files.values()}
    assert sum(sizes.values()) < 1.2 * sum(w.numel() * 4 for w in merged(ranks, "after").values())


def test_resume_on_the_same_ranks_is_bit_exact(saved, tmp_path: Path):
    _, ranks = saved
    resumed = _resume(saved, TP2, tmp_path)
    for before, after in zip(ranks, resumed, strict=True):
        assert after.first_step == 5 and after.outcomes == before.outcomes[5:]
        assert all(piece.tensor.equal(before.after[name].tensor) for name, piece in after.after.items())


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=4), Layout(data=2, tensor=2, zero=2)], ids=str)
def test_resume_on_other_ranks_is_close(layout: Layout, saved, tmp_path: Path):
    _, ranks = saved
    resumed = _resume(saved, layout, tmp_path)
    before = merged(ranks, "after")
    for rank in resumed:
        assert_close(rank.losses, ranks[0].losses[5:], relative=1e-5, what="loss")
        assert_close(rank.norms, ranks[0].norms[5:], relative=1e-4, what="norm")
    for name, weight in merged(resumed, "after").items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-5)


def test_checkpoints_of_tensor_ranks_convert_and_start_runs_on_others(saved, tmp_path: Path):
    """native of 2 tensor ranks -> InternLM's files of 1 and Hugging Face's -> a start on 4."""
    folder, ranks = saved
    final = folder.parent / f"{folder.name}-final"
    weights = merged(ranks, "after")
    for target in ("internlm", "hf"):
        convert(Request(str(final), str(tmp_path / target), None, target))
    arch = internlm_arch.build(native.open(final).model_config)
    for found in (internlm.read_weights(tmp_path / "internlm", arch=arch), hf.read_weights(tmp_path / "hf", arch=arch)):
        assert all(found[name].equal(weight) for name, weight in weights.items())
    case = replace(ODD, layout=TP4, mode="msp", steps=1, load=str(tmp_path / "internlm"))
    started = run_ranks(train, TP4, case.write(tmp_path), case, timeout_s=150)
    for name, weight in merged(started, "before").items():
        assert weight.equal(weights[name]), name
    for name, weight in merged(started, "after").items():
        # the masters were refreshed: an update moves a weight by about the learning rate, not back to a random one
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=3e-3)


def _resume(saved, layout: Layout, folder: Path) -> list[RankResult]:
    shutil.copytree(saved[0] / "5", folder / "ckpt" / "5")
    case = _saving(layout, folder / "ckpt")
    return run_ranks(train, layout, case.write(folder), case, timeout_s=150)
