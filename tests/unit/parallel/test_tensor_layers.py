"""Layers over a tensor axis of size 1 are the plain layers; what does not divide is refused."""

import pytest
import torch
from torch import nn

from internlm_ds.errors import LayoutError
from internlm_ds.parallel.collectives import share
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.cross_entropy import mean_cross_entropy
from internlm_ds.parallel.embedding import HiddenSplitEmbedding, VocabSplitEmbedding
from internlm_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear, scale_gradient

ONE, TWO = Axis.single("tensor"), Axis("tensor", size=2)


def filled(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_linear(layer, bias):
    module, x = filled(layer(8, 12, tensor=ONE, bias=bias)), torch.randn(5, 8)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))
    assert (module.bias is not None) == bias


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
def test_linear_casts_its_input_to_the_weights_dtype(layer):
    assert filled(layer(8, 12, tensor=ONE, dtype=torch.bfloat16))(torch.randn(5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "name"), [(HiddenSplitEmbedding, "weight"), (VocabSplitEmbedding, "word_embeddings.weight")]
)
def test_embedding_is_an_embedding(layer, name):
    module, tokens = filled(layer(10, 4, tensor=ONE)), torch.tensor([3, 0, 3])
    assert [n for n, _ in module.named_parameters()] == [name]
    torch.testing.assert_close(module(tokens), next(module.parameters())[tokens])


@pytest.mark.parametrize("layer", [HiddenSplitEmbedding, VocabSplitEmbedding])
def test_embedding_gradient_is_scaled_and_its_value_is_not(layer):
    gradients = []
    for scale in (1.0, 0.25):
        module = filled(layer(10, 4, tensor=ONE, grad_scale=scale))
        out = module(torch.tensor([3, 1]))
        torch.testing.assert_close(out, next(module.parameters())[[3, 1]])
        out.sum().backward()
        gradients.append(next(module.parameters()).grad)
    torch.testing.assert_close(gradients[1], gradients[0] * 0.25)


def test_scale_gradient_of_one_is_the_tensor_itself():
    x = torch.randn(3)
    assert scale_gradient(x, 1.0) is x


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ColumnParallelLinear(8, 13, tensor=TWO), "output width = 13"),
        (lambda: RowParallelLinear(9, 12, tensor=TWO), "input width = 9"),
        (lambda: HiddenSplitEmbedding(8, 13, tensor=TWO), "model.hidden_size = 13"),
    ],
)
def test_widths_that_do_not_divide_are_refused(build, message):
    with pytest.raises(LayoutError, match=f"{message} does not divide by parallel.tensor = 2"):
        build()


def test_a_vocabulary_need_not_divide():
    rows = [VocabSplitEmbedding(13, 4, tensor=Axis("tensor", 2, rank)) for rank in (0, 1)]
    assert [len(e.word_embeddings.weight) for e in rows] == [7, 6]
    head = [ColumnParallelLinear(4, 13, tensor=Axis("tensor", 2, rank), uneven=True) for rank in (0, 1)]
    assert [len(layer.weight) for layer in head] == [7, 6]


def test_the_output_bias_is_on_the_first_rank_only():
    assert RowParallelLinear(8, 12, tensor=Axis("tensor", 2, 0)).bias is not None
    assert RowParallelLinear(8, 12, tensor=Axis("tensor", 2, 1)).bias is None


def test_logits_of_another_slice_are_noticed():
    with pytest.raises(AssertionError, match=r"logits \(1, 3\) are not tensor rank 0's slice of a vocabulary of 4"):
        mean_cross_entropy(torch.zeros(1, 3), torch.zeros(1).long(), tensor=TWO, vocab_size=4)


def test_share_must_divide():
    assert share(12, TWO, what="width") == 6
    with pytest.raises(LayoutError, match=r"model.hidden_size = 9 does not divide by parallel.tensor = 2"):
        share(9, TWO, what="model.hidden_size")
