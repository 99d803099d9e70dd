"""Over an epoch every kept token comes as often as the reference's order says, over all ranks, from files to tensors.

What it says is worked out here anew: files one by one, samples that are long enough, one shuffle, packs cut from the
stream, the epoch's shuffle of packs, cut to whole steps.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from internlm_ds.config.schema import DataConfig
from internlm_ds.data import binmeta
from internlm_ds.data.loader import PackedDataset, TrainLoader
from internlm_ds.data.trainset import open_sampler, open_train_set
from internlm_ds.errors import DataFormatError
from internlm_ds.layout.batch import BatchPlan

Files = dict[str, list[list[int]]]
MODES = ["cut", "into one", "unpacked"]


def expected(files: Files, data: DataConfig, mode: str, size: int, epoch: int) -> Counter[int]:
    """How often each token comes in an epoch that begins after the ramp-up, or in the first."""
    packs = [pack for name in sorted(files) for pack in packs_of(files[name], data, mode)]
    rng = np.random.RandomState(data.seed)
    order = np.arange(len(packs))
    for _ in range(epoch + 1):
        order = np.arange(len(packs))
        rng.shuffle(order)
    step = data.micro_num * size
    ramp = BatchPlan.from_config(data, data_size=size).rampup_samples * size if epoch == 0 else 0
    kept = order[: (len(packs) - ramp) // step * step + ramp]
    return Counter(token for number in kept for token in packs[number])


def packs_of(samples: list[list[int]], data: DataConfig, mode: str) -> list[list[int]]:
    kept = [sample for sample in samples if len(sample) >= data.min_length]
    order = np.arange(len(kept))
    np.random.RandomState(1024).shuffle(order)
    mixed = [kept[number] for number in order]
    stream, length = [token for sample in mixed for token in sample], data.seq_len * data.micro_bsz
    if mode != "unpacked":
        return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    rows = [sample[: data.seq_len] for sample in mixed]
    groups = [rows[i * data.micro_bsz : (i + 1) * data.micro_bsz] for i in range(len(stream) // length)]
    return [[token for row in group for token in row] for group in groups]


def delivered(data: DataConfig, size: int, epochs: int) -> list[Counter[int]]:
    """Tokens by epoch that the loaders of all ranks hand out."""
    found: list[Counter[int]] = [Counter() for _ in range(epochs)]
    for rank in range(size):
        train = open_train_set(data, vocab_size=10**6, log=False)
        dataset = PackedDataset(
            train.packs, dataset_types=train.dataset_types, seq_len=train.seq_len, rows=train.rows, files=train.files
        )
        sampler = open_sampler(data, train.packs, train.files, data_rank=rank, data_size=size)
        loader = TrainLoader(dataset, sampler=sampler, read_ahead=0)
        while True:
            step = loader.next_step()
            epoch = int(loader.state_dict()["epoch"])
            if epoch >= epochs:
                break
            for (tokens, _), _ in step.micro_batches:
                found[epoch].update(token for token in tokens.tolist() if token)  # 0 is padding only, here
    return found


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_every_kept_token_comes_as_often_as_the_order_says(mode: str, drawn: Any, tmp_path_factory) -> None:
    folder: Path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    lengths = drawn.draw(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=25), min_size=1, max_size=4))
    files, number = {}, 1
    for place, of_file in enumerate(lengths):
        samples = []
        for length in of_file:
            samples.append(list(range(number, number + length)))  # every token is one of its kind
            number += length
        files[f"{('cn', 'en')[place % 2]}/{place}.bin"] = samples
    for name, samples in files.items():
        with binmeta.Writer(folder / name) as writer:
            for sample in samples:
                writer.write(sample)
    data = DataConfig(
        train_folder=str(folder),
        seq_len=drawn.draw(st.integers(2, 9)),
        micro_bsz=drawn.draw(st.integers(1, 3)),
        micro_num=drawn.draw(st.integers(1, 3)),
        min_length=drawn.draw(st.integers(0, 6)),
        rampup_batch_size=drawn.draw(st.sampled_from(["", "1 1 2"])),
        pack_sample_into_one=mode == "into one",
        use_packed_dataset=mode == "cut",
    )
    size = drawn.draw(st.integers(1, 3))
    try:
        found = delivered(data, size, epochs=3)
    except DataFormatError:
        assume(False)
    for epoch, counts in enumerate(found):
        assert counts == expected(files, data, mode, size, epoch)
        assert not counts or max(counts.values()) == 1
