"""InternLM2 and Llama as Hugging Face folders: transformers agrees with our model, and its own folders come in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import blueprint
from internlm_ds.checkpoint.formats import hf, hf_config, internlm, native
from internlm_ds.config.schema import ModelConfig
from internlm_ds.convert.run import Request, convert
from internlm_ds.convert.sources import Source, dict_of_model, open_source
from internlm_ds.convert.verify import TOKENS, logits
from internlm_ds.errors import CheckpointError, ConversionError
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    vocab_size=40,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=2.0,
    dtype="float32",
    rope_base=5000.0,
    layer_norm_epsilon=1e-3,
    no_bias=True,
)
IDS = torch.randint(0, 40, (TOKENS,), generator=torch.Generator().manual_seed(1))


def source_of(model_type, model, *, std=0.3):
    generator, weights, arch = torch.Generator().manual_seed(3), {}, blueprint(model_type, model)
    for spec in arch.iter_params():
        noise = torch.randn(spec.shape, generator=generator)
        weights[spec.name] = 1 + 0.1 * noise if spec.kind == "norm" else std * noise
    return Source(None, "native", model_type, model, arch, weights, dtype=torch.float32)


def internlm_folder(folder, source, **split):
    folder.mkdir()
    settings = dict_of_model(source.model, dtype=torch.float32, model_type=source.model_type)
    internlm.write_weights(folder, source.weights, arch=source.arch, model_config=settings, **split)
    return folder


def ask(folder, target, kind, **options):
    return convert(Request(str(folder), str(target), None, kind, **options))


def their_logits(folder):
    """Of the two segments that `verify.logits` runs, each on its own."""
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return torch.cat([theirs.eval()(ids[None]).logits[0] for ids in (IDS[:20], IDS[20:])])


@pytest.mark.parametrize("adapt_hf", [True, False])
@pytest.mark.parametrize("more", [{}, {"no_bias": False}, {"num_kv_attention_heads": None, "embed_split_hidden": True}])
def test_transformers_computes_our_llama(tmp_path, adapt_hf, more):
    source = source_of("LLAMA2", replace(MODEL, adapt_hf=adapt_hf, **more))
    folder = internlm_folder(tmp_path / "ilm", source, tensor_size=2)
    assert ask(folder, tmp_path / "hf", "hf", max_shard_bytes=50_000).logits_difference < 1e-4
    torch.testing.assert_close(logits(source, IDS), their_logits(tmp_path / "hf"), rtol=1e-4, atol=1e-4)
    # and back: rows of queries and keys stay as they lie there
    ask(tmp_path / "hf", tmp_path / "native", "native")
    back = native.open(tmp_path / "native").weights
    for name, weight in source.weights.items():
        if adapt_hf or name.split(".")[-2] not in ("wq", "wk"):
            assert torch.equal(back[name], weight), name


def their_model(folder, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    torch.manual_seed(5)
    config = LlamaConfig(
        **{**sizes, "intermediate_size": 80, "num_key_value_heads": 2, "initializer_range": 0.3} | settings
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize(
    ("settings", "model_type"),
    [
        ({}, "LLAMA2"),
        ({"attention_bias": True, "num_key_value_heads": 4, "intermediate_size": 256}, "INTERNLM"),
        ({"tie_word_embeddings": True, "rope_theta": 1234.0, "intermediate_size": 300}, "LLAMA2"),
    ],
    ids=str,
)
def test_models_that_transformers_made(tmp_path, settings, model_type):
    """They come in, give their logits, train a step, and go out again."""
    folder = their_model(tmp_path / "hf", **settings)
    expected = their_logits(folder)
    summary = ask(folder, tmp_path / "native", "native")
    assert summary.logits_difference == 0
    source = open_source(tmp_path / "native", "native", config=None, mlp_names=None)
    assert source.model_type == model_type and source.weights.keys() == {s.name for s in source.arch.iter_params()}
    torch.testing.assert_close(logits(source, IDS), expected, rtol=1e-4, atol=1e-4)
    before, after = train_one_step(source)
    assert after < before
    ask(tmp_path / "native", tmp_path / "out", "hf")
    torch.testing.assert_close(their_logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def train_one_step(source):
    entries = build_layers(source.arch, source.model, tensor=Axis.single("tensor"), seed=None, dtype=torch.float32)
    model, borders = LanguageModel(entries), torch.tensor([0, TOKENS], dtype=torch.int32)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(source.weights[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = cross_entropy(model(IDS, borders), IDS.roll(-1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    return losses


def test_zeros_of_a_wider_mlp_stay_zeros(tmp_path):
    folder = their_model(tmp_path / "hf")
    source = open_source(folder, "hf", config=None, mlp_names=None)
    assert source.notes == ("the MLP of width 80 is filled up with zeros to 256: it computes and learns the same",)
    w1, w2 = (source.weights[f"layers.0.feed_forward.{name}.weight"] for name in ("w1", "w2"))
    assert w1.shape == (256, 32) and not w1[80:].any() and not w2[:, 80:].any() and w1[:80].all()


def test_pickled_weights_are_read_by_our_own_reader(tmp_path):
    from safetensors.torch import load_file

    folder = their_model(tmp_path / "hf", num_hidden_layers=1)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / hf.INDEX).read_text())
    renamed = {
        path.name: path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin") for path in files
    }
    expected = open_source(folder, "hf", config=None, mlp_names=None)
    expected = logits(expected, IDS)
    for path in files:
        state = load_file(path)
        state |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if path is files[0] else {}
        torch.save(state, folder / renamed[path.name])
        path.unlink()
    (folder / hf.INDEX).unlink()
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    (folder / hf.BIN_INDEX).write_text(json.dumps(index))
    assert torch.equal(logits(open_source(folder, "hf", config=None, mlp_names=None), IDS), expected)


# ---- InternLM2: transformers has no class of its own ----------------------------------------------------------------


def oracle(weights, model, ids):
    """InternLM2 from the tensors of its folder, written from its published description: plain loops, no shared code."""
    heads, groups, width = 4, 2, 8

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + model.layer_norm_epsilon).sqrt() * weight

    def turned(x):  # (T, heads, width), halves
        angle = torch.arange(len(x))[:, None] / model.rope_base ** (torch.arange(0, width, 2) / width)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for layer in range(model.num_layers):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        y = normed(x, w["attention_norm.weight"])
        qkv = y @ w["attention.wqkv.weight"].T + w.get("attention.wqkv.bias", torch.zeros(1))
        qkv = qkv.view(len(ids), groups, heads // groups + 2, width)
        mixed = torch.empty(len(ids), heads, width)
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            q, k = (turned(qkv[:, group, i][:, None])[:, 0] for i in (place, -2))
            mixed[:, head] = (q @ k.T / width**0.5 + mask).softmax(-1) @ qkv[:, group, -1]
        x = x + mixed.flatten(1) @ w["attention.wo.weight"].T + w.get("attention.wo.bias", torch.zeros(1))
        y = normed(x, w["ffn_norm.weight"])
        gate = y @ w["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return normed(x, weights["model.norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize(
    "more", [{}, {"adapt_hf": False, "no_bias": False}, {"norm_head": True, "embed_split_hidden": True}], ids=str
)
def test_internlm2_folder(tmp_path, more):
    from safetensors.torch import load_file

    source = source_of("INTERNLM2_PUBLIC", replace(MODEL, **more))
    folder = internlm_folder(tmp_path / "ilm", source, pipe=2)
    assert ask(folder, tmp_path / "hf", "hf").logits_difference < 1e-4
    weights = load_file(tmp_path / "hf/model.safetensors")
    found = torch.cat([oracle(weights, source.model, ids) for ids in (IDS[:20], IDS[20:])])
    torch.testing.assert_close(logits(source, IDS), found, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    expected = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "num_key_value_heads": 2}
    assert {**config, **expected, "bias": "no_bias" in more} == config
    back = open_source(tmp_path / "hf", "hf", config=None, mlp_names=None)
    assert (back.model_type, back.model.adapt_hf, back.model.norm_head) == ("INTERNLM2_PUBLIC", True, False)
    torch.testing.assert_close(logits(back, IDS), logits(source, IDS), rtol=1e-4, atol=1e-4)


# ---- what config.json may say ---------------------------------------------------------------------------------------

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": 40,
}


def read(folder, **values):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values}))
    return hf_config.read(folder)


def test_what_changes_nothing_within_the_length_is_a_note(tmp_path):
    grown = read(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=512)
    assert not grown.model.use_dynamic_ntk_rope
    assert "dynamic rope_scaling of factor 2 is left out: nothing changes up to" in grown.notes[0]
    windowed = read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=64)
    assert windowed.model_type == "LLAMA2" and windowed.notes[0].startswith("sliding_window = 64 is left out")


def test_first_models_of_internlm(tmp_path):
    found = read(tmp_path, architectures=["InternLMForCausalLM"], bias=True, rotary={"base": 5000, "type": "dynamic"})
    assert (found.model_type, found.model.rope_base, found.model.use_dynamic_ntk_rope) == ("INTERNLM", 5000, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures = 'GPT2LMHeadModel'; read are LlamaForCausalLM"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act = 'gelu'"),
        ({"head_dim": 16}, "head_dim = 16: here it is hidden_size / num_attention_heads"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling of type 'yarn': only dynamic scaling is known here"),
    ],
)
def test_models_that_cannot_be_taken_over(tmp_path, values, message):
    with pytest.raises(ConversionError, match=message):
        read(tmp_path, **values)


def test_folders_that_are_broken(tmp_path):
    folder = their_model(tmp_path / "hf", num_hidden_layers=1)
    index = folder / hf.INDEX
    good = index.read_text()
    for text, message in (
        ("[]", "is no index of weights"),
        (good.replace("model-00001", "../model-00001"), "which is no file of this folder"),
        (good.replace("model-00001-of", "model-00077-of"), "is incomplete: its index names model-00077-of"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_source(folder, "hf", config=None, mlp_names=None)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        hf_config.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        hf_config.read(folder)
