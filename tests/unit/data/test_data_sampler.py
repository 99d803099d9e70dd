"""Order of batches: shares of ranks, epochs, ramp-up, and resumes that equal the uninterrupted run."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from internlm_ds.data.sampler import BatchSkipper, DataParallelSampler, StaticBatchSampler
from internlm_ds.errors import CheckpointError, ConfigError, DataFormatError

rampups = st.sampled_from(["", "1 1 2", "2 2 1", "1 2 3", "2 1 1"])


def _make(num_packs: int, batch_size: int, rampup: str, **kwargs: int) -> StaticBatchSampler:
    try:
        return StaticBatchSampler(num_packs, batch_size=batch_size, rampup=rampup, **kwargs)
    except DataFormatError:
        assume(False)
        raise


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 60), st.integers(1, 6), rampups, st.integers(1, 3), st.integers(0, 40))
def test_resume_at_any_batch_equals_straight_run(
    num_packs: int, batch_size: int, rampup: str, data_size: int, cut: int
) -> None:
    assume(num_packs >= batch_size * data_size)
    for rank in range(data_size):
        kwargs = {"data_rank": rank, "data_size": data_size}
        straight = _make(num_packs, batch_size, rampup, **kwargs)
        for _ in range(cut):
            straight.next_batch()
        state = json.loads(json.dumps(straight.state_dict()))
        resumed = _make(num_packs, batch_size, rampup, **kwargs)
        resumed.load_state_dict(state)
        for _ in range(20):
            assert resumed.next_batch() == straight.next_batch()
            assert resumed.state_dict() == straight.state_dict()


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 60), st.integers(1, 6), rampups, st.integers(1, 3))
def test_an_epoch_shows_no_pack_twice_and_drops_less_than_a_step(
    num_packs: int, batch_size: int, rampup: str, data_size: int
) -> None:
    assume(num_packs >= batch_size * data_size)
    samplers = [_make(num_packs, batch_size, rampup, data_rank=r, data_size=data_size) for r in range(data_size)]
    for _ in range(3):
        batches = [list(sampler) for sampler in samplers]
        assert len({tuple(map(len, of_rank)) for of_rank in batches}) == 1, "ranks take different numbers of packs"
        seen = [number for of_rank in batches for batch in of_rank for number in batch]
        assert len(seen) == len(set(seen))
        assert num_packs - len(seen) < batch_size * data_size


@settings(max_examples=40, deadline=None)
@given(st.integers(12, 60), st.integers(1, 4), st.integers(0, 12))
def test_more_ranks_go_on_at_the_same_place(num_packs: int, batch_size: int, cut: int) -> None:
    """2 ranks to 1 and back: together they take the same packs, as long as the epoch lasts."""
    two = [_make(num_packs, batch_size, "", data_rank=rank, data_size=2) for rank in range(2)]
    for sampler in two:
        for _ in range(cut):
            sampler.next_batch()
    one = _make(num_packs, 2 * batch_size, "", data_rank=0, data_size=1)
    one.load_state_dict(two[0].state_dict())
    for _ in range(10):
        left, right = (sampler.next_batch() for sampler in two)
        assert one.next_batch() == [number for pair in zip(left, right) for number in pair]


@given(st.integers(30, 60), st.sampled_from(["", "1 1 2"]), st.integers(0, 9), st.data())
def test_any_number_of_ranks_goes_on_behind_the_last_pack(num_packs: int, rampup: str, cut: int, data) -> None:
    """The order of the epoch goes on where it was, in whole batches, and a second resume changes nothing."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(3, 4)), min_size=2, max_size=3))
    taken: list[int] = []
    state = None
    for data_size, batch_size in sizes:
        ranks = [_make(num_packs, batch_size, rampup, data_rank=r, data_size=data_size) for r in range(data_size)]
        for sampler in ranks:
            if state is not None:
                sampler.load_state_dict(state)
        order = ranks[0]._order.tolist()
        for _ in range(cut):
            batches = [sampler.next_batch() for sampler in ranks]
            assert len({len(batch) for batch in batches}) == 1
            if ranks[0].epoch > 0:
                return  # the next epoch is a matter of the sizes it began with
            again = _make(num_packs, batch_size, rampup, data_rank=0, data_size=data_size)
            again.load_state_dict(ranks[0].state_dict())
            assert list(again) == list(copy.deepcopy(ranks[0]))
            assert rampup or len(batches[0]) == batch_size
            taken += [number for group in zip(*batches) for number in group]
        assert taken == order[: len(taken)]
        state = ranks[0].state_dict()


def test_rampup_grows_by_batches_of_all_epochs() -> None:
    sampler = StaticBatchSampler(20, batch_size=4, rampup="1 1 2")
    sizes = [len(sampler.next_batch()) for _ in range(10)]
    assert sizes[:8] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len(sampler) == 5


def test_states_are_small() -> None:
    sampler = StaticBatchSampler(1000, batch_size=4)
    assert len(json.dumps(sampler.state_dict())) < 400
    for _ in range(300):
        sampler.next_batch()
    assert sampler.epoch and len(json.dumps(sampler.state_dict())) < 4000


def test_later_epochs_are_resumed_without_the_shuffles_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = StaticBatchSampler(20, batch_size=3)
    for _ in range(50):
        straight.next_batch()
    state = json.loads(json.dumps(straight.state_dict()))
    without = {key: value for key, value in state.items() if key != "generator"}  # as older checkpoints have it
    wanted = [straight.next_batch() for _ in range(30)]
    for each in (without, state):
        resumed = StaticBatchSampler(20, batch_size=3)
        if each is state:
            monkeypatch.setattr(resumed, "_rewind_orders", lambda: pytest.fail("shuffled all epochs"))
        resumed.load_state_dict(each)
        assert [resumed.next_batch() for _ in range(30)] == wanted
    other = StaticBatchSampler(21, batch_size=3)  # other data: another order, whatever the state says
    other.load_state_dict(state)
    begun = StaticBatchSampler(21, batch_size=3)
    begun.load_state_dict(without)
    assert other.next_batch() == begun.next_batch()


def test_too_little_data_is_an_error_that_says_what_is_needed() -> None:
    with pytest.raises(DataFormatError, match=r"holds 3 packs .* data-parallel ranks = 4; use more data, or lower"):
        StaticBatchSampler(3, batch_size=2, data_size=2)
    with pytest.raises(DataFormatError, match=r"holds 5 packs .* the ramp-up '2 2 2' on 2 .* takes 24"):
        StaticBatchSampler(5, batch_size=6, rampup="2 2 2", data_size=2)


def test_states_of_another_run_are_refused() -> None:
    state = StaticBatchSampler(20, batch_size=2).state_dict()
    with pytest.raises(CheckpointError, match=r"data\.seed = 1024, this run has 7"):
        StaticBatchSampler(20, batch_size=2, seed=7).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"data\.rampup_batch_size = '', this run has '1 1 1'"):
        StaticBatchSampler(20, batch_size=2, rampup="1 1 1").load_state_dict(state)


def test_skip_batches_that_cannot_be_read() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.skip_batches = '10-5': a range runs from low to high; write \"5-10\""
    ):
        BatchSkipper("10-5")
    with pytest.raises(ConfigError, match=r"'x' is no batch index"):
        BatchSkipper("3,x")
    assert not BatchSkipper(None)(0)


def test_shares_of_a_small_set() -> None:
    assert list(DataParallelSampler(1, data_rank=2, data_size=3, drop_last=False)) == [0]
    assert list(DataParallelSampler(1, data_rank=0, data_size=3, drop_last=True)) == []
    with pytest.raises(IndexError, match="sample 5 of 3"):
        DataParallelSampler(7, data_rank=0, data_size=2, drop_last=True)[5]
