"""Blueprints of configurations, and sizes that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from internlm_ds.arch import build, check, tensor_divisors
from internlm_ds.config.schema import (
    AdamConfig,
    Beta2SchedulerConfig,
    CkptConfig,
    Config,
    DataConfig,
    GradScalerConfig,
    HybridZeroOptimizerConfig,
    LossConfig,
    LrSchedulerConfig,
    ModelConfig,
)

SEVEN_B = ModelConfig(
    num_layers=32, hidden_size=4096, vocab_size=103168, num_attention_heads=32, mlp_ratio=8 / 3, embed_split_hidden=True
)


def config(model: ModelConfig, model_type: str = "INTERNLM") -> Config:
    return Config(
        ckpt=CkptConfig(),
        data=DataConfig(),
        grad_scaler=GradScalerConfig(),
        hybrid_zero_optimizer=HybridZeroOptimizerConfig(reduce_bucket_size=1, clip_grad_norm=1.0),
        loss=LossConfig(),
        adam=AdamConfig(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01),
        lr_scheduler=LrSchedulerConfig(total_steps=1),
        beta2_scheduler=Beta2SchedulerConfig(init_beta2=0.95),
        model=model,
        model_type=model_type,
    )


def messages(model: ModelConfig, model_type: str = "INTERNLM") -> list[str]:
    return [str(problem) for problem in check(config(model, model_type), line_of={"model.num_attention_heads": 7}.get)]


def test_the_tutorial_model() -> None:
    arch = build(config(SEVEN_B))
    assert arch is not None
    assert arch.num_params == 7_321_948_160
    assert (arch.head_dim, arch.mlp_hidden_size, len(arch.layers)) == (128, 11008, 35)
    names = [param.name for param in arch.params]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("model_type", ["INTERNLM_MoE", "my:builder"])
def test_families_without_a_blueprint(model_type: str) -> None:
    assert build(config(SEVEN_B, model_type)) is None


@pytest.mark.parametrize(
    ("model_type", "groups", "allowed"),
    [
        ("INTERNLM", None, [1, 2, 4, 8, 16, 32]),
        ("INTERNLM2_PUBLIC", 8, [1, 2, 4, 8]),
        ("LLAMA2", 4, [1, 2, 4]),
        ("LLAMA2", None, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_every_split_is_even_where_the_divisors_allow_it(
    model_type: str, groups: int | None, allowed: list[int]
) -> None:
    """What `tensor_divisors` promises holds for every parameter of the blueprint."""
    model = config(replace(SEVEN_B, num_kv_attention_heads=groups), model_type)
    arch = build(model)
    assert arch is not None
    found = [t for t in range(1, 64) if all(size % t == 0 for _, size in tensor_divisors(model))]
    assert found == allowed
    for param in arch.params:
        if param.split_dim is not None:
            pieces = param.shape[param.split_dim] // param.parts // param.granule
            assert all(pieces % t == 0 for t in allowed), param


def test_sizes_that_cannot_be() -> None:
    assert messages(SEVEN_B) == []
    assert messages(replace(SEVEN_B, num_attention_heads=48)) == [
        "model.num_attention_heads = 48 (line 7): must divide model.hidden_size = 4096; nearest: 32 or 64"
    ]
    assert messages(replace(SEVEN_B, num_attention_heads=4096)) == [
        "model.num_attention_heads = 4096 (line 7): makes heads of 1 elements; rotary embedding needs an even number"
    ]
    assert messages(replace(SEVEN_B, num_kv_attention_heads=5), "INTERNLM2_PUBLIC") == [
        "model.num_kv_attention_heads = 5: must divide model.num_attention_heads = 32; "
        "possible here: 1, 2, 4, 8, 16, 32"
    ]


def test_registered_model_types_are_not_looked_into() -> None:
    odd = replace(SEVEN_B, num_attention_heads=48)
    assert messages(odd, "my:builder") == []
    assert tensor_divisors(config(odd, "my:builder")) == []


def test_the_vocabulary_need_not_divide() -> None:
    assert [name for name, _ in tensor_divisors(config(SEVEN_B))] == ["model.num_attention_heads", "the MLP width"]
    grouped = tensor_divisors(config(replace(SEVEN_B, num_kv_attention_heads=4), "INTERNLM2_PUBLIC"))
    assert ("model.num_kv_attention_heads", 4) in grouped


def test_the_plain_mlp_has_another_width() -> None:
    plain = config(replace(SEVEN_B, use_swiglu=False, mlp_ratio=2.6))
    assert ("the MLP width", 10649) in tensor_divisors(plain)
