"""Every layer over 2 and 4 tensor ranks equals the layer on one, outputs and gradients, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.arch.spec import ParamSpec
from internlm_ds.attention.segments import Segments
from internlm_ds.attention.select import attention_function
from internlm_ds.config.schema import ModelConfig
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import bounds
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.model.metrics import TokenMetrics, token_values
from internlm_ds.model.mlp import GeluMlp, SwigluMlp
from internlm_ds.model.norm import LayerNorm
from internlm_ds.model.rotary import Rotary
from internlm_ds.model.self_attention import GroupedAttention, PackedAttention, SelfAttention, SeparateAttention
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.embedding import HiddenSplitEmbedding, VocabSplitEmbedding
from internlm_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear
from internlm_ds.parallel.shards import shard_of_parameter, take
from internlm_ds.testing.parity import assert_sharded_equals_whole
from internlm_ds.testing.ranks import RankError, run_ranks

pytestmark = pytest.mark.timeout(120)
D = torch.float64
SIZES = [2, 4]


@pytest.mark.parametrize("size", SIZES)
def test_layers_over_ranks_equal_whole_layers(size: int):
    run_ranks(_every_layer, Layout(tensor=size), timeout_s=100)


def normal(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def _every_layer(context) -> None:
    axis = context.tensor
    for check in (_columns, _rows, _embeddings, _mlps, _attention, _norm, _losses, _metrics):
        check(axis)


def _columns(axis: Axis) -> None:
    specs = [ParamSpec("weight", (12, 8), "linear", split_dim=0), ParamSpec("bias", (12,), "bias", split_dim=0)]
    layer = lambda a, **k: ColumnParallelLinear(8, 12, tensor=a, dtype=D, **k)  # noqa: E731
    assert_sharded_equals_whole(layer, specs, axis=axis, x=normal(8, 8), output_dim=1)
    assert_sharded_equals_whole(lambda a: layer(a, gather_output=True), specs, axis=axis, x=normal(8, 8))
    assert_sharded_equals_whole(
        lambda a: layer(a, sequence_parallel=a.size > 1), specs, axis=axis, x=normal(8, 8), input_dim=0, output_dim=1
    )
    odd = [ParamSpec("weight", (11, 8), "head", split_dim=0, uneven=True)]
    head = lambda a, **k: ColumnParallelLinear(8, 11, tensor=a, bias=False, uneven=True, dtype=D, **k)  # noqa: E731
    assert_sharded_equals_whole(head, odd, axis=axis, x=normal(5, 8), output_dim=1)
    for options in ({"gather_output": True}, {"gather_output": True, "weight_scale": 0.25}):
        assert_sharded_equals_whole(lambda a, o=options: head(a, **o), odd, axis=axis, x=normal(5, 8))


def _rows(axis: Axis) -> None:
    specs = [
        ParamSpec("weight", (6, 8), "linear", split_dim=1),
        ParamSpec("bias", (6,), "bias", on_first_tensor_rank_only=True),
    ]
    layer = lambda a, **k: RowParallelLinear(8, 6, tensor=a, dtype=D, **k)  # noqa: E731
    assert_sharded_equals_whole(layer, specs, axis=axis, x=normal(4, 8), input_dim=1)
    assert_sharded_equals_whole(
        lambda a: layer(a, sequence_parallel=a.size > 1), specs, axis=axis, x=normal(4, 8), input_dim=1, output_dim=0
    )


def _embeddings(axis: Axis) -> None:
    tokens = torch.tensor([0, 12, 3, 6, 7, 12, 9, 3])
    hidden = [ParamSpec("weight", (13, 8), "embedding", split_dim=1)]
    vocab = [ParamSpec("word_embeddings.weight", (13, 8), "embedding", split_dim=0, uneven=True)]
    for kind, specs in ((HiddenSplitEmbedding, hidden), (VocabSplitEmbedding, vocab)):
        for sequence_parallel in (False, True):
            assert_sharded_equals_whole(
                lambda a, k=kind, s=sequence_parallel: k(
                    13, 8, tensor=a, sequence_parallel=s and a.size > 1, grad_scale=0.1, dtype=D
                ),
                specs,
                axis=axis,
                x=tokens,
                output_dim=0 if sequence_parallel else None,
            )


def _mlps(axis: Axis) -> None:
    swiglu = [
        ParamSpec("w1.weight", (12, 8), "linear", split_dim=0),
        ParamSpec("w2.weight", (8, 12), "linear", split_dim=1),
        ParamSpec("w3.weight", (12, 8), "linear", split_dim=0),
    ]
    gelu = [
        ParamSpec("fc1.weight", (12, 8), "linear", split_dim=0),
        ParamSpec("fc2.weight", (8, 12), "linear", split_dim=1),
    ]
    for kind, specs in ((SwigluMlp, swiglu), (GeluMlp, gelu)):
        for sequence_parallel in (False, True):
            dim = 0 if sequence_parallel else None
            assert_sharded_equals_whole(
                lambda a, k=kind, s=sequence_parallel: k(8, 12, tensor=a, sequence_parallel=s and a.size > 1, dtype=D),
                specs,
                axis=axis,
                x=normal(8, 8),
                input_dim=dim,
                output_dim=dim,
            )


class OneInput(torch.nn.Module):
    """Attention over fixed segments, as a layer of one input."""

    def __init__(self, kind: type[SelfAttention], axis: Axis, sequence_parallel: bool, groups: int):
        super().__init__()
        self.inner = kind(
            16,
            4,
            groups,
            rotary=Rotary(4, dynamic_ntk=True, max_position_embeddings=3),
            attend=attention_function("sdpa", use_flash_attn=False),
            tensor=axis,
            sequence_parallel=sequence_parallel,
            dtype=D,
        )
        self.segments = Segments(torch.tensor([0, 3, 8], dtype=torch.int32))

    def forward(self, x):
        return self.inner(x, self.segments)


def _attention(axis: Axis) -> None:
    output = [
        ParamSpec("weight", (16, 16), "linear", split_dim=1, granule=4),
        ParamSpec("bias", (16,), "bias", on_first_tensor_rank_only=True),
    ]
    groups = max(2, axis.size)

    def rows(name: str, count: int, **split) -> list[ParamSpec]:
        return [
            ParamSpec(f"{name}.weight", (count, 16), "linear", split_dim=0, **split),
            ParamSpec(f"{name}.bias", (count,), "bias", split_dim=0, **split),
        ]

    packed = rows("Wqkv", 48, parts=3, granule=4)
    grouped = rows("wqkv", 16 + 8 * groups, granule=(16 + 8 * groups) // groups)
    separate = [*rows("wq", 16), *rows("wk", 4 * groups), *rows("wv", 4 * groups)]
    kinds = (
        (PackedAttention, 4, packed, "out_proj"),
        (GroupedAttention, groups, grouped, "wo"),
        (SeparateAttention, groups, separate, "wo"),
    )
    for kind, num_groups, projections, name in kinds:
        specs = [*projections, *(replace(spec, name=f"{name}.{spec.name}") for spec in output)]
        for sequence_parallel in (False, True):
            dim = 0 if sequence_parallel else None
            assert_sharded_equals_whole(
                lambda a, k=kind, s=sequence_parallel, g=num_groups: OneInput(k, a, s and a.size > 1, g),
                [replace(spec, name=f"inner.{spec.name}") for spec in specs],
                axis=axis,
                x=normal(8, 16) * 0.3,
                input_dim=dim,
                output_dim=dim,
                tolerance=1e-8,
            )


def _norm(axis: Axis) -> None:
    specs = [ParamSpec("weight", (6,), "norm"), ParamSpec("bias", (6,), "norm")]
    layer = lambda a: LayerNorm(6, eps=1e-5, dtype=D, weight_dtype=D)  # noqa: E731
    # the norm computes in fp32
    assert_sharded_equals_whole(
        layer, specs, axis=axis, x=normal(8, 6), input_dim=0, output_dim=0, partial=("weight", "bias"), tolerance=1e-5
    )


def _labels() -> torch.Tensor:
    return torch.tensor([0, 12, -100, 6, 7, 12, -100, 3])


def _losses(axis: Axis) -> None:
    whole = normal(8, 13) * 4
    whole[1] += 1000  # exponentials would overflow without the shift
    start, stop = bounds(13, size=axis.size, rank=axis.rank)
    for smoothing in (0.0, 0.1):
        for labels in (_labels(), torch.full((8,), -100)):
            results = []
            for logits, tensor in ((whole, Axis.single("tensor")), (whole[:, start:stop], axis)):
                logits = logits.clone().requires_grad_()
                loss = cross_entropy(logits, labels, label_smoothing=smoothing, tensor=tensor, vocab_size=13)
                (3 * loss).backward()
                results.append((loss.detach(), logits.grad))
            close = {"equal_nan": True, "atol": 1e-10, "rtol": 1e-10}
            torch.testing.assert_close(results[1][0], results[0][0], **close)
            torch.testing.assert_close(results[1][1], results[0][1][:, start:stop], **close)
    half = whole[:, start:stop].to(torch.bfloat16).requires_grad_()
    loss = cross_entropy(half, _labels(), tensor=axis, vocab_size=13)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    bad = whole[:, start:stop].clone()
    if axis.rank == 0:
        bad[0, 0] = float("nan")
    assert cross_entropy(bad, _labels(), tensor=axis, vocab_size=13).isnan(), "every rank must see the NaN"


def _metrics(axis: Axis) -> None:
    whole = normal(8, 13)
    whole[0, 0] = whole[0, 12] = 9  # a tie over two ranks
    whole[1, 5] = whole[1, 12] = 9
    whole[4, 7] = 9
    start, stop = bounds(13, size=axis.size, rank=axis.rank)
    expected = token_values(whole, _labels())
    assert expected[[0, 1, 4], 0].tolist() == [1, 0, 1]
    torch.testing.assert_close(token_values(whole[:, start:stop], _labels(), tensor=axis, vocab_size=13), expected)
    types = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1])
    results = []
    for logits, tensor in ((whole, None), (whole[:, start:stop], axis)):
        metrics = TokenMetrics(("en", "cn"), tensor=tensor, vocab_size=13)
        metrics.update(logits, _labels(), types)
        results.append(metrics.finish())
    assert results[0] == results[1]


# ---- whole models --------------------------------------------------------------------------------------------------

TINY = ModelConfig(
    num_layers=2, hidden_size=32, vocab_size=131, num_attention_heads=4, mlp_ratio=8 / 3, embed_split_hidden=True
)
SWITCHES = [
    {},
    {"embed_split_hidden": False, "parallel_output": False},
    {"norm_type": "layernorm", "use_swiglu": False, "mlp_ratio": 2},
    {"embed_grad_scale": 0.1, "residual_in_fp32": True, "embed_split_hidden": False},
    {"drop_rate": 0.2},
]
TOKENS = torch.tensor([5, 1, 130, 0, 7, 7, 2, 11, 30, 4, 99, 98])
BORDERS = torch.tensor([0, 1, 8, 12], dtype=torch.int32)


@pytest.mark.parametrize("size", SIZES)
def test_models_over_ranks_equal_whole_models(size: int):
    """Initial values, flags, loss and gradients, with and without sequence parallelism, recomputed or not."""
    run_ranks(_every_model, Layout(tensor=size), timeout_s=100)


def _every_model(context) -> None:
    for switch in SWITCHES:
        config = replace(TINY, **switch)
        expected = _model_run(config, Axis.single("tensor"))
        for sequence_parallel in (False, True):
            if sequence_parallel and config.drop_rate:
                continue  # masks of split activations are other masks
            for recompute in (0.0, 1.0):
                found = _model_run(config, context.tensor, sequence_parallel=sequence_parallel, recompute=recompute)
                _compare(config, context.tensor, found, expected)


def _model_run(config: ModelConfig, axis: Axis, *, sequence_parallel: bool = False, recompute: float = 0.0):
    entries = build_layers(
        internlm.build(config), config, tensor=axis, seed=3, dtype=D, sequence_parallel=sequence_parallel
    )
    model = LanguageModel(entries, recompute=recompute)
    values = {name: p.detach().clone() for name, p in model.named_logical_parameters()}
    with torch.no_grad():
        for _, parameter in model.named_logical_parameters():
            parameter.mul_(10)
    torch.manual_seed(11)
    logits = model(TOKENS, BORDERS)
    tensor = axis if config.parallel_output else Axis.single("tensor")
    loss = cross_entropy(logits, TOKENS.roll(-1), label_smoothing=0.1, tensor=tensor, vocab_size=config.vocab_size)
    loss.backward()
    return loss.detach(), values, dict(model.named_logical_parameters())


def _compare(config: ModelConfig, axis: Axis, found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)
    specs = {spec.name: spec for spec in internlm.build(config).iter_params()}
    for name, parameter in found[2].items():
        shard, grad = shard_of_parameter(parameter), parameter.grad
        assert torch.equal(found[1][name], take(expected[1][name], shard)), f"initial {name}"
        assert (specs[name].split_dim is not None) == (shard is not None) == hasattr(parameter, "tensor_model_parallel")
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(grad, group=axis.group)
        expected_grad = take(expected[2][name].grad, shard)
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_replicated_gradients_are_bit_equal_on_all_tensor_ranks():
    """They are counted once in the norm, and replicas must not drift apart; dropout masks are the same on all ranks."""
    ranks = run_ranks(_norm_gradients, Layout(tensor=2), timeout_s=60)
    assert ranks[0] and ranks[0].keys() == ranks[1].keys()
    for name, gradient in ranks[0].items():
        assert torch.equal(gradient, ranks[1][name]), name


def _norm_gradients(context) -> dict:
    _, _, parameters = _model_run(replace(TINY, drop_rate=0.2), context.tensor)
    return {name: p.grad for name, p in parameters.items() if "norm" in name}


def test_tokens_that_do_not_divide_end_all_ranks():
    with pytest.raises(RankError, match=r"tokens of a micro-batch = 7 does not divide by parallel\.tensor = 2"):
        run_ranks(_odd_tokens, Layout(tensor=2), timeout_s=60)


def _odd_tokens(context) -> None:
    RowParallelLinear(8, 6, tensor=context.tensor, sequence_parallel=True)(torch.zeros(7, 4))


def test_parity_notices_a_layer_that_is_split_wrongly():
    with pytest.raises(RankError, match="output"):
        run_ranks(_wrong_split, Layout(tensor=2), timeout_s=60)


def _wrong_split(context) -> None:
    specs = [ParamSpec("weight", (12, 8), "linear", split_dim=0, parts=3)]
    assert_sharded_equals_whole(
        lambda a: ColumnParallelLinear(8, 12, tensor=a, bias=False, dtype=D),
        specs,
        axis=context.tensor,
        x=normal(5, 8),
        output_dim=1,
    )
