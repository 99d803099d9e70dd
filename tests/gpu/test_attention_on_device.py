"""On a CUDA device: every backend at hand equals the oracle by dtype, and a model equals itself on the CPU."""

import math
from functools import partial

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.attention import flash, kernels, reference, sdpa, varlen
from internlm_ds.attention.kernels import Setting, Unfit
from internlm_ds.attention.segments import Segments
from internlm_ds.attention.select import select
from internlm_ds.config.schema import ModelConfig
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BORDERS = {
    "equal": [0, 64, 128, 192],
    "unequal": [0, 1, 90, 192],
    "one": [0, 192],
    "many": [0, 1, 2, 5, 9, 10, 40, 47, 60, 61, 62, 100, 101, 130, 192],
}
HEAD_DIM = 64
ANYWHERE = {"sdpa": sdpa.attend, "sdpa one by one": sdpa.one_by_one, "sdpa in batches": sdpa.in_batches}
GENERATIONS = {generation.name: generation for generation in flash.GENERATIONS}
HALF = [*GENERATIONS, "varlen", *ANYWHERE]


def backend(name, *, dtype, deterministic=False):
    """Its function; skips the test where it is not installed, or not for this device."""
    if name in ANYWHERE:
        return ANYWHERE[name]
    setting = Setting.of("cuda", dtype, HEAD_DIM, deterministic=deterministic)
    if name == "varlen":
        try:
            return varlen.find(setting)
        except Unfit as why:
            pytest.skip(str(why))
    generation = GENERATIONS[name]
    if not generation.installed:
        pytest.skip(f"{name} is not installed")
    if (why := generation.unfit(setting)) is not None:
        pytest.skip(f"{name} {why}")
    return flash.load(generation, deterministic=deterministic).attend


def plain(q, k, v, segments):
    """The formula in the dtype of its arguments, as a user of torch would write it."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~reference.visible(segments, q.device), float("-inf")).softmax(dim=-1)
    return torch.einsum("nqk,knd->qnd", weights, v)


def results(attend, borders, kv_heads, dtype):
    """Output and three gradients."""
    segments = Segments(torch.tensor(borders, dtype=torch.int32, device="cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    # side by side in one row, as a projection leaves them; in values that every dtype holds
    whole = torch.randn(borders[-1], 4 + 2 * kv_heads, HEAD_DIM, device="cuda", generator=generator)
    whole = whole.bfloat16().half().bfloat16().to(dtype).requires_grad_()
    out = attend(*whole.split([4, kv_heads, kv_heads], dim=1), segments)
    assert out.dtype == dtype
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
    (out * weights.to(dtype)).sum().backward()
    return [out.detach(), *whole.grad.split([4, kv_heads, kv_heads], dim=1)]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in HALF for dtype in kernels.HALF] + [(name, torch.float32) for name in ANYWHERE],
)
def test_backend_errs_at_most_twice_as_much_as_plain_torch(name, dtype, borders, kv_heads):
    attend = backend(name, dtype=dtype)
    exact = results(reference.attend, BORDERS[borders], kv_heads, torch.float64)
    usual = results(plain, BORDERS[borders], kv_heads, dtype)
    found = results(attend, BORDERS[borders], kv_heads, dtype)
    for a, b, c in zip(exact, usual, found):
        if dtype == torch.float32:
            assert (c - a).abs().max() <= 1e-6 * max(1.0, a.abs().max())
        # where plain torch is exact (gradients of segments of one token: zero), a rounding of a rounding is no error
        assert (c - a).norm() <= 2 * (b - a).norm() + torch.finfo(dtype).eps ** 2 * a.numel() ** 0.5


@pytest.fixture
def deterministic_torch():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", kernels.HALF)
@pytest.mark.parametrize("name", HALF)
def test_deterministic_gradients_are_the_same_bits(name, dtype, deterministic_torch):
    run = partial(results, backend(name, dtype=dtype, deterministic=True), [0, 1, 900, 2048], 1, dtype)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [*kernels.HALF, torch.float32])
def test_auto_finds_one_that_runs(dtype, dropout, deterministic):
    facts = {"device": "cuda", "dtype": dtype, "head_dim": HEAD_DIM, "dropout": dropout}
    choice = select(**facts, deterministic=deterministic)
    print(choice.line)
    out = results(partial(choice.attend, dropout=dropout), BORDERS["unequal"], 2, dtype)
    assert all(torch.isfinite(x).all() for x in out)


def test_dropout_drops_about_as_many_as_asked_for():
    """With equal values an output is the share of weights that were kept, scaled up again: 1 on average."""
    choice = select(device="cuda", dtype=torch.bfloat16, head_dim=HEAD_DIM, dropout=0.25)
    q = torch.zeros(1024, 4, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out = choice.attend(q, q, torch.ones_like(q), Segments.single(1024, device="cuda"), dropout=0.25)
    assert out.float().mean().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_equals_itself_on_the_cpu(dtype):
    config = ModelConfig(num_layers=2, hidden_size=128, vocab_size=256, num_attention_heads=2, embed_split_hidden=True)
    tokens = torch.randint(0, 256, (96,), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 30, 31, 96, 96], dtype=torch.int32)
    losses = []
    for device in ("cpu", "cuda"):
        layers = build_layers(internlm.build(config), config, tensor=Axis.single("tensor"), seed=1, dtype=dtype)
        model = LanguageModel(layers, recompute=0.5).to(device)
        loss = cross_entropy(model(tokens.to(device), borders.to(device)), tokens.roll(-1).to(device))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 1e-2)
