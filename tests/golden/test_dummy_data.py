"""Synthetic samples against the reference's, and the first pack made of them."""

from __future__ import annotations

import cases

from internlm_ds.data.packing import SegmentPacker
from internlm_ds.data.samples import lengths_of
from internlm_ds.data.synthetic import SyntheticSamples


def test_dummy_samples_equal_reference() -> None:
    for case in cases.entries("dummy_data", "random_dataset.json"):
        samples = SyntheticSamples(case["num_samples"], max_len=case["max_len"], fixed_seqlen=case["fixed_seqlen"])
        lengths = lengths_of(samples.ends)
        assert lengths[: len(case["lengths"])].tolist() == case["lengths"]
        assert int(lengths.sum()) == case["sum_lengths"]
        for number, tokens in case["samples"].items():
            assert samples.read(int(number))[: len(tokens)].tolist() == tokens
        packs = SegmentPacker(samples, packed_length=case["max_len"], seq_len=case["max_len"])
        assert len(packs) == case["len_packs"]
        if case["len_packs"]:
            pack = packs[0]
            assert {key: getattr(pack, key)[: len(want)].tolist() for key, want in case["pack0"].items()} == case[
                "pack0"
            ]
