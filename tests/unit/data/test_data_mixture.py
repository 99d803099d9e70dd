"""Weighted sources: shares kept everywhere, every pack once a pass, the same stream however it is cut or resumed."""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.config.schema import DataConfig
from internlm_ds.data import binmeta, record
from internlm_ds.data.loader import FlatSampler
from internlm_ds.data.mixture import BLOCK, Mixture, Source
from internlm_ds.data.sampler import StaticBatchSampler
from internlm_ds.data.trainset import open_sampler, open_train_set
from internlm_ds.data.weighted import WeightedSampler, facts_of, sources_of
from internlm_ds.errors import CheckpointError, ConfigError
from internlm_ds.layout.batch import BatchPlan

sizes_and_weights = st.lists(st.tuples(st.integers(1, 40), st.floats(0.001, 5)), min_size=1, max_size=5)


def make_mixture(given: list[tuple[int, float]], *, seed: int = 1024, **others: Any) -> Mixture:
    ends = np.cumsum([size for size, _ in given])
    sources = [
        Source(f"s{place}", weight, np.arange(end - size, end))
        for place, ((size, weight), end) in enumerate(zip(given, ends))
    ]
    return Mixture(sources, seed=seed, **others)


def oracle(mixture: Mixture, count: int) -> list[int]:
    """The stream place by place, in whole numbers: what the docstring of `mixture` says, and nothing faster."""
    unit = 2**32
    offset = int(np.random.RandomState(mixture.seed).randint(0, unit, dtype=np.uint64))
    ends = [int(edge) for edge in mixture.edges]
    order: list[int] = []
    for block in range(-(-count // BLOCK)):
        keys = np.random.RandomState([mixture.seed, 0, block // 256]).random_sample((256, BLOCK))[block % 256]
        moved = (offset + block * 2654435769) % unit
        points = [point * unit + moved for point in range(BLOCK)]
        sources = [next(place for place, end in enumerate(ends) if point < end) for point in points]
        order += [sources[place] for place in np.argsort(keys, kind="stable")]
    drawn, stream, passes = dict(mixture.drawn_before), [], {}
    for place in order[:count]:
        source = mixture.sources[place]
        number, at = divmod(drawn[source.name], len(source.numbers))
        if (place, number) not in passes:
            rng = np.random.RandomState([mixture.seed, 1, zlib.crc32(source.name.encode()), number])
            passes[place, number] = rng.permutation(len(source.numbers))
        stream.append(int(source.numbers[passes[place, number][at]]))
        drawn[source.name] += 1
    return stream


@settings(max_examples=15, deadline=None)
@given(sizes_and_weights, st.integers(0, 2**32 - 1), st.integers(0, 700), st.integers(0, 300))
def test_stream_equals_oracle(given: list[tuple[int, float]], seed: int, start: int, count: int) -> None:
    mixture = make_mixture(given, seed=seed, drawn_before={"s0": 7})
    wanted = oracle(mixture, start + count)
    assert mixture.numbers(start, count).tolist() == wanted[start:]
    owners = np.searchsorted(np.cumsum([size for size, _ in given]), wanted[:start], side="right")
    seen = Counter(f"s{owner}" for owner in owners) + Counter({"s0": 7})
    assert mixture.drawn(start) == {source.name: seen[source.name] for source in mixture.sources}


def test_stream_goes_on_over_the_shuffled_groups() -> None:
    mixture = make_mixture([(1000, 0.4), (300, 0.6)])
    assert mixture.numbers(256 * BLOCK - 100, 200).tolist() == oracle(mixture, 256 * BLOCK + 100)[-200:]
    whole = mixture.numbers(0, 600 * BLOCK)
    assert mixture.numbers(255 * BLOCK + 3, 300 * BLOCK).tolist() == whole[255 * BLOCK + 3 :][: 300 * BLOCK].tolist()


def test_shares_are_exact_in_expectation() -> None:
    """Over all offsets a block gives each source exactly its share; over seeds every place does, within chance."""
    mixture = make_mixture([(5, 0.3), (5, 0.001), (5, 0.699)])
    wanted = np.diff(mixture.edges, prepend=0) / 2**32
    assert wanted == pytest.approx([0.3 * BLOCK, 0.001 * BLOCK, 0.699 * BLOCK], abs=1e-8)
    spread = np.arange(0, 1 << 32, 1 << 16)
    found = np.zeros(3)
    for offset in spread[:: len(spread) // 4096]:
        mixture._offset = int(offset)
        found += mixture._block_counts(0, 1)[0]
    assert found / 4096 == pytest.approx(wanted, abs=3 / 4096)

    orders = np.stack([make_mixture([(5, 1), (5, 3)], seed=seed).source_order(0, 32) for seed in range(600)])
    assert np.abs((orders == 0).mean(axis=0) - 0.25).max() < 0.08  # 4.5 standard deviations


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1, 1], [0.97, 0.02, 0.009, 0.001], [1e-6, 1]])
def test_long_runs_stay_within_a_few_packs_of_the_shares(weights: list[float]) -> None:
    mixture = make_mixture([(50, weight) for weight in weights])
    for place in (64, 1000, 12_345, 10_000_000):
        drawn = np.array(list(mixture.drawn(place).values()))
        assert drawn.sum() == place
        assert np.abs(drawn - place * np.array(weights) / sum(weights)).max() < 9


@settings(max_examples=20, deadline=None)
@given(sizes_and_weights, st.integers(1, 900))
def test_each_source_shows_every_pack_once_a_pass(given: list[tuple[int, float]], count: int) -> None:
    mixture = make_mixture(given)
    stream = mixture.numbers(0, count)
    for source in mixture.sources:
        mine = stream[np.isin(stream, source.numbers)]
        for start in range(0, len(mine), len(source.numbers)):
            one_pass = mine[start : start + len(source.numbers)].tolist()
            assert len(set(one_pass)) == len(one_pass)


def make_sampler(
    weights: list[float], *, batch_size: int = 3, rank: int = 0, size: int = 1, **others: Any
) -> WeightedSampler:
    mixture = make_mixture([(20, weight) for weight in weights])
    return WeightedSampler(mixture, 20 * len(weights), batch_size=batch_size, data_rank=rank, data_size=size, **others)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["", "1 1 2"]), st.integers(1, 3), st.integers(0, 30))
def test_batches_run_through_the_stream_without_a_gap(rampup: str, size: int, cut: int) -> None:
    samplers = [make_sampler([0.7, 0.3], rank=rank, size=size, rampup=rampup) for rank in range(size)]
    stream: list[int] = []
    for index in range(50):
        if index == cut:
            state = json.loads(json.dumps(samplers[0].state_dict()))
            samplers = [make_sampler([0.7, 0.3], rank=rank, size=size, rampup=rampup) for rank in range(size)]
            for sampler in samplers:
                sampler.load_state_dict(state)
        stream += np.array([sampler.next_batch() for sampler in samplers]).T.ravel().tolist()
    assert stream == make_mixture([(20, 0.7), (20, 0.3)]).numbers(0, len(stream)).tolist()


@pytest.mark.parametrize("after", [(1, 3), (2, 3), (4, 1), (3, 5), (2, 2)])
@pytest.mark.parametrize("cut", [1, 6, 9])
def test_other_ranks_and_sizes_go_on_in_the_same_stream(after: tuple[int, int], cut: int) -> None:
    first = [make_sampler([0.7, 0.3], rank=rank, size=2) for rank in range(2)]
    stream = []
    for _ in range(cut):
        stream += np.array([sampler.next_batch() for sampler in first]).T.ravel().tolist()
    size, batch_size = after
    second = [make_sampler([0.7, 0.3], rank=rank, size=size, batch_size=batch_size) for rank in range(size)]
    for sampler in second:
        sampler.load_state_dict(first[0].state_dict())
    for _ in range(30):
        stream += np.array([sampler.next_batch() for sampler in second]).T.ravel().tolist()
    assert stream == make_mixture([(20, 0.7), (20, 0.3)]).numbers(0, len(stream)).tolist()


def test_with_other_weights_every_source_goes_on_where_it_stands(caplog: pytest.LogCaptureFixture) -> None:
    first, seen = make_sampler([0.9, 0.1]), []
    for _ in range(15):
        seen += first.next_batch()
    second = make_sampler([0.2, 0.8], batch_size=4)
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(first.state_dict())
    assert "the weights of the data have changed: {'s0': 0.9, 's1': 0.1} at the checkpoint" in caplog.text
    assert (second.batch_count, second.epoch) == (15, first.epoch + 1)
    for _ in range(20):
        seen += second.next_batch()
    for source in second.mixture.sources:
        mine = [number for number in seen if number in source.numbers]
        for start in range(0, len(mine), 20):
            assert len(set(mine[start : start + 20])) == len(mine[start : start + 20])
    counts = Counter(number < 20 for number in seen[45:])
    assert counts[True] == pytest.approx(0.2 * 80, abs=3)
    third = make_sampler([0.2, 0.8], batch_size=4)
    third.load_state_dict(second.state_dict())
    assert [third.next_batch() for _ in range(30)] == [second.next_batch() for _ in range(30)]


def test_other_loaders_get_the_same_order() -> None:
    flat, straight = FlatSampler(make_sampler([0.7, 0.3])), make_sampler([0.7, 0.3])
    wanted = [number for _ in range(40) for number in straight.next_batch()]
    assert [*flat, *flat, *flat][:100] == wanted[:100]
    flat.seek(75)
    assert [*flat, *flat][:30] == wanted[75:105]


def test_states_of_the_other_kind_are_refused() -> None:
    plain, weighted = StaticBatchSampler(40, batch_size=3), make_sampler([1, 1])
    with pytest.raises(CheckpointError, match=r"made without internlm_ds\.data_weights"):
        weighted.load_state_dict(plain.state_dict())
    with pytest.raises(CheckpointError, match=r"made with data_weights = \{'s0': 1, 's1': 1\}, this run has none"):
        plain.load_state_dict(weighted.state_dict())
    later = weighted.state_dict()
    later["mixture"]["version"] = 2
    with pytest.raises(CheckpointError, match="version 2"):
        weighted.load_state_dict(later)
    with pytest.raises(CheckpointError, match=r"data\.seed = 1024, this run has 5"):
        make_sampler([1, 1], seed=5).load_state_dict(make_sampler([1, 1]).state_dict())


NAMES = ["cn/a.bin", "cn/b.bin", "code/x.bin", "en/books/1.bin", "en/books/2.bin", "en/web.bin"]


def test_the_longest_key_that_covers_a_file_counts() -> None:
    weights = {"cn": 0.5, "code": 0, "en": 0.3, "en/books": 0.1, "en/books/2.bin": 0.1}
    sources = sources_of(weights, NAMES, [2, 1, 5, 2, 2, 3])
    assert {source.name: source.numbers.tolist() for source in sources} == {
        "cn": [0, 1, 2],
        "en": [12, 13, 14],
        "en/books": [8, 9],
        "en/books/2.bin": [10, 11],
    }


def test_all_that_is_wrong_with_weights_is_said_together() -> None:
    weights = {"cn": 1, "en/boks": 1, "music": 2, "en/books": 1, "en/books/1.bin": 1, "en/books/2.bin": 1}
    with pytest.raises(ConfigError) as caught:
        sources_of(weights, NAMES, [2, 1, 5, 0, 2, 3])
    assert [str(problem) for problem in caught.value.problems] == [
        "internlm_ds.data_weights['en/boks'] = 1: names no type, folder or file with data below data.train_folder; "
        "did you mean 'en/books'?",
        "internlm_ds.data_weights['music'] = 2: names no type, folder or file with data below data.train_folder; "
        "the types are cn, code, en",
        "internlm_ds.data_weights['en/books'] = 1: every file below it has a longer key of its own; remove it",
        "internlm_ds.data_weights: gives no weight to 1 file(s) of type 'code'; add 'code': 0 to leave them out",
        "internlm_ds.data_weights: gives no weight to 1 file(s) of type 'en'; add 'en': 0 to leave them out",
        "internlm_ds.data_weights['en/books/1.bin'] = 1: its files do not fill one pack (micro_bsz x seq_len tokens of "
        "one file); write 0, or add data",
    ]


def test_facts_of_a_run() -> None:
    batch = BatchPlan(1, 1, 4, data=2)
    one, two = facts_of(make_mixture([(100, 3), (10, 1)]), batch=batch, steps=100)
    assert (one.name, one.asked, one.packs, two.asked, two.packs) == ("s0", 0.75, 100, 0.25, 10)
    assert (one.given, two.given) == (pytest.approx(0.75, abs=0.006), pytest.approx(0.25, abs=0.006))
    assert (one.passes, two.passes) == (pytest.approx(6, abs=0.06), pytest.approx(20, abs=0.6))
    assert str(two).startswith("s1: 25 % asked, ")


def test_a_run_with_weights_is_told_from_its_notes(tmp_path: Path) -> None:
    for name, start in (("cn/x", 1), ("en/x", 1001)):
        with binmeta.Writer(tmp_path / f"data/{name}.bin") as writer:
            for number in range(30):
                writer.write(list(range(start + 10 * number, start + 10 * number + 10)))
    data = DataConfig(train_folder=str(tmp_path / "data"), seq_len=8, micro_bsz=1, micro_num=2)
    found = open_train_set(data, vocab_size=5000, log=False)
    weights = {"cn": 0.25, "en": 0.75}
    samplers = [
        open_sampler(data, found.packs, found.files, weights=weights, data_rank=rank, data_size=2) for rank in (0, 1)
    ]
    record.note_launch(
        tmp_path,
        data=data,
        weights=weights,
        vocab_size=5000,
        dataset_types=found.dataset_types,
        data_size=2,
        position=samplers[0].state_dict(),
        packs=found.packs,
        files=found.files,
    )
    trace = record.read_launches(tmp_path)[0].trace()
    types = Counter()
    for index in range(100):
        batch = trace.batch(index)
        assert [[pack.number for pack in rank] for rank in batch.ranks] == [s.next_batch() for s in samplers]
        types.update(piece.type_name for packs in batch.ranks for pack in packs for piece in pack.pieces[:1])
    assert types["cn"] == pytest.approx(100, abs=2)
