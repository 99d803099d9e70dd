"""Packing, batches of packs and collation against the reference; each `*_MODE.json` beside `data/` is a case."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cases
import deviations
import numpy as np
import pytest

from internlm_ds.data import catalog, validation
from internlm_ds.data.collate import jsonl_collate, packed_collate, row_arrays
from internlm_ds.data.packing import Concatenation, packer_for
from internlm_ds.data.sampler import StaticBatchSampler

SWITCHES = {"cut": (False, True), "nocu": (True, True), "unpacked": (False, False)}
NO_CASE = Path("no-case")


def _cases(suffix: str) -> list[Path]:
    """Files of a shape; one stand-in where the kind is there without any, so that the test fails."""
    root = cases.golden_root() / "packing"
    pattern = re.compile(rf"_({'|'.join(SWITCHES)}){suffix}\.json")
    return sorted(path for path in root.glob("*.json") if pattern.search(path.name)) or [NO_CASE]


def _load(path: Path) -> dict[str, Any]:
    folder = cases.golden("packing")
    assert path is not NO_CASE, f"{folder} holds no case"
    return cases.read_json(path)


def _parts(config: dict[str, Any]) -> list[tuple[str, int, Any]]:
    """(file, samples kept, packer) of each file of the golden data."""
    folder = str(cases.golden("packing") / "data")
    found = catalog.scan(folder, min_length=config["min_length"], min_length_dict=config.get("min_length_dict"))
    into_one, packed = SWITCHES[config["mode"]]
    packer = packer_for(pack_sample_into_one=into_one, use_packed_dataset=packed)
    return [
        (file.name, len(kept), packer(kept, packed_length=config["packed_length"], seq_len=config["seq_len"]))
        for file, kept in catalog.open_files(found, vocab_size=None)
    ]


@pytest.mark.parametrize("path", _cases(""), ids=lambda path: path.stem)
def test_packs_equal_reference(path: Path) -> None:
    case = _load(path)
    parts = _parts(case["config"])
    assert [[name, len(part), kept] for name, kept, part in parts] == case["parts"]
    types = catalog.scan(str(cases.golden("packing") / "data")).dataset_types
    assert {name: number for number, name in enumerate(types)} == case["type_ids_map"]
    packs = Concatenation([part for *_, part in parts])
    assert len(packs) == len(case["items"]) > 0
    for number, item in enumerate(case["items"]):
        found = {key: getattr(packs[number], key).tolist() for key in item}
        assert found == item


@pytest.mark.parametrize("path", _cases("_batches"), ids=lambda path: path.stem)
def test_collated_batches_equal_reference(path: Path) -> None:
    case = _load(path)
    config = case["config"]
    packs = Concatenation([part for *_, part in _parts(config)])
    sampler = StaticBatchSampler(len(packs), batch_size=config["micro_num"], seed=config["sampler_seed"])
    assert case["batches"]
    for expected in case["batches"]:
        chosen = [packs[number] for number in sampler.next_batch()]
        inputs, labels = packed_collate(chosen)
        borders = inputs.pop("cu_seqlens")
        assert isinstance(borders, np.ndarray) == expected["cu_seqlens_is_tensor"]
        assert [row.tolist() for row in borders] == expected["cu_seqlens"]
        assert labels.tolist() == expected["labels"]
        assert {key: value.tolist() for key, value in inputs.items()} == {key: expected[key] for key in inputs}
        if config["mode"] == "unpacked":
            _check_rows(chosen, expected, config)


def _check_rows(packs: list[Any], expected: dict[str, Any], config: dict[str, Any]) -> None:
    shape = (len(packs), config["micro_bsz"], config["seq_len"])
    rows = [row_arrays(pack, rows=config["micro_bsz"], seq_len=config["seq_len"]) for pack in packs]
    found = {
        "unpacked_input_ids": np.stack([row.tokens for row in rows]).reshape(shape),
        "unpacked_labels": np.stack([row.labels for row in rows]).reshape(shape),
        "unpacked_type_ids": np.stack([row.type_ids for row in rows]).reshape(shape),
    }
    if "unpack_error" in expected:  # the reference fails: nothing to match, but ours must make a batch of it
        return
    for key, value in found.items():
        want = np.array(expected[key])
        want = deviations.labels_behind_short_rows(want) if key == "unpacked_labels" else want
        assert value.tolist() == want.tolist(), key


def test_jsonl_collation_equals_reference() -> None:
    path = cases.golden("packing") / "jsonl_collate.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    found = cases.read_json(path)
    for case in found if isinstance(found, list) else [found]:
        inputs, labels = jsonl_collate(case["samples"], max_length=case["max_length_per_sample"])
        assert inputs.tolist() == case["input_ids"]
        assert labels.tolist() == case["labels"]


def test_validation_sets_equal_reference() -> None:
    path = cases.golden("packing") / "validation.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    case = cases.read_json(path)
    sets = validation.find_sets(str(cases.golden("packing") / "data"), vocab_size=None)
    assert {name: len(samples) for name, samples in sets.items()} == {name: each["len"] for name, each in case.items()}
    for name, each in case.items():
        if "input_ids" not in each:
            continue
        count = len(each["input_ids"])
        inputs, labels = jsonl_collate([sets[name][number] for number in range(count)], max_length=50)
        assert inputs.tolist() == each["input_ids"]
        assert labels.tolist() == each["labels"]
