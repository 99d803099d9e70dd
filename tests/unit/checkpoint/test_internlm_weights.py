"""InternLM's folders at any layout: written, merged again, and refused with everything that does not fit."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import internlm as blueprint
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.errors import CheckpointError, ConversionError

LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 3, 1), (1, 2, 2), (2, 1, 2), (4, 2, 2)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def names_in(path):
    return list(unpickle.load(path, lazy=True))


@pytest.mark.parametrize("embed_split_hidden", [True, False])
@pytest.mark.parametrize(("tensor", "pipe", "chunks"), LAYOUTS)
def test_any_layout_merges_to_the_same_weights(folder, tiny_model, tensor, pipe, chunks, embed_split_hidden):
    arch = blueprint.build(replace(tiny_model, embed_split_hidden=embed_split_hidden))
    weights = {spec.name: torch.randn(spec.shape) for spec in arch.iter_params()}
    internlm.write_weights(folder, weights, arch=arch, tensor_size=tensor, pipe=pipe, chunks=chunks)
    merged = internlm.read_weights(folder, arch=arch)
    assert list(merged) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(merged[name], weight), name


def test_files_look_like_the_reference(folder, tiny_arch, tiny_weights):
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=2, pipe=2, chunks=2)
    first, last = names_in(folder / "model_tp0_pp0.pt"), names_in(folder / "model_tp1_pp1.pt")
    assert first[0] == "0.model.embedding.weight" and "1.model.blocks.0.mlp.w1.weight" in first
    assert last[-2:] == ["1.model.norm.weight", "1.model.head.weight"]
    assert "0.model.blocks.0.mixer.out_proj.bias" in first
    assert not any(name.endswith("out_proj.bias") for name in last), "only tensor rank 0 holds it"
    qkv = unpickle.load(folder / "model_tp1_pp0.pt")["0.model.blocks.0.mixer.Wqkv.weight"]
    whole = tiny_weights["blocks.0.mixer.Wqkv.weight"].view(3, 4, 4, 16)
    assert torch.equal(qkv, whole[:, 2:].reshape(24, 16)), "rank 1 holds the last heads of q, of k and of v"
    assert unpickle.load(folder / "topo_tp0_pp0.json") == {}


def test_vocabulary_split_is_noted_in_the_topology(folder, tiny_model):
    arch = blueprint.build(replace(tiny_model, embed_split_hidden=False))
    internlm.write_weights(folder, {s.name: torch.zeros(s.shape) for s in arch.iter_params()}, arch=arch, tensor_size=2)
    assert unpickle.load(folder / "topo_tp1_pp0.json") == {"embedding.word_embeddings": {"dim": 0}}


def test_embedding_under_its_other_name_is_found(folder, tiny_model, tiny_arch, tiny_weights):
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=2)
    other = blueprint.build(replace(tiny_model, embed_split_hidden=False))
    merged = internlm.read_weights(folder, arch=other)
    assert torch.equal(merged["embedding.word_embeddings.weight"], tiny_weights["embedding.weight"])


def with_names_of_2023(weights):
    other = {"mlp.w2.weight": "mlp.w3.weight", "mlp.w3.weight": "mlp.w2.weight"}
    exchanged = {}
    for name, weight in weights.items():
        rest = ".".join(name.split(".")[2:])
        exchanged[name.removesuffix(rest) + other[rest] if rest in other else name] = weight
    return exchanged


@pytest.mark.parametrize("asked", [None, "2023"])
def test_names_of_2023_are_told_by_shape_and_exchanged(folder, tiny_arch, tiny_weights, caplog, asked):
    torch.save(with_names_of_2023(tiny_weights), folder / "model_tp0_pp0.pt")
    with caplog.at_level(logging.INFO):
        merged = internlm.read_weights(folder, arch=tiny_arch, mlp_names=asked)
    for name, weight in tiny_weights.items():
        assert torch.equal(merged[name], weight), name
    assert "names its MLP matrices as in 2023" in caplog.text


def test_names_that_contradict_the_shapes_are_refused(folder, tiny_arch, tiny_weights):
    torch.save(tiny_weights, folder / "model_tp0_pp0.pt")
    with pytest.raises(CheckpointError, match=r"compat\.mlp_names is '2023', but the files have .*: that is '2024'"):
        internlm.read_weights(folder, arch=tiny_arch, mlp_names="2023")


def test_square_matrices_need_a_word(folder, tiny_model):
    arch = blueprint.build(replace(tiny_model, hidden_size=256, mlp_ratio=1.0, num_layers=1))
    weights = {spec.name: torch.randn(spec.shape) for spec in arch.iter_params()}
    torch.save(weights, folder / "model_tp0_pp0.pt")
    with pytest.raises(CheckpointError, match=r"do not tell whether .*compat=dict"):
        internlm.read_weights(folder, arch=arch)
    w2, w3 = "blocks.0.mlp.w2.weight", "blocks.0.mlp.w3.weight"
    assert torch.equal(internlm.read_weights(folder, arch=arch, mlp_names="2024")[w2], weights[w2])
    assert torch.equal(internlm.read_weights(folder, arch=arch, mlp_names="2023")[w2], weights[w3])


def test_everything_that_does_not_fit_is_listed(folder, tiny_arch, tiny_weights):
    state = {
        **tiny_weights,
        "stray.weight": torch.zeros(3),
        "norm.weight": torch.zeros(7),
        "rotary.inv_freq": torch.zeros(2),
    }
    del state["blocks.1.norm1.weight"]
    torch.save(state, folder / "model_tp0_pp0.pt")
    with pytest.raises(CheckpointError) as caught:
        internlm.read_weights(folder, arch=tiny_arch)
    assert str(caught.value).splitlines() == [
        f"{folder} does not fit the model (3 parameters):",
        "  blocks.1.norm1.weight [16]: missing",
        "  stray.weight [3]: the model has no such parameter",
        "  norm.weight: shape [7] in the files, the model has [16]",
    ]
    assert caught.value.exit_code == 2


def test_more_layers_than_the_model_has_are_extra(folder, tiny_model, tiny_arch, tiny_weights):
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, pipe=2)
    with pytest.raises(CheckpointError, match=r"blocks\.3\.mlp\.w1\.weight .*: the model has no such parameter"):
        internlm.read_weights(folder, arch=blueprint.build(replace(tiny_model, num_layers=3)))


def test_shards_of_the_wrong_size_name_the_share(folder, tiny_arch, tiny_weights):
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=2)
    state = unpickle.load(folder / "model_tp1_pp0.pt")
    state["head.weight"] = state["head.weight"][:5].clone()
    del state["norm.weight"]
    torch.save(state, folder / "model_tp1_pp0.pt")
    with pytest.raises(CheckpointError) as caught:
        internlm.read_weights(folder, arch=tiny_arch)
    shown = (
        r"head.weight: shape [5, 16] and [12, 16] in the files, the model has [24, 16], that is [12, 16] on each of 2"
    )
    assert shown in str(caught.value)
    assert "norm.weight: held by 1 of 2 tensor ranks" in str(caught.value)


def test_missing_files_are_named(folder, tiny_arch, tiny_weights):
    with pytest.raises(CheckpointError, match=r"has no model_tp0_pp0\.pt; it is empty"):
        internlm.read_weights(folder, arch=tiny_arch)
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=2, pipe=2)
    (folder / "model_tp0_pp1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"of 2 tensor ranks and 2 stages, without model_tp0_pp1\.pt"):
        internlm.read_weights(folder, arch=tiny_arch)
    with pytest.raises(CheckpointError, match="does not exist or is no folder"):
        internlm.read_weights(folder / "gone", arch=tiny_arch)


@pytest.mark.parametrize("name", ["model_tp0_wp0_pp0.pt", "model_tp0_pp0_dp1.pt"])
def test_weights_split_over_other_ranks_are_refused(folder, tiny_arch, name):
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} was written with the weights themselves split over ranks"):
        internlm.read_weights(folder, arch=tiny_arch)


def test_stored_settings_of_another_model_are_refused(folder, tiny_arch, tiny_weights):
    internlm.write_weights(folder, tiny_weights, arch=tiny_arch, model_config={"model_type": "LLAMA2"})
    with pytest.raises(CheckpointError, match="model_type is 'LLAMA2'; to be loaded is 'INTERNLM'"):
        internlm.read_weights(folder, arch=tiny_arch)
    torch.save({"hidden_size": 32, "num_layers": 4, "vocab_size": 9}, folder / "model_config.pt")
    with pytest.raises(CheckpointError, match="hidden_size is 32, the model has 16; vocab_size is 9, the model has 24"):
        internlm.read_weights(folder, arch=tiny_arch)
    torch.save([1], folder / "model_config.pt")
    with pytest.raises(CheckpointError, match="a dict was expected, found list"):
        internlm.read_weights(folder, arch=tiny_arch)


def test_file_that_is_no_state_dict_is_refused(folder, tiny_arch):
    torch.save(OrderedDict(model=OrderedDict(a=torch.zeros(1))), folder / "model_tp0_pp0.pt")
    with pytest.raises(CheckpointError, match="is no state dict"):
        internlm.read_weights(folder, arch=tiny_arch)


def test_impossible_splits_are_listed(folder, tiny_arch, tiny_weights):
    with pytest.raises(ConversionError) as caught:
        internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=3, pipe=5, chunks=1)
    assert "blocks.0.mixer.Wqkv.weight: 4 units do not divide by --tensor 3" in str(caught.value)
    with pytest.raises(ConversionError, match="4 layers in 2 chunks are too few for --pipeline 3"):
        internlm.write_weights(folder, tiny_weights, arch=tiny_arch, pipe=3, chunks=2)
    with pytest.raises(ConversionError, match="4 layers do not divide by --chunks 3"):
        internlm.write_weights(folder, tiny_weights, arch=tiny_arch, chunks=3)
