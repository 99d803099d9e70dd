"""Validation sets: which there are, what each rank sees, which are skipped."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from internlm_ds.data import binmeta, validation
from internlm_ds.data.samples import ListedSamples
from internlm_ds.errors import DataFormatError


def _write(path: Path, lengths: list[int], *, token: int = 1) -> None:
    with binmeta.Writer(path) as writer:
        for length in lengths:
            writer.write([token] * length)


def _batches(sets: dict[str, validation.ValidationSet], **changes: int) -> dict[str, validation.ValidationBatches]:
    sizes = {"micro_bsz": 2, "valid_micro_num": 3, "seq_len": 4, "data_rank": 0, "data_size": 1, **changes}
    return validation.batches_of(sets, **sizes)


def test_every_folder_with_bins_is_a_set_named_after_it(tmp_path: Path) -> None:
    _write(tmp_path / "b/cn/x.bin", [60, 49, 50])
    _write(tmp_path / "b/cn/y.bin", [70])
    _write(tmp_path / "a/cn/x.bin", [80])  # of equal names the later folder counts
    _write(tmp_path / "a/z/x.bin", [10])
    sets = validation.find_sets(str(tmp_path), vocab_size=10)
    assert {name: len(each) for name, each in sets.items()} == {"cn": 3, "z": 0}
    assert [len(sets["cn"][number]) for number in range(3)] == [60, 50, 70]
    with pytest.raises(IndexError, match="sample 3 of 3"):
        sets["cn"][3]


def test_ranks_share_a_set_and_cover_the_same_number_of_batches() -> None:
    sets = {"cn": validation.ValidationSet([ListedSamples([[n] * 5 for n in range(1, 16)])])}
    seen = []
    for rank in range(2):
        batches = _batches(sets, data_rank=rank, data_size=2)["cn"]
        assert (batches.batch_size, len(batches)) == (6, 1)
        for micro_batches in batches:
            assert len(micro_batches) == 3
            seen += [int(token) for arrays in micro_batches for token in arrays.tokens[::4]]
    assert seen == [1, 3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12]


def test_rows_are_padded_and_cut() -> None:
    arrays = validation.rows_as_micro_batch([np.array([1, -2, 3]), np.array([4, 5, 6, 7, 8])], seq_len=4)
    assert arrays.tokens.tolist() == [1, 2, 3, 0, 4, 5, 6, 7]
    assert arrays.labels.tolist() == [-100, 3, -100, -100, 5, 6, 7, -100]
    assert arrays.cu_seqlens.tolist() == [0, 4, 8, 8, 8, 8, 8, 8, 8]
    assert arrays.type_ids.tolist() == [0] * 8


def test_sets_too_small_for_all_ranks_are_skipped_on_all(caplog: pytest.LogCaptureFixture) -> None:
    sets = {"tiny": validation.ValidationSet([ListedSamples([[1]] * 7)])}
    assert _batches(sets, data_size=3)["tiny"].batch_size == 2
    with caplog.at_level(logging.INFO):
        assert all(_batches(sets, data_rank=rank, data_size=4) == {} for rank in range(4))
    assert [record.getMessage() for record in caplog.records] == [
        "skip validate tiny. (7 samples of at least 50 tokens, 8 needed)"
    ]


def test_synthetic_validation() -> None:
    sets = validation.synthetic_sets(seq_len=16, data_size=3, fixed_seqlen=False, vocab_size=None)
    assert {name: len(each) for name, each in sets.items()} == {"val": 1500}


def test_folders_that_hold_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"no \.bin file below data\.valid_folder; None validates on synthetic"):
        validation.find_sets(str(tmp_path), vocab_size=None)
    with pytest.raises(DataFormatError, match=r"data\.valid_folder does not exist"):
        validation.find_sets(str(tmp_path / "gone"), vocab_size=None)
