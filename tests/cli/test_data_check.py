"""`internlm-ds data`: exit codes and messages."""

from __future__ import annotations

import json

import pytest

from internlm_ds.cli.main import main
from internlm_ds.data.binmeta import Writer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Writer("set/en/a.bin") as writer:
        for sample in ([1, 2, 3], [4, -5, 6], [7, 8]):
            writer.write(sample)
    return tmp_path / "set"


def test_a_good_set_has_no_finding(folder, capsys):
    assert main(["data", "check", "set"]) == 0
    assert capsys.readouterr().out == "1 file, 3 samples, 8 tokens: nothing wrong\n"


def test_a_fault_is_named_with_file_line_and_remedy(folder, capsys):
    assert main(["data", "check", "set", "--vocab-size", "8"]) == 1
    out = capsys.readouterr().out
    assert "set/en/a.bin: error: " in out and "line 3, byte 45: token 1 of 2 is id 8" in out and "  remedy: " in out


def test_json_lists_every_finding(folder, capsys):
    (folder / "en" / "a.bin.meta").unlink()
    assert main(["data", "check", "set/en/a.bin", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["kind"], finding["file"]) == ("meta-missing", "set/en/a.bin")


def test_convert_goes_there_and_back_with_its_folders(folder, capsys):
    assert main(["data", "convert", "set", "megatron", "--to", "megatron", "--dtype", "uint16"]) == 0
    assert capsys.readouterr().out == "set/en/a.bin -> megatron/en/a: 3 samples, 8 tokens\n"
    assert main(["data", "convert", "megatron", "back", "--from", "megatron", "--to", "internlm"]) == 0
    assert (folder.parent / "back/en/a.bin").read_bytes() == (folder / "en/a.bin").read_bytes()
    assert main(["data", "convert", "set/en/a.bin", "a.parquet"]) == 0
    assert main(["data", "convert", "set/en/a.bin", "a.parquet"]) == 2
    assert "a.parquet: the output exists; --overwrite replaces it" in capsys.readouterr().err
    assert main(["data", "convert", "set/en/a.bin", "a.parquet", "--overwrite"]) == 0


def test_a_path_that_does_not_exist_is_wrong_usage(folder, capsys):
    assert main(["data", "check", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
