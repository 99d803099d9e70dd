"""The data of whole runs of the reference: files, packs, the packs of every batch, and what the log says of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cases
import pytest

from internlm_ds.config.schema import DataConfig
from internlm_ds.data import catalog
from internlm_ds.data.loader import PackedDataset, TrainLoader
from internlm_ds.data.packing import Concatenation, PaddedBatcher, packer_for
from internlm_ds.data.sampler import StaticBatchSampler

E2E = cases.case_folders("e2e", "expected.json")


def _data(expected: dict[str, Any], folder: Path) -> DataConfig:
    """The data section of a case with our defaults; `packed` as InternLM derives it."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    given = {key: value for key, value in expected["settings"]["data"].items() if key in known}
    given["train_folder"] = given["train_folder"].replace("<folder>", str(folder))
    flash = expected["settings"]["model"].get("use_flash_attn", True)
    return DataConfig(**{"use_packed_dataset": flash, **given})


def _parts(data: DataConfig, vocab_size: int) -> list[tuple[str, int, Any]]:
    assert data.train_folder is not None
    found = catalog.scan(data.train_folder, min_length=data.min_length, min_length_dict=data.min_length_dict)
    packer = packer_for(pack_sample_into_one=data.pack_sample_into_one, use_packed_dataset=data.use_packed_dataset)
    return [
        (file.name, len(kept), packer(kept, packed_length=data.micro_bsz * data.seq_len, seq_len=data.seq_len))
        for file, kept in catalog.open_files(found, vocab_size=vocab_size)
    ]


@pytest.mark.parametrize("folder", E2E, ids=lambda folder: folder.name)
def test_e2e_batches_equal_reference(folder: Path) -> None:
    expected = cases.read_json(folder / "expected.json")
    data = _data(expected, folder)
    parts = _parts(data, expected["settings"]["model"]["vocab_size"])
    packs = Concatenation([part for *_, part in parts])
    assert len(packs) == expected["num_packs"]
    assert list(catalog.scan(str(data.train_folder)).dataset_types) == expected["dataset_types"]
    rows = data.micro_bsz if isinstance(parts[0][-1], PaddedBatcher) else None
    dataset = PackedDataset(packs, dataset_types=expected["dataset_types"], seq_len=data.seq_len, rows=rows)
    steps = {step["step"]: step for step in expected["steps"]}
    world = expected.get("data_parallel_size", 1)
    for rank in range(world):
        sampler, loader = (_sampler(data, len(packs), rank, world) for _ in range(2))
        loader = TrainLoader(dataset, sampler=loader, skip_batches=data.skip_batches, read_ahead=0)
        for batch in expected["batches"]:
            assert sampler.next_batch() == batch["packs"][rank]
            step = loader.next_step()
            assert (step.index, step.skipped) == (batch["step"], batch["skipped"])
            if step.skipped or step.index not in steps:
                continue
            wanted = steps[step.index]
            targets = sum(int((labels >= 0).sum()) for _, (labels, _) in step.micro_batches)
            assert targets == wanted["num_targets"][rank]
            assert len(step.micro_batches) == wanted["micro_num"]
            if rank == 0:
                _check_stats(step.stats, wanted)


def _check_stats(stats: Any, wanted: dict[str, Any]) -> None:
    found = {
        "num_samples_in_batch": stats.num_samples,
        "largest_length": stats.largest_length,
        "largest_batch": stats.largest_batch,
        "smallest_batch": stats.smallest_batch,
    }
    assert found == {key: wanted[key] for key in found}


def _sampler(data: DataConfig, num_packs: int, rank: int, world: int) -> StaticBatchSampler:
    return StaticBatchSampler(
        num_packs,
        batch_size=data.micro_num,
        rampup=data.rampup_batch_size,
        seed=data.seed,
        data_rank=rank,
        data_size=world,
    )
