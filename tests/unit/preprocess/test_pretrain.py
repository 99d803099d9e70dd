"""Files to a pair: options, what is left out, append and overwrite, provenance."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest

from internlm_ds.data.binmeta import Reader
from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.pretrain import TextOptions, tokenize_texts
from internlm_ds.preprocess.progress import Progress


@pytest.fixture
def tokenize(tmp_path, tiny_tokenizer):
    warnings = []

    def run(files, output="en/a.bin", **more):
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        inputs = [str(tmp_path / name) for name in files]
        target = tmp_path / output
        run.summary = tokenize_texts(inputs, target, tokenizer=tiny_tokenizer, warn=warnings.append, **more)
        return [tokens.tolist() for tokens in Reader(target)]

    run.warnings = warnings
    return run


def ids(tokenizer, *texts):
    return tokenizer.encode(list(texts))


def test_several_files_become_one_pair(tokenize, tiny_tokenizer):
    found = tokenize({"a.txt": "the cat\n\nsat\n", "b.jsonl": '{"text": "猫"}\n{"text": " \\n"}\n{"text": ""}\n"x"'})
    assert found == ids(tiny_tokenizer, "the cat", "sat", "猫", "x")
    summary = tokenize.summary
    assert (summary.samples, summary.empty, summary.tokens) == (4, 2, sum(map(len, found)))
    assert str(summary).endswith("; 2 empty texts left out") and not tokenize.warnings


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_bos_and_eos(tokenize, tiny_tokenizer, bos, eos):
    (plain,) = ids(tiny_tokenizer, "cat")
    found = tokenize({"a.txt": "cat"}, options=TextOptions(bos=bos, eos=eos))
    assert found == [[1] * bos + plain + [2] * eos]


def test_defaults_of_options():
    choose = TextOptions.choose
    assert choose(bos=None, eos=None, text_key=None, compat=False) == TextOptions(False, False)
    assert choose(bos=None, eos=None, text_key=None, compat=True) == TextOptions(True, True, None, True)
    assert choose(bos=False, eos=None, text_key=None, compat=True) == TextOptions(False, True, None, True)


def test_meta_of_compat_is_int32_and_blank_lines_are_samples(tokenize, tmp_path, tiny_tokenizer):
    options = TextOptions(bos=True, eos=True, compat=True)
    newline = ids(tiny_tokenizer, "\n")[0]
    assert tokenize({"a.jsonl": "\n\n"}, options=options) == [[1, *newline, 2]] * 2
    assert np.load(tmp_path / "en/a.bin.meta").dtype == np.int32


def test_empty_input_of_compat_is_what_the_reference_writes(tokenize, tmp_path):
    assert tokenize({"a.txt": "\n"}, options=TextOptions(compat=True)) == []
    assert np.load(tmp_path / "en/a.bin.meta").shape == (0,)


def test_inputs_without_text_are_warned_of(tokenize):
    assert tokenize({"a.txt": "\n"}) == []
    assert "no sample was written" in tokenize.warnings[0]


def test_existing_output_append_and_overwrite(tokenize):
    once = tokenize({"a.txt": "the cat"})
    with pytest.raises(DataFormatError, match=r"a\.bin: the output exists"):
        tokenize({"a.txt": "the cat"})
    assert tokenize({"a.txt": "the cat"}, append=True) == once * 2
    assert tokenize({"a.txt": "the cat"}, overwrite=True) == once


def test_compat_appends_like_the_reference(tokenize):
    options = TextOptions(bos=True, eos=True, compat=True)
    once = tokenize({"a.txt": "the cat"}, options=options)
    assert tokenize({"a.txt": "the cat"}, options=options) == once * 2
    assert tokenize({"a.txt": "the cat"}, options=options, overwrite=True) == once


def test_failure_leaves_nothing(tokenize, tmp_path):
    with pytest.raises(DataFormatError, match=r"b\.jsonl, line 2: no JSON"):
        tokenize({"a.txt": "good\n" * 3000, "b.jsonl": '"good"\nbad'})
    assert list((tmp_path / "en").iterdir()) == []


def test_unknown_format_is_found_before_anything_is_written(tokenize, tmp_path):
    with pytest.raises(DataFormatError, match=r"b\.csv: cannot tell the format"):
        tokenize({"a.txt": "good", "b.csv": "x"})
    assert not (tmp_path / "en").exists()


def test_folder_of_no_known_type_and_other_ending_are_warned_of(tokenize):
    tokenize({"a.txt": "cat"}, "french/a.bin")
    assert "lies in no folder named after a data type (cn, en, code, ja, ar, kaoshi)" in tokenize.warnings[0]
    tokenize({"a.txt": "cat"}, "en/deep/a.tokens")
    assert tokenize.warnings[1:] == [tokenize.warnings[1]] and "does not end in .bin" in tokenize.warnings[1]


def test_provenance_records_where_tokens_come_from(tokenize, tmp_path, tiny_tokenizer):
    found = tokenize({"a.txt": "the cat", "b.jsonl": '"x"'}, options=TextOptions(eos=True, text_key="body"))
    record = json.loads((tmp_path / "en/a.bin.json").read_text())
    assert record["tokenizer"] == {"name": "tiny.model", "sha256": tiny_tokenizer.sha256, "vocab_size": 320}
    assert (record["bos"], record["eos"], record["text_key"], record["compat"]) == (False, True, "body", None)
    first = record["sources"][0]
    assert first["path"] == str(tmp_path / "a.txt") and first["bytes"] == 7 and first["samples"] == 1
    assert first["sha256"] == hashlib.sha256(b"the cat").hexdigest()
    counts = record["counts"]
    assert counts["samples"] == 2 and counts["tokens"] == sum(map(len, found))
    assert counts["largest_id"] == max(map(max, found)) and counts["bytes"] == (tmp_path / "en/a.bin").stat().st_size
    assert record["tool"]["name"] == "internlm-ds" and record["format"] == 1


def test_provenance_grows_with_an_append(tokenize, tmp_path):
    tokenize({"a.txt": "the cat"})
    found = tokenize({"b.txt": "sat\non"}, append=True)
    record = json.loads((tmp_path / "en/a.bin.json").read_text())
    assert [source["samples"] for source in record["sources"]] == [1, 2]
    assert record["counts"]["samples"] == 3 and record["counts"]["tokens"] == sum(map(len, found))
    assert record["counts"]["bytes"] == (tmp_path / "en/a.bin").stat().st_size


def test_append_to_a_bin_of_unknown_origin_says_so(tokenize, tmp_path):
    tokenize({"a.txt": "the cat"})
    (tmp_path / "en/a.bin.json").unlink()
    tokenize({"b.txt": "sat"}, append=True)
    record = json.loads((tmp_path / "en/a.bin.json").read_text())
    assert record["sources"][0]["note"] == "already in the bin, origin not recorded"
    assert record["counts"]["samples"] == 2 and record["counts"]["largest_id"] is None


def test_append_with_other_settings_is_refused(tokenize, tmp_path):
    tokenize({"a.txt": "the cat"})
    with pytest.raises(DataFormatError, match="made with bos=False, eos=False, these would have bos=True, eos=False"):
        tokenize({"a.txt": "the cat"}, append=True, options=TextOptions(bos=True))
    path = tmp_path / "en/a.bin.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(DataFormatError, match=r"a\.bin: cannot append: .* another tokenizer \(tiny\.model\)"):
        tokenize({"a.txt": "the cat"}, append=True)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_provenance_is_named(tokenize, tmp_path, text):
    tokenize({"a.txt": "the cat"})
    (tmp_path / "en/a.bin.json").write_text(text)
    with pytest.raises(DataFormatError, match=r"a\.bin\.json: no provenance record; delete the file"):
        tokenize({"a.txt": "the cat"}, append=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere():
    for stream, expected in (
        (Terminal(), "\r\x1b[K50% of 2.0 MB, 0.1 MB/s, 10 tokens/s, 10 s left\r\x1b[K"),
        (io.StringIO(), ""),
    ):
        times = iter([0.0, 0.1, 10.0])
        progress = Progress(2_000_000, stream=stream, clock=lambda times=times: next(times))
        progress.update(10, tokens=1)
        progress.update(1_000_000, tokens=100)
        progress.finish()
        assert stream.getvalue() == expected


def test_plain_progress_lines_come_every_half_minute():
    stream, times = io.StringIO(), iter([0.0, 31.0, 40.0, 62.0])
    progress = Progress(0, stream=stream, clock=lambda: next(times))
    for _ in range(3):
        progress.update(0, tokens=0)
    progress.finish()
    assert stream.getvalue() == "100% of 0.0 MB, 0.0 MB/s, 0 tokens/s, time left unknown\n" * 2
