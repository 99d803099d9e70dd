"""On a CUDA device: fast backends equal the oracle by dtype, and a model equals itself on the CPU."""

import importlib.util

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.attention import flash, reference, sdpa
from internlm_ds.attention.segments import Segments
from internlm_ds.config.schema import ModelConfig
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}
BORDERS = [[0, 64, 128, 192], [0, 1, 90, 192], [0, 192]]


def backends():
    yield pytest.param(sdpa.attend, list(TOLERANCE), id="sdpa")
    absent = importlib.util.find_spec("flash_attn") is None
    yield pytest.param(
        flash.attend, list(flash.DTYPES), id="flash", marks=pytest.mark.skipif(absent, reason="flash-attn is absent")
    )


@pytest.mark.parametrize("borders", BORDERS, ids=str)
@pytest.mark.parametrize(("attend", "dtypes"), list(backends()))
def test_backend_equals_oracle(attend, dtypes, borders):
    segments = Segments(torch.tensor(borders, dtype=torch.int32, device="cuda"))
    for dtype in dtypes:
        torch.manual_seed(0)
        q, k, v = (torch.randn(192, 4, 64, device="cuda", dtype=dtype) for _ in range(3))
        results = []
        for function in (reference.attend, attend):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            out = function(*inputs, segments)
            out.float().sin().sum().backward()
            results.append([out, *(x.grad for x in inputs)])
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype] * 5, rtol=TOLERANCE[dtype])


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
