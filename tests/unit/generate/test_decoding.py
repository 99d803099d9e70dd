"""One token at a time equals the whole sequence at once; what is drawn obeys temperature, top-p and seed."""

from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import blueprint
from internlm_ds.config.schema import ModelConfig
from internlm_ds.generate.cache import LayerCache
from internlm_ds.generate.sampling import Decoder, pick, sample
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis

TINY = ModelConfig(num_layers=2, hidden_size=16, vocab_size=40, num_attention_heads=2, embed_split_hidden=True)
TOKENS = torch.tensor([5, 1, 39, 0, 7, 7, 2, 11, 30, 4])


def language_model(model_type="INTERNLM", **switches):
    config = replace(TINY, **switches)
    layers = build_layers(
        blueprint(model_type, config), config, tensor=Axis.single("tensor"), seed=1, dtype=torch.float64
    )
    model = LanguageModel(layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(30)
    return model.eval()


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"embed_split_hidden": False, "norm_type": "layernorm", "use_swiglu": False},
        {"residual_in_fp32": True, "drop_rate": 0.5, "attn_drop_rate": 0.5},
        {"use_dynamic_ntk_rope": True, "max_position_embeddings": 4},
        {"model_type": "INTERNLM2_PUBLIC", "num_attention_heads": 4, "num_kv_attention_heads": 2, "norm_head": True},
        {"model_type": "LLAMA2", "num_attention_heads": 4, "num_kv_attention_heads": 1, "apply_post_layer_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [[10], [1] * 10, [4, 1, 2, 3]], ids=str)
def test_cache_equals_full_forward(switches, steps):
    model = language_model(**switches)
    decoder, start = Decoder(model), 0
    for step in steps:
        logits = decoder.advance(TOKENS[start : start + step])
        start += step
        whole = model(TOKENS[:start], torch.tensor([0, start], dtype=torch.int32))
        torch.testing.assert_close(logits, whole[-step:].detach(), atol=1e-5, rtol=1e-5)


def test_cache_grows():
    cache, expected = LayerCache(), []
    for step in (3, 1, 1, 5, 1):
        new = torch.randn(step, 2, 4)
        expected.append(new)
        keys, values = cache.append(new, -new)
        assert torch.equal(keys, torch.cat(expected)) and torch.equal(values, -keys)


def test_greedy_takes_the_likeliest_each_time():
    model = language_model()
    new = list(sample(model, [5, 1, 39], max_new_tokens=4, temperature=0))
    ids = [5, 1, 39]
    for token in new:
        logits = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
        assert token == logits[-1].argmax()
        ids.append(token)
    assert len(ids) == 7


def test_seed_repeats_and_matters():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(sample(language_model(), [5], max_new_tokens=12, generator=generator))

    assert draw(1) == draw(1) != draw(2)


def test_stop_ids_end_without_being_yielded():
    model = language_model()
    new = list(sample(model, [5, 1], max_new_tokens=5, temperature=0))
    until = next(i for i, token in enumerate(new) if token == new[2])
    assert list(sample(model, [5, 1], max_new_tokens=5, temperature=0, stop_ids=[new[2]])) == new[:until]


def test_padded_vocabulary_is_never_drawn():
    model = language_model()
    assert all(t < 3 for t in sample(model, [1], max_new_tokens=30, num_tokens=3))


def test_pick():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return {pick(logits, generator=generator, **options) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0) == drawn(top_p=0.4) == drawn(temperature=1e-3) == {0}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=0.75) == {0, 1}
    assert drawn(top_p=0.9) == {0, 1, 2}
