"""`data repair`: the copy is sound, the original untouched, and what was done is said."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import MENDED, TEXT_BIN, Place, row, sound_set, texts, write

from internlm_ds.cli.main import main
from internlm_ds.data.binmeta import Reader
from internlm_ds.data.doctor.lines import measure_plainly
from internlm_ds.data.doctor.repair import outputs_of, repair
from internlm_ds.data.doctor.scan import scan_bins


@pytest.mark.parametrize("fault", MENDED, ids=[fault[0].__name__ for fault in MENDED])
def test_a_repaired_copy_passes_the_check(fault, tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    fault[0](place)
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    assert main(["data", "repair", str(place.folder), "-o", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "new"), "--strict"]) == 0, (out, capsys.readouterr().out)
    assert {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()} == before
    assert f"{place.path} -> {tmp_path / 'new' / TEXT_BIN}: " in out


@pytest.mark.parametrize("text", [b"x\n", b'{"tokens":[7,8]}\r\n', b""])
def test_every_sound_sample_is_kept_in_order(text, tmp_path):
    place = Place(tmp_path)
    write(place.path, texts(9))
    place.write_lines([*place.lines[:4], text, *place.lines[4:], b'{"tok'])
    (lines,) = scan_bins([str(place.path)])
    repair(str(place.path), str(tmp_path / "out.bin"), lines)
    expected = [*texts(9)[:4], *([[7, 8]] if b"7" in text else []), *texts(9)[4:]]
    assert [tokens.tolist() for tokens in Reader(tmp_path / "out.bin")] == expected


@given(
    parts=st.lists(
        st.sampled_from([b"?\n", b"\n", row(1, 2), row(3), row(-4, 5), b'{"tokens":[6]}\n', row()]), max_size=12
    ),
    tail=st.sampled_from([b"", b'{"tokens": [1', row(9)[:-1]]),
)
@settings(max_examples=20)
def test_a_copy_holds_what_the_scan_saw(parts, tail, tmp_path_factory):
    path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp())) / "a.bin"
    path.write_bytes(b"".join(parts) + tail)
    (lines,) = scan_bins([str(path)])
    if lines.num_bad and not len(lines):
        return
    done = repair(str(path), f"{path}.new.bin", lines)
    copy = measure_plainly(path.with_name("a.bin.new.bin").read_bytes())
    assert copy.digests.tolist() == lines.digests.tolist()[: done.samples]
    assert (copy.num_bad, copy.odd, copy.has_end) == (0, 0, True)
    assert Reader(f"{path}.new.bin").num_tokens == done.tokens


def test_what_is_repeated_again_and_again_goes(tmp_path, capsys):
    place = Place(tmp_path)
    write(place.path, texts(30))
    place.write_lines([*place.lines, *place.lines, *place.lines[:25]], meta=True)
    assert main(["data", "repair", str(place.path), "-o", str(tmp_path / "out.bin")]) == 0
    assert "55 samples left out: a second run's, from line 31" in capsys.readouterr().out
    assert [tokens.tolist() for tokens in Reader(tmp_path / "out.bin")] == texts(30)


def test_samples_that_no_copy_mends_stay_unless_dropped(tmp_path, capsys):
    write(tmp_path / "a.bin", [[1, 2, 3], [1, -2], [4, 20_000], [5]])
    command = ["data", "repair", str(tmp_path / "a.bin"), "-o"]
    assert main([*command, str(tmp_path / "kept.bin")]) == 1
    printed = capsys.readouterr()
    assert "[all-masked]" in printed.out and "[id-range]" in printed.out and "this is left" in printed.err
    drops = ["--drop", "all-masked", "--drop", "id-range", "--drop", "short", "--min-length", "2"]
    assert main([*command, str(tmp_path / "dropped.bin"), *drops]) == 0
    assert [tokens.tolist() for tokens in Reader(tmp_path / "dropped.bin")] == [[1, 2, 3]]


def test_the_note_follows(tmp_path):
    place = Place(sound_set(tmp_path / "set"))
    place.write_lines(place.lines * 2)
    assert main(["data", "repair", str(place.path), "-o", str(tmp_path / "out.bin")]) == 0
    note = json.loads((tmp_path / "out.bin.json").read_text())
    assert note["counts"]["samples"] == 60 and note["tokenizer"]["name"] == "t.model"
    assert note["repaired"][0]["from"] == str(place.path)


def test_nothing_is_written_over(tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    assert main(["data", "repair", str(place.path), "-o", str(place.path)]) == 2
    assert main(["data", "repair", str(place.folder), "-o", str(place.folder)]) == 2
    assert "never repaired in place" in capsys.readouterr().err
    other = tmp_path / "other.bin"
    other.write_bytes(b"")
    assert main(["data", "repair", str(place.path), "-o", str(other)]) == 2
    assert main(["data", "repair", str(place.path), "-o", str(other), "--overwrite"]) == 0
    assert main(["data", "repair", str(place.path), "-o", str(other), "--overwrite", "--drop", "short"]) == 2


def test_two_bins_never_become_one(tmp_path, capsys):
    for name in ("one", "two"):
        write(tmp_path / name / "a.bin", [[1, 2]])
    paths = [str(tmp_path / name / "a.bin") for name in ("one", "two")]
    assert main(["data", "repair", *paths, "-o", str(tmp_path / "new")]) == 2
    assert "would both become this file" in capsys.readouterr().err


def test_outputs_are_named_as_the_bins_are():
    assert outputs_of(["a.bin"], [["a.bin"]], "b.bin") == [("a.bin", "b.bin")]
    assert outputs_of(["a.bin"], [["a.bin"]], "b/") == [("a.bin", "b/a.bin")]
    assert outputs_of(["x", "y/b.bin"], [["x/en/a.bin"], ["y/b.bin"]], "o") == [
        ("x/en/a.bin", "o/en/a.bin"),
        ("y/b.bin", "o/b.bin"),
    ]


def test_what_is_no_bin_is_not_copied(tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(b"some text\n")
    assert main(["data", "repair", str(tmp_path / "a.bin"), "-o", str(tmp_path / "b.bin")]) == 2
    assert "nothing to copy" in capsys.readouterr().err and not (tmp_path / "b.bin").exists()


def test_a_bin_that_cannot_be_read_is_an_error(tmp_path, capsys):
    (tmp_path / "a.bin").symlink_to("nowhere")
    assert main(["data", "repair", str(tmp_path), "-o", str(tmp_path / "new")]) == 2
    assert "a.bin: No such file" in capsys.readouterr().err
