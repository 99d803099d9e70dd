"""Native checkpoints of several tensor ranks: shards go in as they are, and come out in whatever way is asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint.completeness import check_parameters
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.formats.native import Fragment, Weight
from internlm_ds.checkpoint.manifest import StoredParameter
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import holds, shard_of
from internlm_ds.parallel.shards import take

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=13, mlp_ratio=2)


@pytest.fixture
def arch() -> ModelArch:
    return internlm.build(MODEL)


@pytest.fixture
def values(arch: ModelArch) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in arch.iter_params()}


def owned(arch: ModelArch, values: dict[str, torch.Tensor], *, size: int, ranks: list[int]):
    """Weights and fragments (each flattened shard in two pieces) that these tensor ranks write."""
    weights, fragments = [], []
    for rank in ranks:
        for spec in arch.iter_params():
            shard = shard_of(spec, size=size, rank=rank)
            if not holds(spec, rank=rank) or (shard is None and rank > 0):
                continue
            weights.append(Weight(spec.name, take(values[spec.name], shard), shard))
            for number, kind in enumerate(native.KINDS):
                flat = take(values[spec.name] + number, shard).flatten()
                half = flat.numel() // 2
                fragments.append(Fragment(spec.name, kind, 0, flat[:half], shard))
                fragments.append(Fragment(spec.name, kind, half, flat[half:], shard))
    return weights, fragments


def save(folder: Path, arch: ModelArch, values: dict[str, torch.Tensor], *, size: int, ranks: list[int] | None = None):
    weights, fragments = owned(arch, values, size=size, ranks=list(range(size)) if ranks is None else ranks)
    return native.save(
        folder,
        weights=weights,
        fragments=fragments,
        train_state={},
        config_text="x = 1",
        layout=Layout(tensor=size),
        arch=arch,
        dtype="float32",
        step=1,
        model=MODEL,
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("read_size", [1, 2, 4])
def test_any_shard_comes_out_of_any(size: int, read_size: int, arch, values, tmp_path: Path) -> None:
    checkpoint = native.open(save(tmp_path / "1", arch, values, size=size))
    checkpoint.check_fits(arch)
    assert set(checkpoint.weight_names) == set(values) and checkpoint.layout.tensor == size
    for rank in range(read_size):
        for spec in arch.iter_params():
            shard = shard_of(spec, size=read_size, rank=rank)
            expected = take(values[spec.name], shard)
            assert checkpoint.weight(spec.name, shard).equal(expected), spec.name
            assert checkpoint.weights[spec.name].equal(values[spec.name])
            for number, kind in enumerate(native.KINDS):
                flat = take(values[spec.name] + number, shard).flatten()
                start, stop = flat.numel() // 3, flat.numel() - 1
                found = checkpoint.fragment(spec.name, kind, start, stop - start, shard)
                assert found.equal(flat[start:stop]), (spec.name, kind)


def test_the_embedding_is_the_same_matrix_however_it_is_split(arch, values, tmp_path: Path) -> None:
    """`embed_split_hidden` renames it and splits it the other way."""
    other = internlm.build(replace(MODEL, embed_split_hidden=True))
    spec = other.layers[0].params[0]
    checkpoint = native.open(save(tmp_path / "1", arch, values, size=2))
    checkpoint.check_fits(other)
    whole = values["embedding.word_embeddings.weight"]
    for rank in (0, 1):
        shard = shard_of(spec, size=2, rank=rank)
        assert checkpoint.weight(spec.name, shard).equal(take(whole, shard))
        assert checkpoint.fragment(spec.name, "master", 0, 20, shard).equal(take(whole, shard).flatten()[:20])


def test_each_rank_keeps_its_own_shards_in_its_own_keys(arch, values, tmp_path: Path) -> None:
    checkpoint = native.open(save(tmp_path / "1", arch, values, size=2))
    keys = {p.key for p in checkpoint.manifest.parameters}
    assert {"head.weight@tensor0", "head.weight@tensor1", "norm.weight"} <= keys and "head.weight" not in keys
    assert "exp_avg/head.weight@tensor1@0" in {f.key for f in checkpoint.manifest.fragments}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([0], r"head.weight: indices 7 to 13 of dimension 0 are missing"), ([1], r"norm.weight: written by no rank")],
)
def test_what_a_rank_left_out_is_not_published(ranks, message: str, arch, values, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "1", arch, values, size=2, ranks=ranks)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("cuts", "problem"),
    [
        ([(2, 0), (2, 1), (2, 1)], "indices 7 to 13 of dimension 0 are written twice"),
        ([(2, 1)], "indices 0 to 7 of dimension 0 are missing"),
        ([(2, 0), (3, 1)], "its shards were cut in different ways"),
        ([(1, 0), (2, 1)], "written by 2 ranks"),
    ],
)
def test_shards_must_make_up_the_parameter_once(cuts: list[tuple[int, int]], problem: str, arch) -> None:
    spec = arch.layers[-1].params[0]
    shards = [shard_of(spec, size=size, rank=rank) for size, rank in cuts]
    stored = [StoredParameter(spec.name, spec.shape, "float32", "f", shard) for shard in shards]
    assert check_parameters(stored, arch=None) == [f"head.weight: {problem}"]


def test_manifests_of_version_1_are_read(arch, values, tmp_path: Path) -> None:
    folder = save(tmp_path / "1", arch, values, size=1)
    text = (folder / manifests.NAME).read_text()
    body = json.loads(text)
    for parameter in body["parameters"]:
        del parameter["shard"]
    for fragment in body["fragments"]:
        del fragment["tensor_rank"]
    body["format_version"], body["checksum"] = 1, "0" * 64
    old = json.dumps(body, indent=1) + "\n"
    checksum = hashlib.sha256(old.encode()).hexdigest()
    (folder / manifests.NAME).write_text(old.replace("0" * 64, checksum))
    checkpoint = native.open(folder)
    assert checkpoint.weight("head.weight").equal(values["head.weight"])
    assert checkpoint.fragment("head.weight", "master", 0, 5).equal(values["head.weight"].flatten()[:5])
