"""Sizes of validation sets and of their batches, as the kinds `evaluation` and `e2e` give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest

from internlm_ds.data import validation

E2E = cases.case_folders("e2e", "expected.json")


def _sizes(folder: Path, *, micro_bsz: int, valid_micro_num: int, seq_len: int, data_size: int) -> dict[str, Any]:
    batches = validation.batches_of(
        validation.find_sets(str(folder), vocab_size=None),
        micro_bsz=micro_bsz,
        valid_micro_num=valid_micro_num,
        seq_len=seq_len,
        data_rank=0,
        data_size=data_size,
    )
    return {
        name: {"batches": len(list(each)), "batch_size": each.batch_size, "dataset": len(each.samples)}
        for name, each in batches.items()
    }


def test_evaluation_loader_sizes_equal_reference() -> None:
    found = sorted(cases.golden("evaluation").rglob("evaluation.json"))
    assert found, "the kind evaluation holds no case"
    for path in found:
        case = cases.read_json(path)
        sizes = _sizes(
            path.parent / "valid",
            micro_bsz=case["micro_bsz"],
            valid_micro_num=case["valid_micro_num"],
            seq_len=case["seq_len"],
            data_size=case.get("data_parallel_size", 1),
        )
        assert sizes == case["loaders"]


@pytest.mark.parametrize("folder", E2E, ids=lambda folder: folder.name)
def test_e2e_validation_sizes_equal_reference(folder: Path) -> None:
    expected = cases.read_json(folder / "expected.json")
    wanted = expected.get("validation_loaders")
    if not wanted:
        pytest.skip("the case has no validation")
    settings = expected["settings"]
    data = {"valid_micro_num": settings["data"]["micro_num"], **settings["data"]}
    sizes = _sizes(
        Path(data["valid_folder"].replace("<folder>", str(folder))),
        micro_bsz=data["micro_bsz"],
        valid_micro_num=data["valid_micro_num"],
        seq_len=data["seq_len"],
        data_size=expected.get("data_parallel_size", 1),
    )
    assert list(sizes) == list(wanted)
    for name, each in wanted.items():
        shared = each.keys() & sizes[name].keys()
        assert shared, f"the case says nothing comparable of {name}: {each}"
        assert {key: sizes[name][key] for key in shared} == {key: each[key] for key in shared}
