"""Scanning bins: the compiled scan says what the plain one says, whatever stands in the file and wherever it is cut."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.data.binmeta import scan as scan_by_line
from internlm_ds.data.doctor.kernel import measure_compiled
from internlm_ds.data.doctor.lines import Lines, measure_plainly
from internlm_ds.data.doctor.scan import scan_bins

ids = st.integers(-200_000, 200_000) | st.sampled_from([0, 2**31 - 1, 2**31, -(2**62), 10**17, 10**18, 2**70])
samples = st.lists(st.lists(ids, max_size=6), max_size=8)
scraps = [
    b"\n",
    b"",
    b"x",
    b"\0\0\n",
    b"{}\n",
    b'{"tokens": [1,2]}\n',
    b'{"tokens": [01]}\n',
    b'{"tokens": [-0, 5]}\r\n',
]
scraps += [
    b'{"tokens": [1.5]}\n',
    b'{"tokens": [1, ]}\n',
    b'{"tokens": [-]}\n',
    b'{"tokens": [1, 2',
    b'{"tokens": [3]}',
]
scraps += [b'{"tokens": [4], "length": 1}\n', b'\xef\xbb\xbf{"tokens": [5]}\n', b'{"tokens": 1}\n', b"\xff\xfe\n"]


@st.composite
def bins(draw: st.DrawFn) -> bytes:
    """Rows, scraps among them, a byte or two changed."""
    parts = [json.dumps({"tokens": sample}).encode() + b"\n" for sample in draw(samples)]
    parts += draw(st.lists(st.sampled_from(scraps), max_size=3))
    text = bytearray(b"".join(draw(st.permutations(parts))))
    for _ in range(draw(st.integers(0, 2)) if text else 0):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.sampled_from(b'\n]}0-, x"\0'))
    return bytes(text)


def assert_equal(one: Lines, other: Lines) -> None:
    for field in dataclasses.fields(Lines):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype and mine.tolist() == theirs.tolist(), field.name
        else:
            assert mine == theirs, field.name


@given(bins())
def test_compiled_equals_plain(text: bytes):
    assert_equal(measure_compiled(text), measure_plainly(text))


@given(text=bins(), block_bytes=st.integers(1, 60))
def test_blocks_make_no_difference(text: bytes, block_bytes: int, tmp_path_factory):
    path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp())) / "a.bin"
    path.write_bytes(text)
    for engine in ("plain", "compiled"):
        (found,) = scan_bins([str(path)], engine=engine, block_bytes=block_bytes, workers=2)
        assert_equal(found, measure_plainly(text))


def test_columns_are_those_of_the_samples(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b'{"tokens": [5, -7, 0, 9]}\n{"tokens": []}\n{"tokens": [-3000000000]}\n')
    (lines,) = scan_bins([str(path)], engine="compiled")
    offsets, lengths = scan_by_line(path)
    assert lines.offsets.tolist() == offsets.tolist() and lines.lengths.tolist() == lengths.tolist()
    assert lines.learned.tolist() == [1, 0, 0] and lines.largest.tolist() == [9, -1, 2**31 - 1]
    assert len(set(lines.digests.tolist())) == 3 and lines.has_end and lines.size == path.stat().st_size


def test_files_come_in_order_and_one_that_is_missing_does_not_stop_the_others(tmp_path):
    for name, count in (("a.bin", 1), ("c.bin", 3)):
        (tmp_path / name).write_bytes(b'{"tokens": [1]}\n' * count)
    paths = [str(tmp_path / name) for name in ("a.bin", "b.bin", "c.bin")]
    done: list[Lines] = []
    first, second, third = scan_bins(paths, workers=2, done=done.append)
    assert isinstance(second, FileNotFoundError)
    assert (len(first), len(third), sum(block.size for block in done)) == (1, 3, 64)


@pytest.mark.parametrize("measure", [measure_plainly, measure_compiled])
def test_bad_lines_are_counted_beyond_those_that_are_told(measure, monkeypatch):
    monkeypatch.setattr("internlm_ds.data.doctor.lines.MOST_BAD_LINES", 2)
    found = measure(b"x\n" * 5 + b'{"tokens": [1]}\n')
    assert (found.num_bad, len(found.bad), found.line(0)) == (5, 2, 6)


def test_a_very_long_line_that_is_no_row_is_not_read_whole(monkeypatch):
    monkeypatch.setattr("internlm_ds.data.doctor.lines.LONGEST_ODD_LINE", 20)
    found = measure_compiled(b'{"tokens":[1,2,3,4,5,6,7,8]}\n{"tokens": [1, 2, 3, 4, 5, 6]}\n')
    assert (found.num_bad, len(found)) == (1, 1) and "more than 20 bytes" in found.bad[0].message
