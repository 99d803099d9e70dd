"""A Hugging Face folder of InternLM v1: transformers computes what our model computes, and tokenizes alike."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.checkpoint.formats import hf, hf_config
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConversionError
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    vocab_size=40,
    num_attention_heads=4,
    mlp_ratio=2.0,
    dtype="float32",
    rope_base=5000.0,
    layer_norm_epsilon=1e-3,
    max_position_embeddings=16,
)


def random_weights(model):
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for spec in internlm.build(model).iter_params():
        noise = torch.randn(spec.shape, generator=generator)
        weights[spec.name] = 1 + 0.1 * noise if spec.kind == "norm" else 0.3 * noise
    return weights


def export(folder, model=MODEL, **settings):
    folder.mkdir()
    weights = random_weights(model)
    hf.write(folder, weights, model=model, arch=internlm.build(model), **{"dtype": torch.float32, **settings})
    return weights


def our_logits(model, weights, tokens):
    entries = build_layers(internlm.build(model), model, tensor=Axis.single("tensor"), seed=1, dtype=torch.float32)
    ours = LanguageModel(entries).eval()
    with torch.no_grad():
        for name, parameter in ours.named_logical_parameters():
            parameter.copy_(weights[name])
        return ours(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))


@pytest.mark.parametrize("embed_split_hidden", [True, False])
@pytest.mark.parametrize("use_dynamic_ntk_rope", [False, True])
def test_transformers_computes_the_same_logits(tmp_path, embed_split_hidden, use_dynamic_ntk_rope):
    from transformers import AutoModelForCausalLM

    model = replace(MODEL, embed_split_hidden=embed_split_hidden, use_dynamic_ntk_rope=use_dynamic_ntk_rope)
    weights = export(tmp_path / "hf", model, max_shard_bytes=30_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto", output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.randint(0, 40, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs.eval()(tokens[None]).logits[0]
    torch.testing.assert_close(our_logits(model, weights, tokens), logits, rtol=1e-5, atol=1e-5)


def test_files_and_configuration(tmp_path):
    export(tmp_path / "hf", dtype=torch.bfloat16)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "hf/config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 256,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
        "rope_theta": 5000.0,
        "attention_bias": True,
        "mlp_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_shards_keep_the_limit_and_the_index_lists_them(tmp_path):
    export(tmp_path / "hf", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and set(index["weight_map"].values()) == set(
        files
    )
    assert all((tmp_path / "hf" / name).stat().st_size < 45_000 for name in files)
    assert index["metadata"]["total_size"] == 4 * internlm.build(MODEL).num_params


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_weights_read_back(tmp_path, max_shard_bytes):
    weights = export(tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    back = hf.read_weights(tmp_path / "hf", arch=internlm.build(MODEL))
    assert list(back) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


def test_weights_that_do_not_fit_are_listed(tmp_path):
    export(tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        hf.read_weights(tmp_path / "hf", arch=internlm.build(replace(MODEL, num_layers=2, vocab_size=50)))
    assert "model.layers.2.mlp.up_proj.weight: the model has no such parameter" in str(caught.value)
    assert "lm_head.weight: shape [40, 32] in the files, the model has [50, 32]" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.input_layernorm\.weight: missing"):
        hf.read_weights(tmp_path / "hf", arch=internlm.build(replace(MODEL, num_layers=4)))
    with pytest.raises(CheckpointError, match="holds neither"):
        hf.read_weights(tmp_path, arch=internlm.build(MODEL))


def test_models_that_llama_cannot_express_are_refused(tmp_path):
    model = replace(MODEL, norm_type="layernorm", use_swiglu=False, is_reward=True)
    with pytest.raises(ConversionError) as caught:
        hf_config.check(model, internlm.build(model))
    for word in ("norm_type = 'layernorm'", "use_swiglu = False", "is_reward = True"):
        assert word in str(caught.value)
    with pytest.raises(ConversionError, match="the family is 'other'"):
        hf_config.check(MODEL, replace(internlm.build(MODEL), family="other"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"def work_{i}(value):  return value * {i}  # 数值 {i}" for i in range(300)), encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text),
        model_prefix=str(folder / "tiny"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.mark.parametrize("use_fast", [False, True])
def test_transformers_tokenizes_like_sentencepiece(tmp_path, tokenizer, use_fast):
    import sentencepiece
    from transformers import AutoTokenizer

    if use_fast:
        pytest.importorskip("google.protobuf", reason="transformers makes its fast tokenizer with protobuf")
    export(tmp_path / "hf", tokenizer=tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", use_fast=use_fast)
    for text in ("def work_7(value):", "  two blanks", "x  # 数值", "emoji 🙂 and ü"):
        assert theirs(text).input_ids == [processor.bos_id(), *processor.EncodeAsIds(text)], text
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (processor.bos_id(), processor.eos_id())


def test_tokenizer_that_is_none_is_refused(tmp_path):
    (tmp_path / "no.model").write_text("x")
    with pytest.raises(ConversionError, match=r"no\.model is no sentencepiece model that can be read"):
        export(tmp_path / "hf", tokenizer=tmp_path / "no.model")
