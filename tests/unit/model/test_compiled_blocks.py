"""Compiled blocks: equal to eager ones, not compiled anew for other segments, refused or left out where they cannot be.

All but one test stop before machine code is made (`aot_eager`), which takes a compiler half a minute.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch.nn.functional import cross_entropy

from internlm_ds.arch import blueprint
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import MachineError
from internlm_ds.model import compiled
from internlm_ds.model.block import Block
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.deferred import WeightGrads

pytestmark = pytest.mark.timeout(300)
CASES = [
    ("LLAMA2", 0.5),
    *(
        pytest.param(*case, marks=pytest.mark.soak)
        for case in (("LLAMA2", 0.0), ("INTERNLM", 0.5), ("INTERNLM", 0.0), ("INTERNLM2_PUBLIC", 0.5))
    ),
]
BORDERS = [[0, 5, 24], [0, 24], [0, 1, 2, 9, 24], [0, 3, 16], [0, 16], [0, 1, 11]]


def language_model(family: str, **changes) -> LanguageModel:
    recompute = changes.pop("recompute", 0.0)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "mlp_ratio": 2.0}
    config = ModelConfig(**{**sizes, "dtype": "float32", **changes})
    arch = blueprint(family, config)
    assert arch is not None
    entries = build_layers(arch, config, tensor=Axis.single("tensor"), seed=5, dtype=torch.float32)
    return LanguageModel(entries, recompute=recompute)


@pytest.fixture
def without_machine_code(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def gradients(model: LanguageModel, borders: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(borders[-1])
    tokens = torch.randint(1, 64, (borders[-1] + 1,), generator=generator)
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(tokens[:-1], torch.tensor(borders, dtype=torch.int32))
    cross_entropy(logits, tokens[1:]).backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def assert_equal(model: LanguageModel, oracle: LanguageModel, borders: list[int]) -> None:
    for found, expected in zip(gradients(model, borders), gradients(oracle, borders), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "recompute"), CASES)
def test_other_segments_and_lengths_compile_nothing_anew(without_machine_code, family, recompute):
    model, oracle = language_model(family, recompute=recompute), language_model(family, recompute=recompute)
    assert "2 blocks" in compiled.compile_blocks(model.layers)
    counts = []
    for borders in BORDERS:
        assert_equal(model, oracle, borders)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch._dynamo.utils.counters["stats"].clear()
    # the first length, then the second, which stands for all that follow; segments never
    assert counts[0] > 0 and counts[1:3] == [0, 0] and counts[4:] == [0, 0], counts
    model.eval()
    with torch.no_grad():
        model(torch.arange(10), torch.tensor([0, 10], dtype=torch.int32))


def test_dropout_and_recomputation_go_together(without_machine_code):
    changes = {"drop_rate": 0.2, "residual_in_fp32": True, "recompute": 1.0}
    model, oracle = language_model("LLAMA2", **changes), language_model("LLAMA2", **changes)
    compiled.compile_blocks(model.layers)
    assert_equal(model, oracle, BORDERS[0])


def test_post_norm_blocks(without_machine_code):
    changes = {"apply_post_layer_norm": True, "dropout_selective_checkpoint": True}
    model, oracle = language_model("INTERNLM2_PUBLIC", **changes), language_model("INTERNLM2_PUBLIC", **changes)
    compiled.compile_blocks(model.layers)
    assert_equal(model, oracle, BORDERS[0])


def test_machine_code_equals_eager():
    """Forward and backward code of one block, by torch's own compiler."""
    torch._dynamo.reset()
    model, oracle = language_model("LLAMA2", num_layers=1), language_model("LLAMA2", num_layers=1)
    compiled.compile_blocks(model.layers)
    assert_equal(model, oracle, BORDERS[0])


def test_blocks_that_cannot_be_compiled_stay_as_they_are():
    model = language_model("LLAMA2")
    (block, *_) = (layer for layer in model.layers if isinstance(layer, Block))
    block.mixer.tensor = Axis("tensor", size=2, rank=0, group=None)
    assert "several tensor ranks" in compiled.compile_blocks(model.layers)
    block.mixer.tensor = Axis.single("tensor")
    block.mixer.wo.weight_grads = WeightGrads()
    assert "zero-bubble" in compiled.compile_blocks(model.layers)
    assert "no blocks" in compiled.compile_blocks([torch.nn.Linear(2, 2)])
    assert block.compiled is None


def test_a_missing_compiler_is_said_at_the_start(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match=r"g\+\+ nor clang.*internlm_ds.compile=False"):
        compiled.require_compiler("cpu")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiled.importlib, "util", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(MachineError, match="triton"):
        compiled.require_compiler("cuda")
    compiled.require_compiler("cpu")
