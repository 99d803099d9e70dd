"""The native format: any slice comes back, nothing half-written is seen, every flipped bit is noticed, ranks agree."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace

import pytest
import torch

from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.formats.native import Fragment
from internlm_ds.checkpoint.storage.local import LocalStorage
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.ranks import Layout


def fragments_of(weights, *, cuts):
    """All kinds of optimizer state, every parameter cut at the same fractions."""
    for name, weight in weights.items():
        flat = weight.flatten()
        borders = [0, *(int(flat.numel() * cut) for cut in cuts), flat.numel()]
        for number, kind in enumerate(native.KINDS):
            for start, stop in itertools.pairwise(borders):
                yield Fragment(name, kind, start, flat[start:stop] + number)


def save(folder, weights, arch, **changes):
    settings = {
        "weights": weights.items(),
        "fragments": fragments_of(weights, cuts=(0.3, 0.31)),
        "rng_state": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "train_state": {"step_count": 5, "loss_scale": 0.1},
        "config_text": "a = 1\n",
        "layout": Layout(),
        "arch": arch,
        "dtype": torch.float32,
    }
    return native.save(folder, **{**settings, **changes})


def test_everything_comes_back(tmp_path, tiny_weights, tiny_arch, tiny_model):
    model = replace(tiny_model, rope_base=5000.0)
    checkpoint = native.open(save(tmp_path / "5", tiny_weights, tiny_arch, model=model))
    assert checkpoint.step == 5
    assert checkpoint.train_state == {"step_count": 5, "loss_scale": 0.1}
    assert checkpoint.config_text == "a = 1\n"
    assert checkpoint.layout == Layout()
    assert checkpoint.dtype == "float32"
    assert checkpoint.model_config == model
    assert checkpoint.kinds == native.KINDS
    for name, weight in tiny_weights.items():
        assert torch.equal(checkpoint.weight(name), weight)
        flat = weight.flatten()
        for start, stop in ((0, flat.numel()), (1, flat.numel() - 1), (flat.numel() // 3, flat.numel() // 2)):
            found = checkpoint.fragment(name, "exp_avg", start, stop - start)
            assert torch.equal(found, flat[start:stop] + 1), (name, start, stop)
    state = checkpoint.rng_state(0)
    assert torch.equal(state["torch"], torch.get_rng_state()) and state["python"] == random.getstate()
    assert checkpoint.rng_state(1) is None


def test_fragments_in_bf16_reach_a_reader_as_fp32(tmp_path, tiny_weights, tiny_arch):
    rounded = [replace(f, tensor=f.tensor.bfloat16()) for f in fragments_of(tiny_weights, cuts=(0.5,))]
    checkpoint = native.open(save(tmp_path / "5", tiny_weights, tiny_arch, fragments=rounded))
    for name, weight in tiny_weights.items():
        found = checkpoint.fragment(name, "exp_avg_sq", 0, weight.numel())
        assert found.dtype == torch.float32 and found.equal((weight.flatten() + 2).bfloat16().float())
    size = sum(path.stat().st_size for path in checkpoint.folder.glob("optimizer-*"))
    wide = save(tmp_path / "6", tiny_weights, tiny_arch, fragments=fragments_of(tiny_weights, cuts=(0.5,)))
    assert size < 0.75 * sum(path.stat().st_size for path in wide.glob("optimizer-*"))


def test_folder_holds_what_the_manifest_lists_and_nothing_else(tmp_path, tiny_weights, tiny_arch):
    folder = save(tmp_path / "5", tiny_weights, tiny_arch)
    listed = set(native.open(folder).manifest.files)
    assert {path.name for path in folder.iterdir()} == listed | {"manifest.json"}
    assert all(path.stat().st_size for path in folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_ranks_write_their_share(tmp_path, tiny_weights, tiny_arch, run_threads):
    names = list(tiny_weights)
    halves = [dict(list(tiny_weights.items())[:10]), dict(list(tiny_weights.items())[10:])]
    everything = list(fragments_of(tiny_weights, cuts=(0.5,)))

    def work(comm):
        return save(
            tmp_path / "5",
            halves[comm.rank],
            tiny_arch,
            comm=comm,
            fragments=everything[comm.rank :: 2],
            rng_state={"seed": comm.rank},
            layout=Layout(pipe=2),
        )

    assert run_threads(2, work) == [tmp_path / "5"] * 2
    checkpoint = native.open(tmp_path / "5")
    assert checkpoint.layout == Layout(pipe=2)
    assert [checkpoint.rng_state(rank) for rank in range(3)] == [{"seed": 0}, {"seed": 1}, None]
    assert sorted(checkpoint.weight_names) == sorted(names)
    for name, weight in tiny_weights.items():
        assert torch.equal(checkpoint.fragment(name, "master", 0, weight.numel()), weight.flatten())


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_on_one_rank_is_raised_on_all(tmp_path, tiny_weights, tiny_arch, run_threads, failing):
    def broken():
        yield from ()
        raise OSError(28, "No space left on device")

    def work(comm):
        weights = tiny_weights if comm.rank != failing else {}
        return save(tmp_path / "5", weights, None, comm=comm, fragments=broken() if comm.rank == failing else ())

    results = run_threads(2, work)
    for result in results:
        assert isinstance(result, CheckpointError) and not isinstance(result, CheckpointDamagedError)
        assert f"saving {tmp_path / '5'} failed: rank {failing}: OSError" in str(result)
        assert "No space left on device" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_checkpoint(tmp_path, tiny_weights, tiny_arch):
    save(tmp_path / "5", tiny_weights, tiny_arch)
    with pytest.raises(CheckpointError, match=r"head\.weight: written by no rank"):
        save(tmp_path / "5", {k: v for k, v in tiny_weights.items() if k != "head.weight"}, tiny_arch, fragments=())
    assert torch.equal(native.open(tmp_path / "5").weight("head.weight"), tiny_weights["head.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_saving_a_step_again_replaces_it(tmp_path, tiny_weights, tiny_arch):
    save(tmp_path / "5", tiny_weights, tiny_arch)
    save(tmp_path / "5", {name: weight + 1 for name, weight in tiny_weights.items()}, tiny_arch)
    assert torch.equal(native.open(tmp_path / "5").weight("head.weight"), tiny_weights["head.weight"] + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_step_comes_from_the_train_state_the_caller_or_the_folder(tmp_path, tiny_weights, tiny_arch):
    assert native.open(save(tmp_path / "snapshot" / "0", tiny_weights, tiny_arch)).step == 5
    assert native.open(save(tmp_path / "7", tiny_weights, tiny_arch, train_state={})).step == 7
    assert native.open(save(tmp_path / "7", tiny_weights, tiny_arch, step=9)).step == 9


def test_incomplete_sets_are_refused(tmp_path, tiny_weights, tiny_arch, run_threads):
    flat = tiny_weights["norm.weight"].flatten()
    weights = {"norm.weight": flat}
    cases = [
        ([Fragment("norm.weight", "master", 0, flat[:4])], "master of norm.weight: 4 elements of 16 were written"),
        ([Fragment("norm.weight", "master", 4, flat[4:])], "master of norm.weight: elements 0 to 4 are missing"),
        (
            [Fragment("norm.weight", "master", 0, flat), Fragment("norm.weight", "master", 8, flat[8:])],
            "master of norm.weight: elements 8 to 16 are written twice",
        ),
        ([Fragment("other", "master", 0, flat)], "master of other: no such parameter"),
    ]
    for fragments, message in cases:
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "5", weights, None, fragments=fragments)
    for result in run_threads(2, lambda comm: save(tmp_path / "5", weights, None, comm=comm, fragments=())):
        assert "norm.weight: written by 2 ranks" in str(result)
    for message in ("no such parameter", r"shape \[16\], the model has \[24, 16\]"):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "5", {"embedding.weight": flat, "stray": flat}, tiny_arch, fragments=())


def test_disk_that_other_ranks_do_not_share_is_noticed(tmp_path, tiny_weights):
    class Forgetful(LocalStorage):
        def make_temporary(self, final):
            self.folder = super().make_temporary(final)
            return self.folder

    storage = Forgetful()

    def weights():
        yield "a", torch.zeros(2)

    def fragments():
        (storage.folder / "weights-rank00000-00000.safetensors").unlink()
        yield from ()

    with pytest.raises(CheckpointError, match=r"rank 0 does not see it; is .* shared by all machines"):
        native.save(
            tmp_path / "5",
            weights=weights(),
            fragments=fragments(),
            train_state={},
            config_text="",
            layout=Layout(),
            arch=None,
            dtype="float32",
            storage=storage,
        )


def test_what_is_not_there_says_so(tmp_path, tiny_weights, tiny_arch):
    with pytest.raises(CheckpointError, match=r"is not a native checkpoint: it has no manifest\.json"):
        native.open(tmp_path)
    checkpoint = native.open(save(tmp_path / "5", tiny_weights, tiny_arch, fragments=()))
    with pytest.raises(CheckpointError, match=r"has no parameter 'x'; it has embedding\.weight, .* \(39 in all\)"):
        checkpoint.weight("x")
    with pytest.raises(
        CheckpointError, match=r"no exp_avg for elements 2 to 6 of 'norm\.weight'; it holds no optimizer"
    ):
        checkpoint.fragment("norm.weight", "exp_avg", 2, 4)


def test_weights_that_do_not_fit_are_listed_together(tmp_path, tiny_weights, tiny_arch):
    weights = {**tiny_weights, "stray.weight": torch.zeros(3), "head.weight": torch.zeros(4, 16)}
    del weights["norm.weight"]
    checkpoint = native.open(save(tmp_path / "5", weights, None, fragments=()))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_fits(tiny_arch)
    text = str(caught.value)
    assert "does not fit the model (3 parameters)" in text
    assert "norm.weight [16]: missing" in text
    assert "stray.weight [3]: the model has no such parameter" in text
    assert "head.weight: shape [4, 16] in the files, the model has [24, 16]" in text


def test_embedding_is_found_under_its_other_name(tmp_path, tiny_weights, tiny_arch):
    checkpoint = native.open(save(tmp_path / "5", tiny_weights, tiny_arch))
    other = "embedding.word_embeddings.weight"
    assert torch.equal(checkpoint.weight(other), tiny_weights["embedding.weight"])
    assert torch.equal(checkpoint.fragment(other, "master", 3, 5), tiny_weights["embedding.weight"].flatten()[3:8])


@pytest.mark.parametrize("places", [8, pytest.param(50, marks=pytest.mark.soak)])
def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path, tiny_weights, tiny_arch, places):
    folder = save(tmp_path / "5", tiny_weights, tiny_arch)
    generator = random.Random(3)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for position in {0, len(good) - 1, *(generator.randrange(len(good)) for _ in range(places))}:
            flipped = bytearray(good)
            flipped[position] ^= 1 << generator.randrange(8)
            for bad in (bytes(flipped), good[:position]):
                path.write_bytes(bad)
                with pytest.raises(CheckpointDamagedError, match=path.name):
                    native.open(folder)
        path.write_bytes(good)
    native.open(folder)


def test_missing_and_cut_files_are_named(tmp_path, tiny_weights, tiny_arch):
    folder = save(tmp_path / "5", tiny_weights, tiny_arch)
    os.truncate(folder / "train_state.json", 3)
    (folder / "config.py").unlink()
    with pytest.raises(CheckpointDamagedError) as caught:
        native.open(folder)
    assert caught.value.exit_code == 4
    assert "config.py: missing" in str(caught.value)
    assert "train_state.json: 3 bytes, the manifest says" in str(caught.value)


def test_ranks_share_the_checking_and_all_hear_of_damage(tmp_path, tiny_weights, tiny_arch, run_threads):
    folder = save(tmp_path / "5", tiny_weights, tiny_arch)
    (folder / "train_state.json").write_text("{}")
    for result in run_threads(3, lambda comm: native.open(folder, comm=comm)):
        assert isinstance(result, CheckpointDamagedError)
        assert "train_state.json" in str(result)


def test_later_format_versions_are_refused(tmp_path, tiny_weights, tiny_arch, monkeypatch):
    from internlm_ds.checkpoint import manifest

    monkeypatch.setattr(manifest, "FORMAT_VERSION", 99)
    folder = save(tmp_path / "5", tiny_weights, tiny_arch)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99; this version of internlm-ds reads up to 2"):
        native.open(folder)
