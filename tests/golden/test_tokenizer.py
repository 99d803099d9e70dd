"""Text files through `--compat reference` equal the reference's bins and metas byte for byte.

A case is an input `X.Y` with its result `X_Y.bin` beside it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import golden, golden_root, tokenizers

from internlm_ds.cli.main import main
from internlm_ds.data.binmeta import Reader

MODEL = "tokenizer_internlm.model"


def pairs():
    root = golden_root() / "tokenizer"
    inputs = sorted(path for path in root.rglob("*.*") if path.suffix in (".txt", ".json", ".jsonl"))
    found = [(path, path.with_name(f"{path.stem}_{path.suffix[1:]}.bin")) for path in inputs]
    return [(source, result) for source, result in found if result.exists()]


CASES = [pytest.param(*pair, id=pair[0].name) for pair in pairs()]


def tokenize(source, output, *options):
    model = str(tokenizers() / MODEL)
    assert main(["preprocess", "text", str(source), "--output", str(output), "--tokenizer", model, *options]) == 0
    return output.read_bytes()


def meta(path):
    return path.with_name(f"{path.name}.meta")


def test_tokenizer_has_cases():
    golden("tokenizer")
    assert CASES, "golden/tokenizer holds no input X.Y with X_Y.bin beside it"


@pytest.mark.parametrize(("source", "result"), CASES)
def test_bin_and_meta_equal_the_reference(source, result, tmp_path):
    output = tmp_path / "cn" / result.name
    assert tokenize(source, output, "--compat", "reference") == result.read_bytes()
    assert meta(output).read_bytes() == meta(result).read_bytes()


@pytest.mark.parametrize(("source", "result"), CASES)
def test_second_run_appends_like_the_reference(source, result, tmp_path):
    output = tmp_path / "cn" / result.name
    tokenize(source, output, "--compat", "reference")
    assert tokenize(source, output, "--compat", "reference") == result.read_bytes() * 2
    rows, size = np.load(meta(result)), result.stat().st_size
    found = np.load(meta(output))
    assert found.dtype == np.int32 and len(found) == 2 * len(rows)
    if len(rows):
        assert np.array_equal(found, np.concatenate([rows, rows + np.array([size, 0])]))


@pytest.mark.parametrize(("source", "result"), [case for case in CASES if case.values[0].suffix == ".txt"])
def test_plain_lines_are_the_reference_without_bos_and_eos(source, result, tmp_path):
    text = source.read_text(encoding="utf-8")
    if any(piece in text for piece in ("<s>", "</s>", "<unk>")):
        pytest.skip("literal control pieces are text here, ids in the reference")
    output = tmp_path / "cn" / result.name
    tokenize(source, output)
    expected = [json.loads(line)["tokens"][1:-1] for line in result.read_bytes().splitlines()]
    assert [tokens.tolist() for tokens in Reader(output)] == expected


TUTORIAL = "感恩生活中的每一个细节，才能真正体会到幸福的滋味。\n梦想是人生的动力源泉，努力追逐，才能实现自己的目标。\n"
TUTORIAL += "学会宽容和理解，才能建立真正和谐的人际关系。\n"
TUTORIAL_BIN = b"""\
{"tokens": [73075, 75302, 69522, 69022, 98899, 67713, 68015, 81269, 74637, 75445, 99157]}
{"tokens": [69469, 60355, 73026, 68524, 60846, 61844, 98899, 67775, 79241, 98899, 67713, 67800, 67453, 67838, 99157]}
{"tokens": [68057, 79017, 60378, 68014, 98899, 67713, 67990, 68015, 70381, 67428, 61003, 67622, 99157]}
"""


def test_tutorial_example_gives_the_tutorials_ids_and_meta(tmp_path):
    (tmp_path / "raw_data.txt").write_text(TUTORIAL, encoding="utf-8")
    output = tmp_path / "cn" / "output.bin"
    assert tokenize(tmp_path / "raw_data.txt", output) == TUTORIAL_BIN
    found = np.load(meta(output))
    assert found.tolist() == [[0, 11], [90, 15], [208, 13]] and found.dtype == np.int64
