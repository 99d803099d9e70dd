"""Conversions: every pair keeps every bit, and nothing appears that is not whole."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import internlm as blueprint
from internlm_ds.checkpoint.formats import hf, hf_config, internlm, native
from internlm_ds.config.schema import ModelConfig
from internlm_ds.convert import verify
from internlm_ds.convert.run import Request, convert
from internlm_ds.convert.sources import dict_of_model, model_of_dict
from internlm_ds.errors import CheckpointDamagedError, CheckpointError, ConfigError, ConversionError
from internlm_ds.layout.ranks import Layout

MODEL = ModelConfig(num_layers=2, hidden_size=16, vocab_size=24, num_attention_heads=4, mlp_ratio=2.0, dtype="float32")
ARCH = blueprint.build(MODEL)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(1)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in ARCH.iter_params()}


@pytest.fixture
def native_folder(tmp_path, weights):
    return native.save(
        tmp_path / "5",
        weights=weights.items(),
        train_state={"step_count": 5},
        config_text="JOB_NAME = 'x'\n",
        layout=Layout(),
        arch=ARCH,
        dtype="float32",
        model=MODEL,
    )


def ask(source, target, kind, **options):
    return Request(source=str(source), target=str(target), source_format=None, target_format=kind, **options)


def read(folder, kind):
    if kind == "native":
        return native.open(folder).weights
    return (internlm if kind == "internlm" else hf).read_weights(folder, arch=ARCH)


@pytest.mark.parametrize("path", [p for n in (1, 2) for p in itertools.product(("hf", "internlm", "native"), repeat=n)])
def test_chains_of_conversions_keep_every_bit(tmp_path, native_folder, weights, path):
    folder, kind = native_folder, "native"
    for number, target in enumerate(path):
        summary = convert(ask(folder, tmp_path / f"out{number}", target))
        assert (summary.num_parameters, summary.verified, summary.logits_difference) == (len(weights), True, 0)
        folder, kind = summary.target, target
    back = read(folder, kind)
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == []


def test_native_target_keeps_step_text_and_settings(tmp_path, native_folder):
    convert(ask(native_folder, tmp_path / "ilm", "internlm", tensor=2, pipe=2))
    convert(ask(f"local:{tmp_path}/ilm", tmp_path / "back", "native"))
    checkpoint = native.open(tmp_path / "back")
    assert checkpoint.kinds == () and checkpoint.step == 0
    stored = checkpoint.model_config
    assert blueprint.build(stored) == ARCH and stored.dtype == "float32"


def test_dtype_can_change(tmp_path, native_folder, weights):
    summary = convert(ask(native_folder, tmp_path / "hf", "hf", dtype="bfloat16"))
    assert "bfloat16" in str(summary) and "bit for bit equal" in str(summary)
    assert torch.equal(read(tmp_path / "hf", "hf")["norm.weight"], weights["norm.weight"].to(torch.bfloat16))


def test_without_verification(tmp_path, native_folder):
    assert "not verified" in str(convert(ask(native_folder, tmp_path / "hf", "hf", verify=False)))


def test_difference_that_verification_finds_publishes_nothing(tmp_path, native_folder, weights, monkeypatch):
    wrong = {name: -weight if name == "norm.weight" else weight for name, weight in weights.items()}
    del wrong["head.weight"]
    monkeypatch.setattr(verify, "reread", lambda *arguments: {**wrong, "stray": weights["norm.weight"]})
    with pytest.raises(ConversionError) as caught:
        convert(ask(native_folder, tmp_path / "hf", "hf"))
    assert str(caught.value).splitlines() == [
        "the written checkpoint is not equal to its source:",
        "  head.weight: not written",
        "  stray: written, but not of the model",
        "  norm.weight: reads back differently",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_a_result_that_computes_something_else_is_not_published(tmp_path, native_folder, monkeypatch):
    """Weights that come back right under settings that are wrong."""
    render = hf_config.render
    monkeypatch.setattr(hf_config, "render", lambda *args, **more: {**render(*args, **more), "rope_theta": 50.0})
    with pytest.raises(ConversionError, match="computes something else than its source: logits differ by up to"):
        convert(ask(native_folder, tmp_path / "hf", "hf", dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hf", "tensor": 2}, r"--tensor 2: only InternLM's format is split; leave it away for --to hf"),
        ({"kind": "internlm", "pipe": 0}, "--pipeline 0: must be at least 1"),
        ({"kind": "hf", "content": "all"}, "--content all: a Hugging Face folder holds weights only"),
        ({"kind": "internlm", "tokenizer": True}, "--tokenizer .*: only a Hugging Face folder holds a tokenizer"),
        ({"kind": "hf", "tokenizer": True}, "--tokenizer .*: no such file"),
        ({"kind": "internlm", "pipe": 3}, "2 layers in 1 chunks are too few for --pipeline 3"),
    ],
)
def test_impossible_requests(tmp_path, native_folder, options, message):
    settings = dict(options)
    kind = settings.pop("kind")
    if "tokenizer" in settings:
        settings["tokenizer"] = tmp_path / "gone.model"
    with pytest.raises(ConversionError, match=message) as caught:
        convert(ask(native_folder, tmp_path / "out", kind, **settings))
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_existing_target_is_left_alone(tmp_path, native_folder):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="out exists; remove it or name another place"):
        convert(ask(native_folder, tmp_path / "out", "hf"))


def test_sources_that_cannot_be_read(tmp_path, native_folder, weights):
    with pytest.raises(CheckpointError, match="gone does not exist"):
        convert(ask(tmp_path / "gone", tmp_path / "out", "hf"))
    with pytest.raises(CheckpointError, match="is no checkpoint of any known format; say --from"):
        convert(ask(tmp_path, tmp_path / "out", "hf"))
    with pytest.raises(CheckpointError, match=r"is a folder of checkpoints; name one of them: .*/5"):
        convert(replace(ask(tmp_path, tmp_path / "out", "hf"), source_format="native"))
    with pytest.raises(CheckpointError, match="write boto3:s3://b/x"):
        convert(ask("ali://b.host/x", tmp_path / "out", "hf"))
    (native_folder / "config.py").write_text("changed")
    with pytest.raises(CheckpointDamagedError, match=r"config\.py"):
        convert(ask(native_folder, tmp_path / "out", "hf"))


def test_source_that_does_not_say_its_model(tmp_path, native_folder, weights):
    convert(ask(native_folder, tmp_path / "hf", "hf"))
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(ConversionError, match="num_attention_heads is missing"):
        convert(ask(tmp_path / "hf", tmp_path / "out", "native"))
    (tmp_path / "ilm").mkdir()
    internlm.write_weights(tmp_path / "ilm", weights, arch=ARCH)
    with pytest.raises(ConversionError, match="does not say which model it holds; give --config"):
        convert(ask(tmp_path / "ilm", tmp_path / "out", "hf"))
    (tmp_path / "bad.py").write_text("model = dict(num_layers=2)\nnonsense = dict()\n")
    with pytest.raises(ConfigError, match=r"problems in .*bad\.py"):
        convert(ask(tmp_path / "ilm", tmp_path / "out", "hf", config=tmp_path / "bad.py"))


def test_registered_model_types_are_not_converted(tmp_path, weights):
    folder = native.save(
        tmp_path / "5",
        weights=weights.items(),
        train_state={},
        config_text="",
        layout=Layout(),
        arch=None,
        dtype="float32",
        model_type="MINE",
    )
    with pytest.raises(ConversionError, match="holds a model of type 'MINE'; known are INTERNLM, INTERNLM2_PUBLIC, "):
        convert(ask(folder, tmp_path / "out", "hf"))


def test_settings_survive_model_config_files():
    model = replace(MODEL, rope_base=5000.0, use_dynamic_ntk_rope=True, embed_split_hidden=True, checkpoint=0.0)
    assert model_of_dict(dict_of_model(model, dtype=torch.float32)) == model
    assert model_of_dict({}) is None
    assert model_of_dict({"dtype": torch.half, "unheard_of": 1}).dtype == "float16"
