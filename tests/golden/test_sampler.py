"""Batch order, resumes, shares of ranks and skipped batches against the reference."""

from __future__ import annotations

import json
from typing import Any

import cases

from internlm_ds.data.sampler import BatchSkipper, DataParallelSampler, StaticBatchSampler


def _sampler(args: dict[str, Any], *, batch_size: int | None = None) -> StaticBatchSampler:
    return StaticBatchSampler(
        sum(args["dataset_sizes"]),
        batch_size=batch_size or args["batch_size"],
        rampup=args["rampup_batch_size"],
        seed=args["seed"],
        data_rank=args["data_rank"],
        data_size=args["data_world_size"],
    )


def test_streams_equal_reference() -> None:
    for case in cases.entries("sampler", "streams.json"):
        sampler = _sampler(case["args"])
        assert len(sampler) == case["len"]
        batches, per_epoch = [], []
        while len(batches) < len(case["batches"]):
            missing = len(case["batches"]) - len(batches)
            taken = [batch for batch, _ in zip(sampler, range(missing))]
            per_epoch.append(len(taken))
            batches += taken
        assert batches == case["batches"]
        assert per_epoch == case["batches_per_epoch"]


def test_streams_across_epochs_equal_reference() -> None:
    for case in cases.entries("sampler", "streams.json"):
        sampler = _sampler(case["args"])
        assert [sampler.next_batch() for _ in case["batches"]] == case["batches"]


def test_resumes_equal_reference() -> None:
    for case in cases.entries("sampler", "resume.json"):
        args, expected = case["args"], case["state"]
        first = _sampler(args)
        assert [first.next_batch() for _ in case["first"]] == case["first"]
        state = first.state_dict()
        assert {key: state[key] or "" for key in state if key in expected} == {
            key: expected[key] or "" for key in state if key in expected
        }
        name, words, position = first.rng_state[:3]
        assert [name, words[: len(expected["rng_state"][1])].tolist(), position] == expected["rng_state"]
        assert first.indices.tolist() == expected["indices"]

        resumed = _sampler(args, batch_size=args.get("batch_size_after"))
        resumed.load_state_dict(json.loads(json.dumps(state)))
        wanted = args.get("batches_after", len(case["resumed"]))
        assert list(resumed)[:wanted] == case["resumed"]
        again = _sampler(args, batch_size=args.get("batch_size_after"))
        again.load_state_dict(expected)  # a state as the reference writes it
        assert list(again)[:wanted] == case["resumed"]


def test_shares_of_ranks_equal_reference() -> None:
    for case in cases.entries("sampler", "dp_sampler.json"):
        found = DataParallelSampler(
            case["n"], data_rank=case["rank"], data_size=case["world"], drop_last=case["drop_last"]
        )
        assert list(found) == case["indices"]
        assert len(found) == len(case["indices"])


def test_skipped_batches_equal_reference() -> None:
    for case in cases.entries("sampler", "batch_skipper.json"):
        skipped = BatchSkipper(case["spec"])
        assert [index for index in range(30) if skipped(index)] == case["skipped"]
