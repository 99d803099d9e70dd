"""Events are dealt to rooms: the nearest range, then the name, then what is around; shares are of everything."""

from __future__ import annotations

import pytest

from internlm_ds.train.profile_table import DATA, IDLE, RANGE, ROOMS, Span, render, shares


def times(spans, **options):
    return {room: us for room, us in shares(spans, **options).items() if us}


def test_nearest_range_wins_over_the_name_and_over_outer_ranges():
    spans = [
        Span("ProfilerStep*", 1),
        Span(RANGE + "optimizer", 2, parent=0),
        Span("aten::mul", 4, parent=1),
        Span(RANGE + "communication", 8, parent=1),
        Span("aten::copy_", 16, parent=3),
        Span(RANGE + DATA, 32, parent=0),
    ]
    assert times(spans) == {"rest": 1, "optimizer": 6, "communication": 24, DATA: 32}


def test_a_product_is_a_product_unless_attention_consists_of_it():
    spans = [
        Span(RANGE + "loss", 1),
        Span("aten::mm", 2, parent=0),
        Span("aten::copy_", 4, parent=1),
        Span(RANGE + "attention", 8),
        Span("aten::bmm", 16, parent=3),
        Span("aten::linear", 32),
    ]
    assert times(spans) == {"loss": 1, "matmul": 2 + 4 + 32, "attention": 24}


def test_a_derivative_belongs_where_its_operation_does():
    spans = [
        Span(RANGE + "norm", 1),
        Span("aten::mul", 2, parent=0, sequence=7),
        Span("autograd::engine::evaluate_function: MulBackward0", 4, sequence=7, backward=True),
        Span("aten::mul", 8, parent=2),
        Span("autograd::engine::evaluate_function: AddBackward0", 16, sequence=9, backward=True),
    ]
    assert times(spans) == {"norm": 15, "rest": 16}


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_rms_norm", "norm"),
        ("aten::log_softmax", "loss"),
        ("aten::_fused_adamw_", "optimizer"),
        ("c10d::allreduce_", "communication"),
        ("aten::silu", "rest"),
    ],
)
def test_names_say_where_there_is_no_range(name: str, room: str):
    assert times([Span(name, 5)]) == {room: 5}


def test_what_a_device_does_not_compute_it_idles():
    assert times([Span("aten::mm", 30)], total_us=100) == {"matmul": 30, IDLE: 70}
    assert times([Span("aten::mm", 130)], total_us=100) == {"matmul": 130}


def test_every_room_is_in_the_table_and_the_shares_are_a_hundred():
    text = render(shares([Span("aten::mm", 3000), Span("x", 1000)]), steps=2)
    lines = text.splitlines()
    assert [line[:24].strip() for line in lines[1:]] == list(ROOMS)
    assert sum(float(line.split()[-1]) for line in lines[1:]) == pytest.approx(100, abs=0.5)
