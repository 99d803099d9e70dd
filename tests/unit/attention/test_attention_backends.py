"""Every backend equals the slow oracle, outputs and gradients, whatever the segments are.

flash-attn and torch's varlen attention are held against it on a device, in tests/gpu.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.attention import reference, sdpa
from internlm_ds.attention.segments import Segments

BORDERS = {
    "equal": [0, 4, 8, 12],
    "unequal": [0, 1, 6, 12],
    "one": [0, 12],
    "single tokens": list(range(13)),
    "one long, many short": [0, 1, 2, 40, 41, 43, 44],
}
FUNCTIONS = {"sdpa": sdpa.attend, "one by one": sdpa.one_by_one, "in batches": sdpa.in_batches}


def segments_of(borders):
    return Segments(torch.tensor(borders, dtype=torch.int32))


def tensors(kv_heads, dtype=torch.float64, tokens=12):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, 4, 8), (tokens, kv_heads, 8), (tokens, kv_heads, 8)]
    # values that every dtype holds, so that all start from the same
    return [
        torch.randn(shape, generator=generator).bfloat16().half().bfloat16().to(dtype).requires_grad_()
        for shape in shapes
    ]


def plain(q, k, v, segments, *, dropout=0.0):
    """The formula in the dtype of its arguments, as a user of torch would write it."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~reference.visible(segments, q.device), float("-inf")).softmax(dim=-1)
    return torch.einsum("nqk,knd->qnd", weights, v)


def results(attend, borders, kv_heads, dtype):
    """Output and three gradients, in fp64."""
    qkv = tensors(kv_heads, dtype, borders[-1])
    out = attend(*qkv, segments_of(borders))
    assert out.dtype == dtype
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights.to(dtype)).sum().backward()
    return [x.detach().double() for x in (out, *(x.grad for x in qkv))]


def test_oracle_by_hand():
    """The third token of a segment that starts at 1 weighs tokens 1, 2 and 3."""
    q, k, v = tensors(4)
    out = reference.attend(q, k, v, segments_of([0, 1, 12]))
    weights = torch.stack([q[3, 2] @ k[t, 2] / math.sqrt(8) for t in (1, 2, 3)]).softmax(0)
    assert torch.allclose(out[3, 2], sum(w * v[t, 2] for w, t in zip(weights, (1, 2, 3))))
    assert torch.allclose(out[0], v[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", BORDERS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_oracle(function, name, kv_heads, dtype, tolerance):
    expected = results(reference.attend, BORDERS[name], kv_heads, torch.float64)
    for a, b in zip(expected, results(FUNCTIONS[function], BORDERS[name], kv_heads, dtype)):
        assert (a - b).abs().max() <= tolerance * max(1.0, a.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", BORDERS)
@pytest.mark.parametrize("function", [*FUNCTIONS, "reference"])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(function, name, kv_heads, dtype):
    borders = BORDERS[name]
    exact = results(reference.attend, borders, kv_heads, torch.float64)
    usual = results(plain, borders, kv_heads, dtype)
    found = results({**FUNCTIONS, "reference": reference.attend}[function], borders, kv_heads, dtype)
    for a, b, c in zip(exact, usual, found):
        # where plain torch is exact (gradients of segments of one token: zero), a rounding of a rounding is no error
        assert (c - a).norm() <= 2 * (b - a).norm() + torch.finfo(dtype).eps ** 2


@settings(max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
def test_any_segments(lengths, kv_heads):
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    expected = results(reference.attend, borders, kv_heads, torch.float64)
    for attend in FUNCTIONS.values():
        for a, b in zip(expected, results(attend, borders, kv_heads, torch.float64)):
            torch.testing.assert_close(b, a, atol=1e-12, rtol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tensors_that_are_parts_of_others(function):
    """As projections leave them: queries, keys and values side by side in one row."""
    whole = torch.randn(12, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = FUNCTIONS[function](*whole.unbind(1), segments_of(BORDERS["unequal"]))
    expected = reference.attend(*(x.contiguous() for x in whole.unbind(1)), segments_of(BORDERS["unequal"]))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_short_segments_go_in_batches(monkeypatch):
    """With as few calls as segments have sizes, up to a factor of two; longer ones go one by one."""
    calls = []
    attention = sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa,
        "scaled_dot_product_attention",
        lambda q, *more, **how: calls.append(q.shape) or attention(q, *more, **how),
    )
    sdpa.attend(*tensors(4, tokens=44), segments_of(BORDERS["one long, many short"]))
    assert [(shape[0], shape[2]) for shape in calls] == [(1, 38), (1, 2), (4, 1)]
    calls.clear()
    sdpa.attend(*tensors(4, tokens=100), segments_of([0, 20, 51, 100]))
    assert [(shape[0], shape[2]) for shape in calls] == [(1, 20), (1, 31), (1, 49)]


def test_segments_do_not_see_each_other():
    q, k, v = tensors(4)
    borders = BORDERS["unequal"]
    whole = sdpa.attend(q, k, v, segments_of(borders))
    for start, stop in pairwise(borders):
        alone = sdpa.attend(q[start:stop], k[start:stop], v[start:stop], Segments.single(stop - start))
        torch.testing.assert_close(whole[start:stop], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("new", [1, 3, 12])
def test_extend_equals_the_whole_sequence(new):
    q, k, v = tensors(2)
    whole = reference.attend(q, k, v, Segments.single(12))
    torch.testing.assert_close(sdpa.extend(q[-new:], k, v), whole[-new:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("attend", [reference.attend, *FUNCTIONS.values()])
def test_attention_dropout_drops(attend):
    qkv = tensors(4)
    segments = segments_of(BORDERS["one"])
    assert not torch.equal(attend(*qkv, segments, dropout=0.5), attend(*qkv, segments))
    assert torch.equal(attend(*qkv, segments, dropout=0.0), attend(*qkv, segments))
