"""The bin/meta pair: what is written is read back, and every way the two can disagree is named."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from internlm_ds.data.binmeta import Reader, Writer, rebuild_meta, scan, split_signed_tokens
from internlm_ds.errors import DataFormatError

SAMPLES = [[1, 2, 3], [-5], [100000, -100000, 7, 0]]


@pytest.fixture
def pair(tmp_path):
    path = tmp_path / "cn" / "a.bin"
    with Writer(path) as writer:
        for sample in SAMPLES:
            writer.write(sample)
    return path


def test_written_samples_are_read_back(pair):
    reader = Reader(pair)
    assert [tokens.tolist() for tokens in reader] == SAMPLES
    assert len(reader) == 3 and reader.num_tokens == 8
    assert reader.offsets.tolist() == [0, 22, 39] and reader.lengths.tolist() == [3, 1, 4]
    assert {reader.offsets.dtype, reader.lengths.dtype, reader.tokens(0).dtype} == {np.dtype("int64")}


def test_bytes_are_those_of_json_and_numpy(pair):
    assert pair.read_bytes() == b"".join(json.dumps({"tokens": s}).encode() + b"\n" for s in SAMPLES)
    expected = pair.with_name("expected.npy")
    np.save(expected, np.array([(0, 3), (22, 1), (39, 4)]))
    assert pair.with_name("a.bin.meta").read_bytes() == expected.read_bytes()


def test_sign_is_split_in_one_place():
    tokens, mask = split_signed_tokens([1, -5, 0])
    assert tokens.tolist() == [1, 5, 0] and mask.tolist() == [True, False, False]


def test_int32_meta_is_written_and_read(tmp_path):
    with Writer(tmp_path / "a.bin", meta_dtype="int32") as writer:
        writer.write([1])
    assert np.load(tmp_path / "a.bin.meta").dtype == np.int32
    assert Reader(tmp_path / "a.bin").offsets.dtype == np.int64


def test_int32_meta_stops_at_two_gib(tmp_path):
    message = r"a\.bin, line 1: an int32 meta cannot address .* 2 GiB"
    with pytest.raises(DataFormatError, match=message), Writer(tmp_path / "a.bin", meta_dtype="int32") as writer:
        writer._file.num_bytes = 2**31
        writer.write([1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("empty_meta", "shape"), [(None, (0, 2)), ("int32", (0,)), ("float64", (0,))])
def test_pair_without_samples(tmp_path, empty_meta, shape):
    with Writer(tmp_path / "a.bin", empty_meta=empty_meta):
        pass
    meta = np.load(tmp_path / "a.bin.meta")
    assert meta.shape == shape and meta.dtype == (empty_meta or "int64")
    assert len(Reader(tmp_path / "a.bin")) == 0


def test_reader_survives_pickling(pair):
    assert pickle.loads(pickle.dumps(Reader(pair))).tokens(1).tolist() == [-5]


def test_sample_outside_is_an_index_error(pair):
    with pytest.raises(IndexError, match="sample 3 of 3"):
        Reader(pair).tokens(3)


def test_nothing_appears_before_the_end(tmp_path):
    with pytest.raises(RuntimeError), Writer(tmp_path / "a.bin") as writer:
        writer.write([1])
        assert not (tmp_path / "a.bin").exists() and not (tmp_path / "a.bin.meta").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_files_beside_appear_with_the_bin(tmp_path):
    with Writer(tmp_path / "a.bin") as writer:
        writer.put_beside(".json", b"{}")
    assert (tmp_path / "a.bin.json").read_bytes() == b"{}"


def test_existing_output_is_an_error(pair):
    with pytest.raises(DataFormatError, match=r"a\.bin: the output exists; --append .* --overwrite"):
        Writer(pair)


def test_append_and_overwrite_exclude_each_other(pair):
    with pytest.raises(DataFormatError, match="exclude each other"):
        Writer(pair, append=True, overwrite=True)


def test_folder_is_no_output(tmp_path):
    with pytest.raises(DataFormatError, match="the output is a folder"):
        Writer(tmp_path, overwrite=True)


def test_overwrite_replaces(pair):
    with Writer(pair, overwrite=True) as writer:
        writer.write([9])
    assert [tokens.tolist() for tokens in Reader(pair)] == [[9]]


def test_append_keeps_what_is_there(pair):
    with Writer(pair, append=True) as writer:
        writer.write([9])
        assert writer.num_samples == 4 and writer.num_tokens == 9
    assert [tokens.tolist() for tokens in Reader(pair)] == [*SAMPLES, [9]]


def test_append_makes_a_meta_that_does_not_fit_anew(pair):
    pair.with_name("a.bin.meta").unlink()
    with Writer(pair, append=True) as writer:
        writer.write([9])
    assert [tokens.tolist() for tokens in Reader(pair)] == [*SAMPLES, [9]]


def test_failed_append_changes_nothing(pair):
    before = pair.read_bytes(), pair.with_name("a.bin.meta").read_bytes()
    with pytest.raises(RuntimeError), Writer(pair, append=True) as writer:
        writer.write([9])
        raise RuntimeError
    assert (pair.read_bytes(), pair.with_name("a.bin.meta").read_bytes()) == before
    assert len(list(pair.parent.iterdir())) == 2


def test_append_to_a_torn_bin_is_refused(pair):
    pair.write_bytes(pair.read_bytes()[:-5])
    with pytest.raises(DataFormatError, match=r"a\.bin, line 3, byte 39: torn or damaged line"):
        Writer(pair, append=True)
    assert len(list(pair.parent.iterdir())) == 2


def test_append_behind_a_line_without_end_is_refused(pair):
    pair.write_bytes(pair.read_bytes()[:-1])
    with pytest.raises(DataFormatError, match="line 3: the last line lacks its end"):
        Writer(pair, append=True)


def test_meta_without_bin_is_a_leftover(pair):
    pair.unlink()
    with Writer(pair) as writer:
        writer.write([4])
    assert len(Reader(pair)) == 1


def test_rebuilt_meta_equals_the_written_one(pair):
    meta = pair.with_name("a.bin.meta")
    before = meta.read_bytes()
    meta.unlink()
    assert rebuild_meta(pair) == meta and meta.read_bytes() == before
    assert scan(pair)[0].tolist() == [0, 22, 39]


def test_missing_bin(tmp_path):
    with pytest.raises(DataFormatError, match=r"a\.bin: no such bin file"):
        Reader(tmp_path / "a.bin")


def test_missing_meta(pair):
    pair.with_name("a.bin.meta").unlink()
    with pytest.raises(DataFormatError, match=r"the meta file .*a\.bin\.meta is missing\. To mend it: .*data repair"):
        Reader(pair)


def test_meta_that_is_no_numpy_file(pair):
    pair.with_name("a.bin.meta").write_bytes(b"hello")
    with pytest.raises(DataFormatError, match=r"a\.bin\.meta: no numpy file of integers"):
        Reader(pair)


@pytest.mark.parametrize("table", [np.zeros((3, 2)), np.zeros(3, dtype=np.int64), np.zeros((3, 1), dtype=np.int64)])
def test_meta_of_wrong_shape_or_type(pair, table):
    np.save(pair.with_name("x.npy"), table)
    pair.with_name("x.npy").rename(pair.with_name("a.bin.meta"))
    with pytest.raises(DataFormatError, match=r"a\.bin\.meta: a meta is a table of integers of shape \(n, 2\)"):
        Reader(pair)


def save_meta(pair, rows):
    with open(pair.with_name("a.bin.meta"), "wb") as file:
        np.save(file, np.array(rows, dtype=np.int64).reshape(-1, 2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(0, 3), (22, 1), (39, 4), (900, 2)],
            r"line 4, byte 900: meta row 3 says \(900, 2\) .* the bin has \d+ bytes",
        ),
        ([(0, 3), (22, -1), (39, 4)], r"line 2, byte 22: meta row 1 says \(22, -1\)"),
        ([(0, 3), (22, 1)], r"line 2, byte 22: the bin goes on for \d+ bytes behind the last line"),
        ([(0, 3), (22, 1), (39, 9)], r"line 3, byte 39: 4 tokens where the meta says 9"),
        ([(0, 3), (22, 1), (41, 4)], r"line 3, byte 41: meta row 2 points into the middle of a line"),
        ([], r"the meta is empty but the bin holds \d+ bytes"),
    ],
)
def test_meta_that_does_not_fit_the_bin(pair, rows, message):
    save_meta(pair, rows)
    with pytest.raises(DataFormatError, match=message) as raised:
        Reader(pair)
    assert "To mend it" in str(raised.value) and raised.value.path == str(pair)


def test_wrong_length_in_the_middle_is_found_when_read(pair):
    save_meta(pair, [(0, 3), (22, 2), (39, 4)])
    reader = Reader(pair)
    with pytest.raises(DataFormatError, match="line 2, byte 22: 1 tokens where the meta says 2"):
        reader.tokens(1)


def test_torn_last_line_is_found_at_opening(pair):
    pair.write_bytes(pair.read_bytes()[:-4])
    with pytest.raises(DataFormatError, match=r"a\.bin, line 3, byte 39: torn or damaged line .*To mend it"):
        Reader(pair)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"tokens": [1.5]}', "no flat list of integers"),
        (b'{"tokens": ["a"]}', "no flat list of integers"),
        (b'{"tokens": [[1]]}', "no flat list of integers"),
        (b'{"tokens": [1, [2]]}', "no flat list of integers"),
        (b'{"tokens": [99999999999999999999]}', "no flat list of integers"),
        (b'{"tokens": 5}', "no list of tokens"),
        (b"[1]", "no list of tokens"),
        (b'{"tokens": [1', "torn or damaged line"),
    ],
)
def test_line_that_holds_no_tokens(tmp_path, line, message):
    path = tmp_path / "a.bin"
    path.write_bytes(line + b"\n")
    save_meta(path, [(0, 1)])
    with pytest.raises(DataFormatError, match=rf"a\.bin, line 1, byte 0: .*{message}"):
        Reader(path)


def test_last_line_may_lack_its_newline(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b'{"tokens": [1]}\n{"tokens": []}')
    save_meta(path, [(0, 1), (16, 0)])
    assert [tokens.tolist() for tokens in Reader(path)] == [[1], []]
