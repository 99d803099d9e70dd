"""The loss in chunks and the fused pieces on a GPU: against fp32, within twice the error of the plain form there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internlm_ds.model.loss import chunked_cross_entropy, cross_entropy
from internlm_ds.model.mlp import swiglu, swiglu_plain
from internlm_ds.model.norm import RmsNorm, rms_norm_plain
from internlm_ds.model.rotary import rotate, rotate_plain
from internlm_ds.parallel import linear_cross_entropy as chunked
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear_cross_entropy import PendingLogits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, H, V = 300, 64, 1000


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype).requires_grad_()


def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    grad = torch.ones((), device="cuda") if out.dim() == 0 else normal(*out.shape, dtype=out.dtype, seed=9).detach()
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def assert_twice_the_error(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for found, other, exact in zip(run(ours, *inputs), run(plain, *inputs), run(plain, *wide), strict=True):
        assert found.dtype == other.dtype
        largest = exact.abs().max().item()
        allowed = 2 * (other.double() - exact).abs().max().item() + 1e-6 * largest
        assert (found.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_in_chunks(dtype: torch.dtype, smoothing: float, monkeypatch):
    monkeypatch.setattr(chunked, "rows_of_chunk", lambda width, *, device: 64)
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2))
    labels[::5] = -100
    labels = labels.cuda()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return 1024 * cross_entropy(hidden @ weight.t(), labels, label_smoothing=smoothing)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        pending = PendingLogits(hidden, weight, Axis.single("tensor"), V)
        return 1024 * chunked_cross_entropy(pending, labels, label_smoothing=smoothing)[0]

    assert_twice_the_error(ours, plain, normal(T, H, dtype=dtype, seed=0), normal(V, H, dtype=dtype, seed=1))


def test_memory_of_a_large_vocabulary_is_under_a_quarter():
    hidden, weight = (normal(n, 512, dtype=torch.float32, seed=n) for n in (8192, 103168))
    labels = torch.zeros(8192, dtype=torch.int64, device="cuda")
    pending = PendingLogits(hidden, weight, Axis.single("tensor"), 103168)
    extra = []
    for loss_of in (
        lambda: cross_entropy(hidden @ weight.t(), labels),
        lambda: chunked_cross_entropy(pending, labels)[0],
    ):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of().backward()
        extra.append(torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes)
    assert extra[1] < extra[0] / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces(dtype: torch.dtype):
    x, y = normal(T, H, dtype=dtype, seed=0), normal(T, H, dtype=dtype, seed=1)
    assert_twice_the_error(swiglu, swiglu_plain, x, y)
    norm = RmsNorm(H, eps=1e-5, dtype=dtype, weight_dtype=dtype).cuda()
    torch.nn.init.ones_(norm.weight)
    plain = lambda v: rms_norm_plain(v, norm.weight.detach(), 1e-5, v.dtype)  # noqa: E731
    for found, other in zip(run(norm, x), run(plain, x), strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=2e-2 if dtype != torch.float32 else 1e-5)
    angles = normal(T, 8, dtype=torch.float32, seed=3).detach()
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    heads = normal(T, 4, 16, dtype=dtype, seed=4)
    assert_twice_the_error(lambda v: rotate(v, tables), lambda v: rotate_plain(v, tables), heads)
