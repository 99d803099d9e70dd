"""AdamW with states in bf16: against a plain one in float64, where nothing would move without chance, and resumed."""

from __future__ import annotations

import itertools

import pytest
import torch

from internlm_ds.engine.rounded_adam import MOMENTS, RoundedAdamW
from internlm_ds.engine.rounding import Numbers, Piece, parts, round_into

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
BLOCK = 96
# two parameters of which this rank has the end and the beginning, and 8 elements that fill up
PIECES = [Piece("a", 300, 100, 200, 0), Piece("b@tensor1", 500, 0, 292, 200)]
NUMEL = 500


def adam_of(flat: torch.Tensor, moments: str, *, block: int = BLOCK, pieces=PIECES, **changes) -> RoundedAdamW:
    adam = RoundedAdamW([flat], **{**SETTINGS, **changes}, moments_dtype=getattr(torch, moments), seed=5, block=block)
    adam.pieces = {flat: pieces}
    return adam


def random_of(seed: int, count: int = NUMEL) -> torch.Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    values[492:] = 0
    return values


def plain_update(held: dict[str, torch.Tensor], gradient: torch.Tensor, *, update: int) -> dict[str, torch.Tensor]:
    """Algorithm 2 of Loshchilov and Hutter in float64 on all elements, then each rounded with its own number."""
    lr, (beta1, beta2), eps, decay = SETTINGS.values()
    g, m, v, w = (t.double() for t in (gradient, *(held[kind] for kind in (*MOMENTS, "weights"))))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1 ** (update + 1)), v / (1 - beta2 ** (update + 1))
    w = w - lr * (m_hat / (v_hat.sqrt() + eps) + decay * w)
    exact = {MOMENTS[0]: m.float(), MOMENTS[1]: v.float(), "weights": w.float()}
    stored = {kind: tensor.clone() for kind, tensor in held.items()}
    for piece in PIECES:
        for part in parts(piece, block_numel=BLOCK):
            numbers = Numbers(torch.Generator(), seed=5, name=piece.name, part=part, update=update)
            for kind, target in stored.items():
                place = slice(part.place, part.place + part.count)
                if target.dtype == torch.float32:
                    target[place] = exact[kind][place]
                else:
                    round_into(target[place], exact[kind][place], numbers.draw())
    return stored


@pytest.mark.parametrize(
    ("moments", "weights"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_updates_are_those_of_a_plain_adam(moments: str, weights: str):
    flat = random_of(0).to(getattr(torch, weights))
    adam = adam_of(flat, moments)
    held = {kind: torch.zeros(NUMEL, dtype=getattr(torch, moments)) for kind in MOMENTS} | {"weights": flat.clone()}
    for update in range(4):
        gradient = random_of(update + 1)
        held = plain_update(held, gradient, update=update)
        adam.step(gradients={flat: gradient})
        found = {**adam.state[flat], "weights": flat}
        for kind, expected in held.items():
            assert found[kind].dtype == expected.dtype
            # fp32 and float64 differ in the last digit, which a number at the border turns into another neighbour
            assert (found[kind] == expected).float().mean() > (0.98 if expected.dtype == torch.bfloat16 else 0), kind
            torch.testing.assert_close(
                found[kind], expected, rtol=2**-7 if update else 2e-6, atol=1e-4 if update else 1e-7
            )
            held[kind] = found[kind].clone()
    assert int(adam.state[flat]["step"]) == 4
    assert not flat[492:].any(), "what belongs to no parameter stays"


def test_in_fp32_it_is_torchs_adam():
    flats = [random_of(0), random_of(0)]
    ours, theirs = adam_of(flats[0], "float32"), torch.optim.AdamW([flats[1]], **SETTINGS, fused=True)
    for update in range(5):
        flats[0].grad = flats[1].grad = random_of(update + 1)
        ours.step()
        theirs.step()
    torch.testing.assert_close(flats[0], flats[1], rtol=1e-6, atol=1e-7)


def test_the_second_moment_shrinks_as_it_should_and_would_not_by_rounding_to_the_nearest():
    count, updates = 4096, 300
    flat = torch.zeros(count)
    adam = adam_of(flat, "bfloat16", pieces=[Piece("a", count, 0, count, 0)])
    adam.state[flat].update(adam.new_state(flat))
    adam.state[flat]["exp_avg_sq"].fill_(1.0)
    nearest = torch.ones((), dtype=torch.bfloat16)
    for _ in range(updates):
        adam.step(gradients={flat: torch.zeros(count)})
        nearest = (nearest.float() * 0.999).bfloat16()
    assert nearest == 1
    found, expected = adam.state[flat]["exp_avg_sq"].double(), 0.999**updates
    assert abs(found.mean() - expected) < 4 * found.std() / count**0.5
    assert 0.02 < found.std() / expected < 0.04, "one element's own error"


def test_a_weight_takes_updates_that_are_small_beside_it():
    count = 4096
    flat = torch.ones(count, dtype=torch.bfloat16)
    adam = adam_of(flat, "bfloat16", pieces=[Piece("a", count, 0, count, 0)], lr=1e-4, weight_decay=0)
    for _ in range(50):
        adam.step(gradients={flat: torch.ones(count)})
    # each update is lr: the moments' errors cancel in the mean, up to their own square
    assert float((1 - flat.double()).mean()) == pytest.approx(50 * 1e-4, rel=0.03)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_what_was_stored_goes_on_bit_for_bit(weights: str):
    flats = [random_of(0).to(getattr(torch, weights))]
    adams = [adam_of(flats[0], "bfloat16")]
    for update in range(6):
        if update == 3:
            flats.append(flats[0].clone())
            adams.append(adam_of(flats[1], "bfloat16"))
            adams[1].state[flats[1]] = {kind: tensor.clone() for kind, tensor in adams[0].state[flats[0]].items()}
        for flat, adam in zip(flats, adams, strict=True):
            adam.step(gradients={flat: random_of(update + 1)})
    states = [{**adam.state[flat], "weights": flat} for flat, adam in zip(flats, adams, strict=True)]
    assert all(states[0][kind].equal(states[1][kind]) for kind in states[0])


def test_the_global_random_stream_is_left_alone():
    flat = random_of(0)
    before = torch.get_rng_state()
    adam_of(flat, "bfloat16").step(gradients={flat: random_of(1)})
    assert torch.get_rng_state().equal(before)


def test_two_ranks_hold_what_one_does():
    """Rounding belongs to elements: two halves of a parameter become what the whole does."""
    whole, halves = random_of(0, 500), random_of(0, 500)
    cuts = [(0, 210), (210, 500)]
    one = adam_of(whole, "bfloat16", pieces=[Piece("a", 500, 0, 500, 0)], block=128)
    flats = [halves[a:b].clone() for a, b in cuts]
    two = [
        adam_of(flat, "bfloat16", pieces=[Piece("a", 500, a, b - a, 0)], block=128)
        for flat, (a, b) in zip(flats, cuts, strict=True)
    ]
    for update in range(3):
        gradient = random_of(update + 1, 500)
        one.step(gradients={whole: gradient})
        for adam, flat, (a, b) in zip(two, flats, cuts, strict=True):
            adam.step(gradients={flat: gradient[a:b].clone()})
    joined = {kind: torch.cat([adam.state[f][kind] for adam, f in zip(two, flats, strict=True)]) for kind in MOMENTS}
    for kind, tensor in itertools.chain(joined.items(), [("weights", torch.cat(flats))]):
        expected = whole if kind == "weights" else one.state[whole][kind]
        # vectors of the fused kernel begin elsewhere: a last digit may differ
        assert (tensor == expected).float().mean() > 0.98, kind
