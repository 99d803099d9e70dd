"""Memory formulas: what a block keeps, compared with what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest

from internlm_ds.arch import blueprint, internlm
from internlm_ds.arch.spec import ModelArch
from internlm_ds.config.schema import ModelConfig
from internlm_ds.plan import memory

torch = pytest.importorskip("torch")


def saved_bytes(arch: ModelArch, model: ModelConfig, *, lengths: list[int]) -> int:
    """Bytes of all storages that autograd keeps for one block, parameters and the integers of the batch left out."""
    from internlm_ds.model.layers import build_layers
    from internlm_ds.parallel.context import Axis

    dtype = getattr(torch, model.dtype)
    entries = build_layers(arch, model, tensor=Axis.single("tensor"), seed=0, dtype=dtype)
    block = entries[1].build(False)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    hidden = torch.randn(sum(lengths), model.hidden_size).to(dtype).requires_grad_()
    params = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, object] = {}

    def pack(tensor):  # type: ignore[no-untyped-def]
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block((hidden, cu))[0].sum()
    return sum(storage.nbytes() for storage in kept.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize(
    ("lengths", "more"),
    [
        ([64, 64], {}),
        ([48, 80], {}),
        ([48, 80], {"norm_type": "layernorm"}),
        ([48, 80], {"use_swiglu": False}),
        ([48, 80], {"drop_rate": 0.1}),
    ],
)
def test_block_bytes_is_what_autograd_keeps(
    dtype: str, selective: bool, lengths: list[int], more: dict[str, Any]
) -> None:
    if "drop_rate" in more and not selective:
        pytest.skip("CPU keeps floating masks, the formula counts the byte masks of a GPU")
    model = ModelConfig(
        num_layers=1,
        hidden_size=128,
        vocab_size=64,
        num_attention_heads=4,
        mlp_ratio=8 / 3,
        dtype=dtype,
        dropout_selective_checkpoint=selective,
        **more,
    )
    arch = internlm.build(model)
    planned = memory.block_bytes(arch, model, tokens=sum(lengths))
    real = saved_bytes(arch, model, lengths=lengths)
    assert 0.85 * planned <= real <= 1.02 * planned, f"planned {planned}, kept {real}"


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("model_type", ["INTERNLM2_PUBLIC", "LLAMA2"])
@pytest.mark.parametrize("more", [{}, {"apply_post_layer_norm": True}, {"num_kv_attention_heads": 4}], ids=str)
def test_block_bytes_of_grouped_heads(model_type: str, more: dict[str, Any], selective: bool) -> None:
    sizes = {"num_layers": 1, "hidden_size": 256, "vocab_size": 64, "num_attention_heads": 8, "mlp_ratio": 2.0}
    common = {"num_kv_attention_heads": 2, "dtype": "bfloat16", "dropout_selective_checkpoint": selective}
    model = ModelConfig(**{**sizes, **common, **more})
    arch = blueprint(model_type, model)
    assert arch is not None
    planned = memory.block_bytes(arch, model, tokens=128)
    real = saved_bytes(arch, model, lengths=[48, 80])
    assert 0.85 * planned <= real <= 1.02 * planned, f"planned {planned}, kept {real}"


def test_formulas_name_the_width_of_keys() -> None:
    model = ModelConfig(num_attention_heads=8, num_kv_attention_heads=2)
    for model_type, kept in (("INTERNLM2_PUBLIC", "8H + 3K + 3F"), ("LLAMA2", "7H + 2K + 3F")):
        arch = blueprint(model_type, model)
        assert arch is not None
        assert memory.block_formula(arch, model) == f"(b·T·({kept}) + 4·T·(N + 4D))"
    assert memory.block_formula(internlm.build(model), model) == "(b·T·(11H + 3F) + 4·T·(N + 2D))"


@pytest.mark.parametrize(
    ("chunked", "tensor", "formula"),
    [
        ("auto", 1, "2601·V·(4 + b) + 4·T·H + V·H·(4 + b)"),
        ("auto", 2, "5203·v·(4 + b) + 4·T·H + v·H·(4 + b)"),
        (False, 1, "T·V·(12 + b)"),
        (False, 2, "T·v·(12 + b)"),
    ],
)
def test_loss_in_chunks(chunked: Any, tensor: int, formula: str) -> None:
    """Tokens of a micro-batch are all there, a chunk's logits are what the layers would make."""
    model = ModelConfig(num_layers=1, hidden_size=64, vocab_size=103168, num_attention_heads=4, dtype="bfloat16")
    step = memory.Step(tokens=8192, micro_num=1, chunked_loss=chunked)
    found, written = memory._loss(internlm.build(model), model, step=step, tensor=tensor)
    assert written == formula
    v, rows = 103168 // tensor, {1: 2601, 2: 5203}[tensor]
    in_chunks = rows * v * 6 + 4 * 8192 * 64 + v * 64 * 6
    assert found == (8192 * v * 14 if chunked is False else in_chunks)
