"""Globs, compression by ending, UTF-8 with line numbers, sizes and hashes."""

from __future__ import annotations

import gzip
import hashlib

import pytest
import zstandard

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.files import SourceFile, expand_inputs, numbered_lines, text_kind

TEXT = "".join(f"line {i} 中文\n" for i in range(5000))


def read(path, **options):
    source = SourceFile(str(path))
    with source.open() as stream:
        return source, [text for _, text in numbered_lines(stream, path=source.path, **options)]


def two_zstd_frames(data):
    return zstandard.compress(data[:1000]) + zstandard.compress(data[1000:])


def two_gzip_members(data):
    return gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + b"\0" * 7


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.txt", bytes),
        ("a.txt.gz", gzip.compress),
        ("a.txt.gz", two_gzip_members),
        ("a.txt.zst", zstandard.compress),
        ("a.txt.zst", two_zstd_frames),
        ("A.TXT.GZ", gzip.compress),
    ],
)
def test_text_comes_whole_with_size_and_hash_of_the_file(tmp_path, name, pack):
    content = pack(TEXT.encode())
    (tmp_path / name).write_bytes(content)
    source, lines = read(tmp_path / name)
    assert "".join(lines) == TEXT
    assert source.bytes_read == source.num_bytes == len(content)
    assert source.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_empty_text_in_compressed_file(tmp_path, pack):
    ending = "gz" if pack is gzip.compress else "zst"
    (tmp_path / f"a.txt.{ending}").write_bytes(pack(b""))
    assert read(tmp_path / f"a.txt.{ending}")[1] == []


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign", "tail"])
def test_damaged_compression_is_an_error_never_a_short_text(tmp_path, ending, damage):
    whole = (gzip.compress if ending == "gz" else zstandard.compress)(TEXT.encode())
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes({"cut": whole[:-5], "foreign": b"plain text", "tail": whole + b"rubbish"}[damage])
    with pytest.raises(DataFormatError, match=rf"a\.txt\.{ending}, byte \d+: damaged \.{ending} file \(.*again"):
        read(path)


def test_line_ends_of_all_systems_are_newlines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\nd")
    assert read(tmp_path / "a.txt")[1] == ["a\n", "b\n", "c\n", "d"]


def test_byte_order_mark_is_dropped_unless_asked_for(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert read(tmp_path / "a.txt")[1] == ["a\n"]
    assert read(tmp_path / "a.txt", keep_bom=True)[1] == ["\ufeffa\n"]


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 3 + b"b\xffd\n")
    with pytest.raises(DataFormatError, match=r"a\.txt, line 4: byte 0xff is no UTF-8; save the file as UTF-8"):
        read(tmp_path / "a.txt")


def test_missing_source_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = SourceFile(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataFormatError, match=r"a\.txt: cannot be read: No such file"):
        source.open()


def test_inputs_keep_their_order_and_globs_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl", "z[1].txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d.txt").mkdir()
    given = [str(tmp_path / "c.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "a.txt"), str(tmp_path / "z[1].txt")]
    names = [path.rsplit("/", 1)[1] for path in expand_inputs(given)]
    assert names == ["c.jsonl", "a.txt", "b.txt", "z[1].txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no.txt", r"no\.txt: no such input file"),
        ("*.txt", r"\*\.txt: no file matches this pattern"),
        ("folder", r"folder: is a folder; name its files, such as '.*folder/\*\.jsonl'"),
        ("fold*", r"no input file among .*fold\*"),
    ],
)
def test_inputs_that_are_no_files(tmp_path, pattern, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataFormatError, match=message):
        expand_inputs([str(tmp_path / pattern)])


def test_unknown_ending_lists_the_known_ones():
    with pytest.raises(
        DataFormatError, match=r"x\.csv\.gz: cannot tell the format .*\(\.csv\).*\.txt, \.json, \.jsonl"
    ):
        text_kind("x.csv.gz")
    with pytest.raises(DataFormatError, match=r"README: .*\(no ending\)"):
        text_kind("README")
