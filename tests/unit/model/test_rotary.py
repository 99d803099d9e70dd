"""Rotary angles, pairing, restart in every segment, dynamic NTK."""

import math

import pytest
import torch

from internlm_ds.attention.segments import Segments
from internlm_ds.model.rotary import Rotary, rotate


def segments(*borders):
    return Segments(torch.tensor(borders, dtype=torch.int32))


def test_pairs_are_half_a_head_apart():
    """Token 3, pair j = 1 of a head of 8: angle 3 · 10000^(-2/8)."""
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    out = rotate(x, Rotary(8).tables_of(segments(0, 4), torch.float64))
    angle = 3 * 10000 ** (-2 / 8)
    a, b = x[3, 1, 1], x[3, 1, 5]
    assert out[3, 1, 1].item() == pytest.approx((a * math.cos(angle) - b * math.sin(angle)).item(), abs=1e-6)
    assert out[3, 1, 5].item() == pytest.approx((a * math.sin(angle) + b * math.cos(angle)).item(), abs=1e-6)
    torch.testing.assert_close(out[0], x[0])


def test_positions_restart():
    cos, sin = Rotary(8).tables_of(segments(0, 3, 5), torch.float32)
    assert torch.equal(cos[3:], cos[:2]) and torch.equal(sin[3:], sin[:2])


def test_tables_are_made_once_for_all_layers():
    shared = segments(0, 3)
    assert Rotary(8).tables_of(shared, torch.float32)[0] is Rotary(8).tables_of(shared, torch.float32)[0]
    assert Rotary(8).tables_of(shared, torch.float32)[0] is not Rotary(8, base=5e5).tables_of(shared, torch.float32)[0]


def test_half_activations_are_rotated_in_fp32_with_rounded_tables():
    x = torch.randn(6, 2, 8).bfloat16()
    tables = Rotary(8).tables_of(segments(0, 6), torch.bfloat16)
    assert tables[0].dtype == torch.bfloat16
    out = rotate(x, tables)
    wide = rotate(x.float(), (tables[0].float(), tables[1].float()))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.bfloat16())


def test_far_positions_keep_their_angles():
    """Angles are fp32 whatever the activations: 60000 and 60001 differ in bf16 tables."""
    cos, _ = Rotary(8).tables(torch.tensor([60000, 60001]), 60002, torch.bfloat16)
    assert cos[0, 0] != cos[1, 0]


@pytest.mark.parametrize(("longest", "expected"), [(2048, 10000.0), (2049, 10000 * (2049 / 2048) ** (128 / 126))])
def test_dynamic_ntk_base(longest, expected):
    rotary = Rotary(128, max_position_embeddings=2048, dynamic_ntk=True)
    assert rotary.base_for(longest) == pytest.approx(expected)
    assert Rotary(128, max_position_embeddings=2048).base_for(longest) == 10000.0


def test_dynamic_ntk_looks_at_the_longest_segment_not_at_the_row():
    rotary = Rotary(8, max_position_embeddings=4, dynamic_ntk=True)
    short, plain = segments(0, 4, 8), Rotary(8)
    assert torch.equal(rotary.tables_of(short, torch.float32)[0], plain.tables_of(segments(0, 4, 8), torch.float32)[0])
    long = rotary.tables_of(segments(0, 2, 8), torch.float32)[0]
    assert not torch.equal(long, plain.tables_of(segments(0, 2, 8), torch.float32)[0])
