"""Initial values follow from seed and name alone."""

import torch

from internlm_ds.arch import internlm
from internlm_ds.arch.spec import ParamSpec
from internlm_ds.config.schema import ModelConfig
from internlm_ds.model.init import initial_value, stream_seed
from internlm_ds.model.layers import LanguageModel, build_layers, build_modules
from internlm_ds.parallel.context import Axis

CONFIG = ModelConfig(num_layers=2, hidden_size=16, vocab_size=40, num_attention_heads=2, embed_split_hidden=True)
ARCH = internlm.build(CONFIG)


def layers(dtype=torch.float32, seed=5):
    return build_layers(ARCH, CONFIG, tensor=Axis.single("tensor"), seed=seed, dtype=dtype)


def values(seed=5, dtype=torch.float32):
    return {n: p.detach() for n, p in LanguageModel(layers(dtype, seed)).named_logical_parameters()}


def test_stages_built_alone_and_in_any_order_equal_the_whole():
    whole = values()
    entries = layers()
    torch.manual_seed(99)  # the global generator has no say
    for stage in (entries[3:], entries[:3]):
        for module in build_modules(stage):
            for parameter in module.parameters():
                assert torch.equal(parameter, whole[parameter.logical_name])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    LanguageModel(layers())
    assert torch.equal(torch.rand(3), expected)


def test_dtypes_are_roundings_of_one_draw():
    whole = values()
    for name, value in values(dtype=torch.bfloat16).items():
        assert torch.equal(value, whole[name].bfloat16())


def test_seeds_and_names_differ():
    one, two = values(5), values(6)
    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert not torch.equal(one["blocks.0.mlp.w1.weight"], one["blocks.0.mlp.w3.weight"])
    assert not torch.equal(one["blocks.0.mlp.w1.weight"], one["blocks.1.mlp.w1.weight"])
    assert stream_seed(5, "a") != stream_seed(51, "a") and 0 <= stream_seed(5, "a") < 2**63


def test_constants_and_std():
    assert torch.equal(initial_value(ParamSpec("n", (3,), "norm", init_value=1.0), 0), torch.ones(3))
    drawn = initial_value(ParamSpec("w", (300, 300), "linear", init_std=0.006), 0)
    assert drawn.dtype == torch.float32 and abs(drawn.std().item() / 0.006 - 1) < 0.01


def test_promised_value():
    """The stream of a seed and a name never changes: checkpoints of the future compare with runs of today."""
    assert stream_seed(1024, "head.weight") == 4472527546566658289
