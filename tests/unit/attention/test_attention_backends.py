"""Every backend equals the slow oracle, outputs and gradients; a cache equals the whole sequence."""

import math
import re
import sys

import pytest
import torch

from internlm_ds.attention import flash, reference, sdpa
from internlm_ds.attention.segments import Segments
from internlm_ds.attention.select import BACKENDS, attention_function, select
from internlm_ds.errors import ConfigError, MissingExtraError

BORDERS = {"equal": [0, 4, 8, 12], "unequal": [0, 1, 6, 12], "one": [0, 12]}


def tensors(kv_heads, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(12, 4, 8), (12, kv_heads, 8), (12, kv_heads, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def segments_of(name):
    return Segments(torch.tensor(BORDERS[name], dtype=torch.int32))


def test_oracle_by_hand():
    """The third token of a segment that starts at 1 weighs tokens 1, 2 and 3."""
    q, k, v = tensors(4)
    out = reference.attend(q, k, v, Segments(torch.tensor([0, 1, 12], dtype=torch.int32)))
    weights = torch.stack([q[3, 2] @ k[t, 2] / math.sqrt(8) for t in (1, 2, 3)]).softmax(0)
    assert torch.allclose(out[3, 2], sum(w * v[t, 2] for w, t in zip(weights, (1, 2, 3))))
    assert torch.allclose(out[0], v[0])


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", BORDERS)
def test_sdpa_equals_oracle(name, kv_heads):
    segments = segments_of(name)
    results = []
    for attend in (reference.attend, sdpa.attend):
        qkv = tensors(kv_heads)
        out = attend(*qkv, segments)
        out.sin().sum().backward()
        results.append([out, *(x.grad for x in qkv)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sdpa_keeps_the_dtype(dtype):
    q, k, v = tensors(4, dtype)
    out = sdpa.attend(q, k, v, segments_of("unequal"))
    assert out.dtype == dtype
    tolerance = 0.02 if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(out, reference.attend(q, k, v, segments_of("unequal")), atol=tolerance, rtol=0)


def test_segments_do_not_see_each_other():
    q, k, v = tensors(4)
    whole = sdpa.attend(q, k, v, segments_of("unequal"))
    for start, stop in zip(BORDERS["unequal"], BORDERS["unequal"][1:]):
        alone = sdpa.attend(q[start:stop], k[start:stop], v[start:stop], Segments.single(stop - start))
        torch.testing.assert_close(whole[start:stop], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("new", [1, 3, 12])
def test_extend_equals_the_whole_sequence(new):
    q, k, v = tensors(2)
    whole = reference.attend(q, k, v, Segments.single(12))
    torch.testing.assert_close(sdpa.extend(q[-new:], k, v), whole[-new:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("attend", [reference.attend, sdpa.attend])
def test_attention_dropout_drops(attend):
    q, k, v = tensors(4)
    assert not torch.equal(attend(q, k, v, segments_of("one"), dropout=0.5), attend(q, k, v, segments_of("one")))


@pytest.mark.parametrize(
    ("wish", "device", "dtype", "head_dim", "installed", "name", "reason"),
    [
        (True, "cuda", torch.bfloat16, 128, True, "flash", ""),
        (False, "cuda", torch.bfloat16, 128, True, "sdpa", "model.use_flash_attn=False"),
        (True, "cpu", torch.bfloat16, 128, True, "sdpa", "needs a CUDA device, this is cpu"),
        (True, "cuda", torch.float32, 128, True, "sdpa", "has no float32"),
        (True, "cuda", torch.float16, 320, True, "sdpa", "heads of up to 256, these have 320"),
        (True, "cuda", torch.float16, 64, False, "sdpa", r"not installed; pip install 'internlm-ds\[flash\]'"),
    ],
)
def test_select(wish, device, dtype, head_dim, installed, name, reason):
    choice = select(wish, device=device, dtype=dtype, head_dim=head_dim, installed=installed)
    assert choice.name == name
    assert choice.attend is BACKENDS[name]
    assert re.search(reason, choice.line)
    assert choice.line.startswith("attention: ") and "\n" not in choice.line


def test_auto_takes_what_the_tensors_allow():
    q, k, v = tensors(4)
    out = attention_function("auto", use_flash_attn=True)(q, k, v, segments_of("equal"))
    torch.testing.assert_close(out, sdpa.attend(q, k, v, segments_of("equal")))


def test_unknown_backend_is_an_error():
    with pytest.raises(ConfigError, match="'xformers' does not exist; there are auto, flash, sdpa, reference"):
        attention_function("xformers", use_flash_attn=True)


def test_flash_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(MissingExtraError, match=r"attention backend 'flash' needs .*internlm-ds\[flash\]"):
        flash.attend(*tensors(4), segments_of("one"))
