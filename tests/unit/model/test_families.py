"""InternLM2 and Llama: names, switches, rotary order, post-norm, normalised head, spread of initial values."""

from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import blueprint
from internlm_ds.arch.spec import ParamSpec
from internlm_ds.attention.segments import Segments
from internlm_ds.config.schema import ModelConfig
from internlm_ds.model.init import initial_value
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    vocab_size=40,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=2,
    embed_split_hidden=True,
)
TOKENS = torch.tensor([5, 1, 39, 0, 7, 7, 2, 11, 30, 4])
BORDERS = torch.tensor([0, 1, 6, 10], dtype=torch.int32)
SWITCHES = [
    {},
    {"no_bias": True},
    {"adapt_hf": False},
    {"adapt_hf": True, "num_kv_attention_heads": None},
    {"apply_post_layer_norm": True},
    {"embed_split_hidden": False, "norm_type": "layernorm"},
    {"norm_head": True, "embed_grad_scale": 0.1},
    {"use_swiglu": False, "residual_in_fp32": True, "dropout_selective_checkpoint": False},
]
FAMILIES = ["INTERNLM2_PUBLIC", "LLAMA2"]


def language_model(family, config, *, recompute=0.0):
    arch = blueprint(family, config)
    entries = build_layers(arch, config, tensor=Axis.single("tensor"), seed=1, dtype=torch.float64)
    model = LanguageModel(entries, recompute=recompute)
    with torch.no_grad():
        for _, parameter in model.named_logical_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()))
    return model


def gradients(model, tokens=TOKENS, borders=BORDERS):
    model(tokens, borders).sin().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_logical_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_blueprint_packing_and_recomputation(family, switch):
    config = replace(TINY, **switch)
    model = language_model(family, config)
    shapes = {name: tuple(p.shape) for name, p in model.named_logical_parameters()}
    assert shapes == {spec.name: tuple(spec.shape) for spec in blueprint(family, config).iter_params()}
    packed, logits = gradients(model), model(TOKENS, BORDERS)
    total = {name: torch.zeros_like(gradient) for name, gradient in packed.items()}
    for start, stop in ((0, 1), (1, 6), (6, 10)):
        alone = torch.tensor([0, stop - start], dtype=torch.int32)
        torch.testing.assert_close(model(TOKENS[start:stop], alone), logits[start:stop], atol=1e-5, rtol=1e-5)
        for name, gradient in gradients(model, TOKENS[start:stop], alone).items():
            total[name] += gradient
    again = gradients(language_model(family, config, recompute=1.0).train())
    for name, gradient in packed.items():
        torch.testing.assert_close(total[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
        torch.testing.assert_close(again[name], gradient, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_rotary_pairs_is_an_order_of_rows(family):
    """Neighbours and halves compute the same once the rows of queries and keys are put into the other order."""
    halves = language_model(family, replace(TINY, adapt_hf=True))
    neighbours = language_model(family, replace(TINY, adapt_hf=False))
    heads = {"wq": (4, slice(0, 4)), "wk": (2, slice(0, 2)), "wqkv": (8, torch.tensor([0, 1, 2, 4, 5, 6]))}
    with torch.no_grad():
        for name, parameter in neighbours.named_logical_parameters():
            count, rotated = heads.get(name.split(".")[-2], (0, None))
            if count:
                rows = parameter.unflatten(0, (count, 8)).clone()
                pairs = rows[rotated].unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
                rows[rotated] = pairs
                parameter.copy_(rows.flatten(0, 1))
    assert not torch.allclose(
        *(m(TOKENS, BORDERS) for m in (halves, language_model(family, replace(TINY, adapt_hf=False))))
    )
    torch.testing.assert_close(neighbours(TOKENS, BORDERS), halves(TOKENS, BORDERS), atol=1e-5, rtol=1e-5)


def test_defaults_of_the_order():
    assert blueprint("INTERNLM2_PUBLIC", TINY).rotary_pairs == "halves"
    assert blueprint("LLAMA2", TINY).rotary_pairs == "neighbours"


@pytest.mark.parametrize("family", FAMILIES)
def test_post_norm_block(family):
    model = language_model(family, replace(TINY, apply_post_layer_norm=True))
    embedding, first, second, head = model.layers
    x, segments = embedding((TOKENS, BORDERS))[0], Segments.of(BORDERS)
    for block in (first, second):
        hidden = block.attention_norm(x + block.attention(x, segments))
        x = block.ffn_norm(hidden + block.feed_forward(hidden))
    torch.testing.assert_close(head((x, BORDERS)), model(TOKENS, BORDERS))
    assert "norm.weight" not in dict(model.named_logical_parameters())


def test_normalised_head():
    config = replace(TINY, norm_head=True)
    model, plain = language_model("INTERNLM2_PUBLIC", config), language_model("INTERNLM2_PUBLIC", TINY)
    with torch.no_grad():
        weight = dict(plain.named_logical_parameters())["output.weight"]
        weight.div_(weight.square().sum(dim=1, keepdim=True).sqrt())
    torch.testing.assert_close(model(TOKENS, BORDERS), plain(TOKENS, BORDERS))


def test_uniform_values_have_the_standard_deviation_that_is_given():
    spec = ParamSpec("w", (300, 300), "linear", init_std=0.02, init_uniform=True)
    drawn = initial_value(spec, 7)
    assert abs(drawn.std().item() / 0.02 - 1) < 0.01 and drawn.abs().max() <= 0.02 * 3**0.5
    kinds = {s.kind: s.init_uniform for s in blueprint("LLAMA2", replace(TINY, init_type="uniform")).iter_params()}
    assert kinds == {"embedding": True, "linear": True, "bias": False, "norm": False, "head": True}
