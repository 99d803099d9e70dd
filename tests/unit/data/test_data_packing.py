"""The fast packings against the slow obvious ones, and what no packing may do: show a token twice in an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.data import oracle
from internlm_ds.data.packing import (
    Concatenation,
    FixedSegmentPacker,
    Pack,
    PaddedBatcher,
    SegmentPacker,
    packer_for,
    positions_from,
    segment_borders,
)
from internlm_ds.data.samples import ListedSamples

token = st.integers(-30, 30)
samples_of_file = st.lists(st.lists(token, max_size=25), min_size=1, max_size=30)
shape = st.tuples(st.integers(1, 9), st.integers(1, 4))  # seq_len, micro_bsz


def _equal(found: Pack, wanted: Pack) -> None:
    for name in ("tokens", "labels", "cu_seqlens", "type_ids", "indexes"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
        assert getattr(found, name).dtype == getattr(wanted, name).dtype, name


@settings(max_examples=60, deadline=None)
@given(samples_of_file, shape, st.booleans())
def test_streams_equal_oracle(samples: list[list[int]], sizes: tuple[int, int], fixed: bool) -> None:
    seq_len, micro_bsz = sizes
    length = seq_len * micro_bsz
    packs = (FixedSegmentPacker if fixed else SegmentPacker)(
        ListedSamples(samples, type_id=3), packed_length=length, seq_len=seq_len
    )
    assert len(packs) == sum(map(len, samples)) // length
    for number in range(len(packs)):
        wanted = oracle.pack_stream(samples, number, packed_length=length, seq_len=seq_len, type_id=3, fixed=fixed)
        _equal(packs[number], wanted)


@settings(max_examples=60, deadline=None)
@given(samples_of_file, shape)
def test_rows_equal_oracle(samples: list[list[int]], sizes: tuple[int, int]) -> None:
    seq_len, micro_bsz = sizes
    length = seq_len * micro_bsz
    packs = PaddedBatcher(ListedSamples(samples, type_id=3), packed_length=length, seq_len=seq_len)
    assert len(packs) == sum(map(len, samples)) // length
    for number in range(len(packs)):
        _equal(packs[number], oracle.pack_rows(samples, number, packed_length=length, seq_len=seq_len, type_id=3))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=20), shape, st.sampled_from(["cut", "one", "rows"]))
def test_no_token_twice(lengths: list[int], sizes: tuple[int, int], mode: str) -> None:
    ends = np.cumsum(lengths)
    samples = [list(range(end - length + 1, end + 1)) for end, length in zip(ends, lengths)]  # every token its own id
    packer = packer_for(pack_sample_into_one=mode == "one", use_packed_dataset=mode != "rows")
    packs = packer(ListedSamples(samples), packed_length=sizes[0] * sizes[1], seq_len=sizes[0])
    seen = Counter(int(token) for number in range(len(packs)) for token in packs[number].tokens if token)
    assert not seen or max(seen.values()) == 1
    if mode != "rows":
        assert sum(seen.values()) == len(packs) * sizes[0] * sizes[1]


def test_order_is_the_same_in_every_run() -> None:
    samples = ListedSamples([[number] for number in range(1, 9)])
    order = list(range(1, 9))
    np.random.RandomState(1024).shuffle(order)
    assert SegmentPacker(samples, packed_length=8, seq_len=8)[0].tokens.tolist() == order


def test_concatenation_finds_the_part_and_skips_empty_ones() -> None:
    parts = [
        SegmentPacker(ListedSamples(tokens), packed_length=2, seq_len=2) for tokens in ([[1] * 4], [[2]], [[3] * 3])
    ]
    packs = Concatenation(parts)
    assert [len(part) for part in parts] == [2, 0, 1]
    assert [packs[number].tokens.tolist() for number in range(3)] == [[1, 1], [1, 1], [3, 3]]
    for outside in (-1, 3):
        with pytest.raises(IndexError, match=f"pack {outside} of 3"):
            packs[outside]


def test_switches_name_the_packing() -> None:
    assert packer_for(pack_sample_into_one=False, use_packed_dataset=True) is SegmentPacker
    assert packer_for(pack_sample_into_one=False, use_packed_dataset=False) is PaddedBatcher
    assert packer_for(pack_sample_into_one=True, use_packed_dataset=False) is FixedSegmentPacker


def test_packs_without_any_sample_are_counted() -> None:
    packs = PaddedBatcher(ListedSamples([[1] * 40]), packed_length=4, seq_len=2)
    assert (len(packs), packs.num_empty_packs) == (10, 9)
    assert packs[9].cu_seqlens.tolist() == [0, 4]


def test_borders_and_positions() -> None:
    borders = segment_borders([5, 3, 4], seq_len=4)
    assert borders.tolist() == [0, 4, 5, 8, 12]
    assert positions_from(borders).tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3]
