"""The compiled loops against their readable twins: rows, whole micro-batches, and when they are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.data import binmeta, catalog, kernels
from internlm_ds.data.bintext import BinText
from internlm_ds.data.micro_batches import micro_batch, stats_of
from internlm_ds.data.packing import Concatenation, FixedSegmentPacker, PaddedBatcher, SegmentPacker
from internlm_ds.data.samples import ListedSamples
from internlm_ds.errors import DataFormatError

token = st.one_of(st.integers(-30, 30), st.integers(-(10**18), 10**18))
PACKERS = (SegmentPacker, FixedSegmentPacker, PaddedBatcher)


@pytest.fixture(autouse=True, scope="module")
def kernel() -> Iterator[None]:
    """Compiled once on a machine: numba keeps the result."""
    assert kernels.load() is not None
    yield


def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_module", None)


def _rows(path: Path, count: int) -> tuple[list[int], str]:
    """Tokens of all rows, or the error."""
    reader = binmeta.read_meta(path)
    try:
        return BinText(str(path), vocab_size=10**18).read_rows(*(column[:count] for column in reader)).tolist(), ""
    except DataFormatError as error:
        return [], str(error)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(token, max_size=12), min_size=1, max_size=8))
def test_rows_equal_those_of_python(tmp_path_factory: pytest.TempPathFactory, samples: list[list[int]]) -> None:
    path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp())) / "x.bin"
    with binmeta.Writer(path) as writer:
        for tokens in samples:
            writer.write(tokens)
    found = _rows(path, len(samples))
    with pytest.MonkeyPatch.context() as patch:
        _without(patch)
        assert found == _rows(path, len(samples))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_found_alike(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Some bytes are replaced, added or taken away: the same numbers or the same error, whoever reads."""
    path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp())) / "x.bin"
    with binmeta.Writer(path) as writer:
        for tokens in ([1, -20, 300], [], [4], [0, 0]):
            writer.write(tokens)
    raw = path.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(start + 3, len(raw))))
    between = data.draw(st.text('0123456789,- ]}\n{"x', max_size=3)).encode()
    path.write_bytes(raw[:start] + between + raw[stop:] or b"\n")
    found = _rows(path, 4)
    with pytest.MonkeyPatch.context() as patch:
        _without(patch)
        assert found == _rows(path, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"tokens": [1,2]}', [1, 2]),
        (b'{"type": "a", "tokens": [1, 2]}\n', [1, 2]),
        (b'{"tokens":[1 ,2]}\r\n', [1, 2]),
        (b'{"tokens": [-0, 9223372036854775807]}\n', [0, 2**63 - 1]),
    ],
)
def test_unusual_lines_are_read_as_json(tmp_path: Path, text: bytes, expected: list[int]) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(text)
    assert BinText(str(path)).read_rows(np.array([0]), np.array([2])).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(-30, 30), max_size=25), min_size=1, max_size=30),
    st.tuples(st.integers(1, 9), st.integers(1, 4)),
    st.sampled_from(PACKERS),
)
def test_micro_batches_equal_those_of_python(samples: list[list[int]], sizes: tuple[int, int], packer: type) -> None:
    seq_len, micro_bsz = sizes
    parts = [packer(ListedSamples(samples, type_id=3), packed_length=seq_len * micro_bsz, seq_len=seq_len)] * 2
    packs = Concatenation(parts)
    rows = micro_bsz if packer is PaddedBatcher else None
    made = [micro_batch(packs, number, rows=rows, seq_len=seq_len) for number in range(len(packs))]
    with pytest.MonkeyPatch.context() as patch:
        _without(patch)
        wanted = [micro_batch(packs, number, rows=rows, seq_len=seq_len) for number in range(len(packs))]
    assert stats_of([counts for _, counts in made]) == stats_of([counts for _, counts in wanted])
    for (found, _), (want, _) in zip(made, wanted):
        for name in ("tokens", "cu_seqlens", "labels", "type_ids"):
            left, right = getattr(found, name), getattr(want, name)
            assert (left.dtype, left.tolist()) == (right.dtype, right.tolist()), name


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    path = tmp_path / "en" / "x.bin"
    with binmeta.Writer(path) as writer:
        for tokens in ([1], [2], [60], [3]):
            writer.write(tokens)
    kept = catalog.open_kept(str(path), vocab_size=50, samples_to_check=2)
    with pytest.raises(DataFormatError, match=r"x\.bin, line 3, byte 32: token id 60"):
        kept.read_span(0, 4)


def test_a_forked_child_uses_no_kernel_that_was_still_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch)
    monkeypatch.setattr(kernels, "_thread", object())
    monkeypatch.setattr(kernels, "_unusable", False)
    kernels._in_forked_child()
    assert kernels.load() is None and kernels._thread is None


def test_without_numba_rows_are_parsed_with_numpy(tmp_path: Path) -> None:
    code = "import sys; sys.modules['numba'] = None\nfrom internlm_ds.data import kernels\n"
    code += "assert kernels.load() is None and kernels.load() is None and kernels.loaded() is None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rows are parsed with numpy") == 1


def test_a_process_may_end_while_the_kernels_are_being_loaded() -> None:
    code = "from internlm_ds.data import kernels; kernels.load_in_background(); kernels.load_in_background()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
