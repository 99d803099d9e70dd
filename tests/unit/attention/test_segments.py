"""Segments read padded borders, refuse broken ones and are read once per tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.attention.segments import Segments


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_padding_changes_nothing(lengths, padding):
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    segments = Segments(cu(*borders, *[borders[-1]] * padding))
    assert segments.borders == tuple(borders)
    assert segments.cu_seqlens.tolist() == borders
    assert segments.lengths == tuple(lengths)
    assert segments.max_seqlen == max(lengths)
    assert segments.num_tokens == sum(lengths)
    assert segments.positions.tolist() == [i for n in lengths for i in range(n)]
    assert segments.equal_length == (lengths[0] if len(set(lengths)) == 1 else None)


@pytest.mark.parametrize("values", [(), (0,), (0, 0), (1, 4), (0, 3, 2), (0, 2, 2, 4), (0, 4, 4, 3)])
def test_broken_borders_are_refused(values):
    with pytest.raises(ValueError, match="must rise from 0 and end in repetitions"):
        Segments(cu(*values))


def test_of_reads_a_tensor_once_until_it_is_overwritten():
    borders = cu(0, 3, 5)
    first = Segments.of(borders)
    assert Segments.of(borders) is first
    assert first.shared("key", lambda: [1]) is first.shared("key", lambda: [2])
    borders[1] = 2
    assert Segments.of(borders).borders == (0, 2, 5)


def test_of_reads_inference_tensors():
    with torch.inference_mode():
        assert Segments.of(cu(0, 2)).borders == (0, 2)


def test_single():
    assert Segments.single(4).borders == (0, 4)
