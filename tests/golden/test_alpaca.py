"""Alpaca data through `--compat reference` equals the reference's outputs byte for byte.

A case is a folder with a JSON list of records and the reference's `out/` beside it.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from cases import golden, golden_root, tokenizers

from internlm_ds.cli.main import main
from internlm_ds.data.binmeta import Reader

MODEL = "tokenizer_internlm.model"


def found_cases():
    outputs = sorted(path for path in (golden_root() / "alpaca").rglob("out") if path.is_dir())
    inputs = [(sorted(out.parent.glob("*.json")), out) for out in outputs]
    return [(names[0], out) for names, out in inputs if names]


CASES = [pytest.param(*case, id=case[0].parent.name) for case in found_cases()]


def split_ratio(folder):
    """What the README of the case, or of the kind, says the reference was called with; its default is 0.1."""
    for place in (folder, *folder.parents):
        if (place / "README.md").exists() and (
            said := re.search(r"--split_ratio ([\d.]*\d)", (place / "README.md").read_text())
        ):
            return said[1]
    return "0.1"


def tokenize(source, output, *options):
    where = ["preprocess", "alpaca", str(source), str(output), "--tokenizer", str(tokenizers() / MODEL)]
    assert main([*where, "--split-ratio", split_ratio(source.parent), *options]) == 0


def test_alpaca_has_cases():
    golden("alpaca")
    assert CASES, "golden/alpaca holds no folder with a .json and out/ beside it"


@pytest.mark.parametrize(("source", "expected"), CASES)
def test_both_shares_equal_the_reference(source, expected, tmp_path, capsys):
    tokenize(source, tmp_path, "--compat", "reference")
    for path in (path for path in expected.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
    printed = capsys.readouterr().out
    if (source.parent / "stdout.txt").exists():
        assert printed.strip() == (source.parent / "stdout.txt").read_text().strip()


@pytest.mark.parametrize(("source", "expected"), CASES)
def test_without_compat_samples_differ_in_chat_pieces_and_split_only(source, expected, tmp_path):
    tokenize(source, tmp_path)
    rename = {103167: 103027, 103166: 103028, -103167: -103027, -103166: -103028}
    wanted, found = (
        sorted(
            tokens.tolist() for share in ("train", "valid") for tokens in Reader(root / share / "en" / "dataset.bin")
        )
        for root in (expected, tmp_path)
    )
    assert found == sorted([rename.get(token, token) for token in sample] for sample in wanted)
    num_samples = len(json.loads(source.read_text(encoding="utf-8")))
    drawn = len(np.load(tmp_path / "valid" / "en" / "dataset.bin.meta"))
    assert drawn == int(num_samples * float(split_ratio(source.parent)))
