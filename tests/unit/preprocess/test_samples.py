"""What becomes of a body that is too long, and that everything left out is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.samples import WAYS, Frame, Limit, Tally, exchanges, finished
from internlm_ds.preprocess.segments import Segment, num_ids, num_learned, signed

FRAME = Frame(bos=(1,), eos=(2,))


def samples(body, max_tokens=None, too_long="cut", frame=FRAME):
    tally = Tally()
    made = [signed(sample) for sample in finished(body, frame=frame, limit=Limit(max_tokens, too_long), tally=tally)]
    return made, tally


def ask(*ids):
    return Segment(ids, False)


def say(*ids):
    return Segment(ids, True)


TWO_TURNS = [ask(10, 11), say(20, 21), ask(12), say(22)]


def test_a_body_that_fits_gets_its_frame():
    made, tally = samples(TWO_TURNS)
    assert made == [[1, -10, -11, 20, 21, -12, 22, 2]]
    assert (tally.samples, tally.tokens, tally.learned_tokens) == (1, 8, 4)


def test_cut_keeps_the_beginning_and_does_not_teach_to_stop_there():
    made, tally = samples(TWO_TURNS, 5)
    assert made == [[1, -10, -11, 20, -2]]
    assert (tally.truncated, tally.truncated_tokens) == (1, 3)


def test_cut_as_the_reference_learns_the_eos():
    assert samples(TWO_TURNS, 5, frame=Frame((1,), (2,), reference=True))[0] == [[1, -10, -11, 20, 2]]


def test_drop_leaves_the_sample_out():
    made, tally = samples(TWO_TURNS, 7, "drop")
    assert made == [] and (tally.dropped, tally.dropped_tokens, tally.samples) == (1, 8, 0)


def test_split_goes_between_exchanges():
    made, tally = samples(TWO_TURNS, 7, "split")
    assert made == [[1, -10, -11, 20, 21, 2], [1, -12, 22, 2]]
    assert (tally.split, tally.split_parts, tally.truncated_tokens) == (1, 2, 0)


def test_split_cuts_an_exchange_that_is_too_long_on_its_own():
    made, _ = samples([ask(10), say(20, 21, 22), ask(11), say(23)], 5, "split")
    assert made == [[1, -10, 20, 21, -2], [1, 22, -11, 23, 2]]


def test_nothing_to_learn_is_left_out_and_counted():
    made, tally = samples([ask(10, 11, 12), say(20)], 5)
    assert made == [] and (tally.unlearned, tally.unlearned_tokens, tally.truncated_tokens) == (1, 5, 1)


def test_a_limit_without_room_is_refused():
    with pytest.raises(DataFormatError, match="--max-tokens 2: a sample needs 3 tokens at least"):
        Limit(2)


segment_lists = st.lists(
    st.builds(Segment, st.lists(st.integers(3, 99), min_size=1, max_size=9), st.booleans()), min_size=1, max_size=8
)


@given(segment_lists, st.integers(3, 30), st.sampled_from(WAYS))
def test_every_token_is_in_a_sample_or_in_the_tally(body, max_tokens, too_long):
    made, tally = samples(body, max_tokens, too_long)
    assert all(3 <= len(sample) <= max_tokens or len(sample) < 3 for sample in made)
    parts = tally.samples + tally.unlearned
    whole = num_ids(body) + 2 * (parts or 1)
    assert tally.tokens + tally.truncated_tokens + tally.dropped_tokens + tally.unlearned_tokens == whole
    assert tally.tokens == sum(map(len, made)) and tally.samples == len(made)
    assert tally.learned_tokens == sum(i > 0 for sample in made for i in sample[1:])
    if too_long == "split" and not tally.unlearned:
        assert [i for sample in made for i in sample[1:-1]] == signed(body)


@given(segment_lists)
def test_exchanges_hold_everything_in_order(body):
    found = exchanges(body)
    assert [segment for exchange in found for segment in exchange] == body
    assert all(num_learned(exchange[:1]) == 0 for exchange in found[1:])
