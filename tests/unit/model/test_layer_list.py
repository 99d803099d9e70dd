"""The layer list: names, packed equals separate, recomputation and every switch of the model."""

from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import ConfigError, LayoutError
from internlm_ds.model.block import Block
from internlm_ds.model.layers import LanguageModel, build_layers, build_modules, num_recomputed
from internlm_ds.model.loss import cross_entropy
from internlm_ds.model.mlp import GeluMlp
from internlm_ds.parallel.context import Axis

TINY = ModelConfig(
    num_layers=3, hidden_size=16, vocab_size=40, num_attention_heads=2, mlp_ratio=8 / 3, embed_split_hidden=True
)
TOKENS = torch.tensor([5, 1, 39, 0, 7, 7, 2, 11, 30, 4])
BORDERS = torch.tensor([0, 1, 6, 10], dtype=torch.int32)
SWITCHES = [
    {},
    {"embed_split_hidden": False},
    {"norm_type": "layernorm"},
    {"use_swiglu": False},
    {"use_flash_attn": False},
    {"residual_in_fp32": True},
    {"embed_grad_scale": 0.1},
    {"parallel_output": False},
    {"use_scaled_init": False},
    {"use_dynamic_ntk_rope": True, "max_position_embeddings": 3},
    {"is_reward": True},
    {"dropout_selective_checkpoint": False},
]


def entries(config=TINY, *, dtype=torch.float64, seed=1, **options):
    return build_layers(internlm.build(config), config, tensor=Axis.single("tensor"), seed=seed, dtype=dtype, **options)


def language_model(config=TINY, *, recompute=0.0, scale=20.0, **options):
    """A model whose matrices are large enough that every part matters."""
    model = LanguageModel(entries(config, **options), recompute=recompute)
    with torch.no_grad():
        for _, parameter in model.named_logical_parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
            else:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()))
    return model


def gradients(model, tokens=TOKENS, borders=BORDERS):
    loss = model(tokens, borders).sin().sum()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_logical_parameters()}
    model.zero_grad()
    return loss, found


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_names_and_shapes_are_the_blueprints(switch):
    config = replace(TINY, **switch)
    model = LanguageModel(entries(config))
    found = {name: tuple(p.shape) for name, p in model.named_logical_parameters()}
    assert found == {spec.name: tuple(spec.shape) for spec in internlm.build(config).iter_params()}
    assert all(not hasattr(p, "tensor_model_parallel") for p in model.parameters())


def test_prefix_and_local_name_make_the_logical_name():
    for entry in entries():
        for local, parameter in entry.build(False).named_parameters():
            assert parameter.logical_name == f"{entry.prefix}.{local}"


@pytest.mark.parametrize("switch", [s for s in SWITCHES if "use_dynamic_ntk_rope" not in s], ids=str)
def test_packed_equals_separate_segments(switch):
    """Logits and the gradients of every parameter. (With dynamic NTK the longest segment sets the base for all.)"""
    model = language_model(replace(TINY, **switch))
    logits, (_, packed) = model(TOKENS, BORDERS), gradients(model)
    total = {name: torch.zeros_like(g) for name, g in packed.items()}
    for start, stop in ((0, 1), (1, 6), (6, 10)):
        alone = torch.tensor([0, stop - start], dtype=torch.int32)
        # the norm computes in fp32
        torch.testing.assert_close(model(TOKENS[start:stop], alone), logits[start:stop], atol=1e-5, rtol=1e-5)
        for name, gradient in gradients(model, TOKENS[start:stop], alone)[1].items():
            total[name] += gradient
    for name, gradient in packed.items():
        torch.testing.assert_close(total[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_padding_of_borders_changes_nothing():
    model = language_model()
    padded = torch.cat([BORDERS, torch.full((7,), 10, dtype=torch.int32)])
    assert torch.equal(model(TOKENS, padded), model(TOKENS, BORDERS))


def test_borders_matter():
    model = language_model()
    whole = model(TOKENS, torch.tensor([0, 10], dtype=torch.int32))
    assert not torch.allclose(whole[5:], model(TOKENS, BORDERS)[5:], atol=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_backends_agree(backend):
    expected, found = language_model()(TOKENS, BORDERS), language_model(attention=backend)(TOKENS, BORDERS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 0.3)], ids=str)
def test_recomputation_changes_nothing(rates, selective):
    """Bit for bit, dropout included: the second pass draws the same masks."""
    config = replace(TINY, drop_rate=rates[0], attn_drop_rate=rates[1], dropout_selective_checkpoint=selective)
    results = []
    for recompute in (0.0, 1.0):
        model = language_model(config, recompute=recompute)
        torch.manual_seed(3)
        results.append(gradients(model))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_recomputation_saves_activations():
    def saved(recompute, selective, norm_type="layernorm"):
        config = replace(TINY, dropout_selective_checkpoint=selective, norm_type=norm_type)
        model = language_model(config, recompute=recompute)
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(TOKENS, BORDERS)
        return count

    assert saved(1.0, False) < saved(0.0, True) < saved(0.0, False)
    assert saved(1.0, False, "rmsnorm") < saved(0.0, True, "rmsnorm") == saved(0.0, False, "rmsnorm")


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, [0, 0, 0]), (0.5, [1, 0, 0]), (0.7, [1, 1, 0]), (1.0, [1, 1, 1])]
)
def test_first_blocks_of_a_stage_recompute(fraction, expected):
    modules = build_modules(entries(), recompute=fraction)
    assert [m.recompute for m in modules if isinstance(m, Block)] == expected
    assert num_recomputed(3, fraction) == sum(expected)


def test_dropout_is_off_in_evaluation():
    model = language_model(replace(TINY, drop_rate=0.5, attn_drop_rate=0.5))
    assert not torch.equal(model(TOKENS, BORDERS), model(TOKENS, BORDERS))
    model.eval()
    torch.testing.assert_close(model(TOKENS, BORDERS), language_model().eval()(TOKENS, BORDERS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_trains(dtype):
    model = language_model(dtype=dtype, scale=5.0)
    exact = language_model(scale=5.0)(TOKENS, BORDERS)
    logits = model(TOKENS, BORDERS)
    assert logits.dtype == dtype
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.08}.get(dtype, 1e-5)
    torch.testing.assert_close(logits.double(), exact, atol=tolerance, rtol=0.05)
    cross_entropy(logits, TOKENS.roll(-1)).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_fp32_norms_in_a_half_model():
    model = LanguageModel(entries(dtype=torch.bfloat16, norm_dtype=torch.float32))
    dtypes = {name: p.dtype for name, p in model.named_logical_parameters()}
    assert {n for n, d in dtypes.items() if d == torch.float32} == {n for n in dtypes if "norm" in n}
    assert model(TOKENS, BORDERS).dtype == torch.bfloat16


def test_residual_in_fp32_is_carried_between_blocks():
    modules = build_modules(entries(replace(TINY, residual_in_fp32=True), dtype=torch.bfloat16))
    hidden, borders = modules[0]((TOKENS, BORDERS))
    assert hidden.dtype == torch.bfloat16
    hidden, borders = modules[1]((hidden, borders))
    assert hidden.dtype == torch.float32 and borders is BORDERS


def test_plain_mlp_is_gelu_of_unrounded_width():
    config = replace(TINY, use_swiglu=False, mlp_ratio=2.6)
    mlp = build_modules(entries(config))[1].mlp
    assert isinstance(mlp, GeluMlp) and mlp.fc1.weight.shape == (41, 16)
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x @ mlp.fc1.weight.T, approximate="tanh") @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_embed_grad_scale_reaches_embedding_and_head_only():
    plain = gradients(language_model())[1]
    scaled = gradients(language_model(replace(TINY, embed_grad_scale=0.1)))[1]
    for name, gradient in plain.items():
        factor = 0.1 if name in ("embedding.weight", "head.weight") else 1.0
        torch.testing.assert_close(scaled[name], gradient * factor, atol=1e-4, rtol=1e-4)


def test_no_seed_leaves_parameters_to_a_checkpoint():
    assert [e.prefix for e in entries(seed=None)] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    LanguageModel(entries(seed=None))


def test_tensor_ranks_that_do_not_divide_are_refused_before_anything_is_built():
    message = r"blocks\.0\.mixer\.Wqkv\.weight \[48, 16\]: 2 units .* parallel\.tensor = 4 ranks; possible here: 1, 2"
    with pytest.raises(LayoutError, match=message):
        build_layers(internlm.build(TINY), TINY, tensor=Axis("tensor", 4), seed=1, dtype=torch.float32)


def test_post_norm_is_refused():
    with pytest.raises(ConfigError, match=r"model\.apply_post_layer_norm = True: .* use False"):
        entries(replace(TINY, apply_post_layer_norm=True))


def test_unknown_family_is_refused():
    arch = replace(internlm.build(TINY), family="gpt")
    with pytest.raises(ConfigError, match="family 'gpt' has no layers; there are internlm, internlm2, llama"):
        build_layers(arch, TINY, tensor=Axis.single("tensor"), seed=1, dtype=torch.float32)
