"""Rounding to bf16 at random: to a neighbour, right on average, with numbers that belong to elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.engine.rounding import CUT, Numbers, Part, Piece, parts, round_into


def rounded(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_into(target, values, numbers.clone())
    return target.float()


def numbers_of(part: Part, *, name: str = "w", update: int = 0, seed: int = 3) -> torch.Tensor:
    return Numbers(torch.Generator(), seed=seed, name=name, part=part, update=update).draw()


def draws(count: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, CUT, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


VALUES = torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 64)


def test_a_value_goes_to_one_of_its_two_neighbours():
    towards_0, away = (
        rounded(VALUES, torch.zeros(64, dtype=torch.int32)),
        rounded(VALUES, torch.full((64,), CUT - 1).int()),
    )
    assert (towards_0.abs() < VALUES.abs()).all() and (away.abs() > VALUES.abs()).all()
    assert (away.to(torch.bfloat16).view(torch.int16) - towards_0.to(torch.bfloat16).view(torch.int16) == 1).all()
    for seed in range(8):
        found = rounded(VALUES, draws(64, seed=seed))
        assert ((found == towards_0) | (found == away)).all()


def test_what_bf16_holds_stays():
    held = torch.cat([VALUES.bfloat16().float(), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    for number in (0, 1, CUT - 1):
        assert rounded(held, torch.full(held.shape, number, dtype=torch.int32)).equal(held)
    assert rounded(torch.tensor([float("nan")]), draws(1)).isnan().all()


def test_the_mean_of_many_draws_is_the_value():
    """The mean error of each value, in standard errors: as errors around 0 are, and 0 over all of them."""
    count = 2**14
    up, down = (
        rounded(VALUES, torch.full((64,), CUT - 1).int()).double(),
        rounded(VALUES, torch.zeros(64).int()).double(),
    )
    share = (VALUES.double() - down) / (up - down)
    deviation = (up - down).abs() * (share * (1 - share)).sqrt()
    spread = VALUES.repeat_interleave(count)
    mean = rounded(spread, draws(64 * count)).double().view(64, count).mean(1)
    in_errors = (mean - VALUES.double()) / (deviation / count**0.5)
    assert in_errors.abs().max() < 4
    assert in_errors.mean().abs() < 3 / 64**0.5


@given(numel=st.integers(1, 60), block=st.integers(1, 20), cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_numbers_do_not_depend_on_who_holds_an_element(numel: int, block: int, cuts: tuple[int, int]):
    start, stop = sorted(min(cut, numel) for cut in cuts)
    whole = torch.cat([numbers_of(part) for part in parts(Piece("w", numel, 0, numel, 0), block_numel=block)])
    held = list(parts(Piece("w", numel, start, stop - start, 7), block_numel=block))
    found = torch.cat([torch.empty(0, dtype=torch.int32), *(numbers_of(part) for part in held)])
    assert found.equal(whole[start:stop])
    assert [part.place for part in held] == [
        7 + p.place for p in parts(Piece("w", numel, start, stop - start, 0), block_numel=block)
    ]
    assert sum(part.count for part in held) == stop - start and all(part.count for part in held)


@pytest.mark.parametrize(
    "other", [{"name": "w@tensor1"}, {"update": 1}, {"seed": 4}, {"part": Part(1, 64, 0, 64, 0)}], ids=str
)
def test_other_parameters_blocks_updates_and_seeds_draw_other_numbers(other):
    one = {"part": Part(0, 64, 0, 64, 0)}
    assert numbers_of(**one).equal(numbers_of(**one))
    same = (numbers_of(**one) == numbers_of(**{**one, **other})).sum()
    assert same < 4, "64 numbers below 65536 that agree by chance"
