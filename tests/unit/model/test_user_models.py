"""Model types that users register: plain modules, layer entries, and what is refused."""

import pytest
import torch
from torch import nn

from internlm_ds.config.schema import Leaf
from internlm_ds.errors import ConfigError, LayoutError
from internlm_ds.model.layers import LanguageModel, LayerEntry
from internlm_ds.model.registry import build_registered, model_keywords
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear import ColumnParallelLinear
from internlm_ds.registry import MODEL_INITIALIZER

ONE = Axis.single("tensor")
TOKENS, BORDERS = torch.arange(4), torch.tensor([0, 4], dtype=torch.int32)


class Bigram(nn.Module):
    def __init__(self, vocab_size, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size, dtype=dtype)

    def forward(self, tokens, cu_seqlens):
        assert cu_seqlens.dtype == torch.int32
        return self.table(tokens)


class Doubling(nn.Linear):
    def forward(self, carried):
        return super().forward(carried[0].float()[:, None].expand(-1, 3)), carried[1]


@MODEL_INITIALIZER.register_module(module_name="TEST_BIGRAM")
def build_bigram(**keywords):
    return Bigram(**keywords)


@MODEL_INITIALIZER.register_module(module_name="TEST_ENTRIES")
def build_entries(width):
    class Last(nn.Linear):
        def forward(self, carried):
            return super().forward(carried[0])

    first = LayerEntry("first", None, lambda recompute: Doubling(3, width))
    return [first, LayerEntry("last", None, lambda recompute: Last(width, 5, bias=False))]


@MODEL_INITIALIZER.register_module(module_name="TEST_WRONG")
def build_wrong():
    return ["no entry"]


def test_a_plain_module_is_one_entry():
    entries = build_registered("TEST_BIGRAM", {"vocab_size": 6, "dtype": torch.float64}, tensor=ONE, seed=1)
    model = LanguageModel(entries)
    assert [name for name, _ in model.named_logical_parameters()] == ["table.weight"]
    assert model(TOKENS, BORDERS).shape == (4, 6)


def test_a_plain_module_starts_from_the_seed():
    first, second, other = (
        LanguageModel(build_registered("TEST_BIGRAM", {"vocab_size": 6}, tensor=ONE, seed=seed)) for seed in (1, 1, 2)
    )
    weights = [next(m.parameters()) for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("sizes", [{"tensor": Axis("tensor", 2)}, {"tensor": ONE, "pipe_size": 2}])
def test_a_plain_module_is_not_split(sizes):
    with pytest.raises(LayoutError, match=r"'TEST_BIGRAM' is one plain module, which cannot be split .* set both to 1"):
        build_registered("TEST_BIGRAM", {"vocab_size": 6}, seed=1, **sizes)


def test_entries_are_named_by_prefix():
    model = LanguageModel(build_registered("TEST_ENTRIES", {"width": 2}, tensor=ONE, pipe_size=2, seed=1))
    assert [n for n, _ in model.named_logical_parameters()] == ["first.weight", "first.bias", "last.weight"]
    assert model(TOKENS, BORDERS).shape == (4, 5)


@MODEL_INITIALIZER.register_module(module_name="TEST_SPLIT")
def build_split(width, tensor, sequence_parallel=False):
    assert sequence_parallel
    return [LayerEntry("only", None, lambda recompute: ColumnParallelLinear(3, width, tensor=tensor))]


def test_a_builder_with_a_tensor_parameter_gets_the_axis():
    two = Axis("tensor", 2, 1)
    (entry,) = build_registered("TEST_SPLIT", {"width": 4}, tensor=two, sequence_parallel=True, seed=1)
    assert entry.build(False).weight.shape == (2, 3)


def test_a_builder_without_one_is_not_split():
    message = r"'TEST_ENTRIES' cannot be split over parallel.tensor = 2: its builder takes no parameter `tensor`"
    with pytest.raises(LayoutError, match=message):
        build_registered("TEST_ENTRIES", {"width": 2}, tensor=Axis("tensor", 2), seed=1)


def test_wrong_results_and_keywords_are_errors():
    with pytest.raises(ConfigError, match=r"its builder returned a list of str; it must return a list of .*LayerEntry"):
        build_registered("TEST_WRONG", {}, tensor=ONE, seed=1)
    with pytest.raises(ConfigError, match=r"'TEST_ENTRIES': its builder failed on the model dict: .*'depth'"):
        build_registered("TEST_ENTRIES", {"depth": 2}, tensor=ONE, seed=1)


def test_keywords_are_what_the_user_wrote():
    leaves = [
        Leaf("model.vocab_size", 6, "file", 3),
        Leaf("model.dtype", "torch.float16", "override"),
        Leaf("model.num_layers", 48, "default"),
        Leaf("data.seq_len", 5, "file", 4),
    ]
    assert model_keywords(leaves, dtype=torch.float16) == {"vocab_size": 6, "dtype": torch.float16}
    assert model_keywords(leaves[:1], dtype=torch.float16) == {"vocab_size": 6}
