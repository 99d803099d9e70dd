"""RMSNorm, SwiGLU and rotary, which keep less or pass less often, against the plain forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internlm_ds.model.mlp import swiglu, swiglu_plain
from internlm_ds.model.norm import RmsNorm, rms_norm_plain
from internlm_ds.model.rotary import rotate, rotate_plain

T, H = 24, 32
EPS = 1e-5
# of the largest element; gradients of a norm are added up in another order, before they are rounded
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def differentiated(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    grad = normal(*out.shape, dtype=out.dtype, seed=9).detach()
    return out, *torch.autograd.grad(out, inputs, grad)


def kept(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes of the storages that autograd keeps."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inputs)
    assert out.grad_fn is not None
    return sum(storages.values())


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize(
    ("residual", "weights", "out"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),  # use_fp32_norm
        (torch.float32, torch.float16, torch.float16),  # residual_in_fp32
    ],
)
def test_rms_norm(residual, weights, out):
    x, weight = normal(T, H, dtype=residual), normal(H, dtype=weights, seed=1)
    norm = RmsNorm(H, eps=EPS, dtype=out, weight_dtype=weights)
    norm.weight = torch.nn.Parameter(weight.detach())
    plain = lambda x, w: rms_norm_plain(x, w, EPS, out)  # noqa: E731
    found, expected = differentiated(lambda x, _: norm(x), x, norm.weight), differentiated(plain, x, norm.weight)
    assert torch.equal(found[0], expected[0])
    assert_close(found[1:], expected[1:], max(TOLERANCE[residual], TOLERANCE[weights]))
    few_bytes = 4 * T + weight.nbytes
    assert kept(norm, x) == x.nbytes + few_bytes <= kept(plain, x, norm.weight)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_is_equal_bit_for_bit(dtype):
    gate, up = normal(T, H, dtype=dtype), normal(T, H, dtype=dtype, seed=1)
    for one, other in zip(differentiated(swiglu, gate, up), differentiated(swiglu_plain, gate, up), strict=True):
        assert torch.equal(one, other)
    assert kept(swiglu, gate, up) == gate.nbytes + up.nbytes < kept(swiglu_plain, gate, up)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(T, 2, 8), (T, 2, 3, 8)])
def test_rotary(dtype, shape):
    whole = normal(*shape[:-2], shape[-2] + 1, 8, dtype=dtype)
    x = whole[..., 1:, :]  # as projections hand it over: a part of them
    angles = torch.randn(T, 4, generator=torch.Generator().manual_seed(1))
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    found, expected = (differentiated(lambda x, f=f: f(x, tables), x) for f in (rotate, rotate_plain))
    assert_close(found, expected, {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, TOLERANCE[dtype]))


@pytest.mark.parametrize("piece", ["norm", "swiglu", "rotary"])
def test_pieces_can_be_compiled(piece):
    """Traced whole, without a break; the compiler behind it is left out."""
    x, y = normal(T, H, dtype=torch.float32), normal(T, H, dtype=torch.float32, seed=1)
    norm = RmsNorm(H, eps=EPS, dtype=torch.float32, weight_dtype=torch.float32)
    torch.nn.init.normal_(norm.weight)
    angles = torch.randn(T, H // 2)
    pieces = {
        "norm": lambda x, y: norm(x) * y,
        "swiglu": swiglu,
        "rotary": lambda x, y: rotate(x[:, None], (angles.cos(), angles.sin()))[:, 0] * y,
    }
    compiled = torch.compile(pieces[piece], backend="aot_eager", fullgraph=True)
    assert_close(differentiated(compiled, x, y), differentiated(pieces[piece], x, y), 1e-6)
