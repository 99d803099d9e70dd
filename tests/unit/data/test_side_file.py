"""Ids as numbers beside the text: the same batches, a stale file is never read, several makers make one."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from internlm_ds.cli.main import main
from internlm_ds.data import binmeta, cachefile, catalog, side_file
from internlm_ds.data.packing import FixedSegmentPacker, PaddedBatcher, SegmentPacker
from internlm_ds.errors import DataFormatError


def write_bin(path: Path, samples: int, *, first: int = 1, overwrite: bool = False) -> str:
    with binmeta.Writer(path, overwrite=overwrite) as writer:
        for number in range(samples):
            writer.write([(first + number + place) * (-1) ** place for place in range(number % 9)])
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_bin(tmp_path / "en" / "x.bin", 60)


@pytest.mark.parametrize("packer", [SegmentPacker, FixedSegmentPacker, PaddedBatcher])
@pytest.mark.parametrize("min_length", [0, 4])
def test_packs_are_those_of_the_text(path: str, packer: type, min_length: int) -> None:
    wanted = packer(catalog.open_kept(path, min_length=min_length), packed_length=12, seq_len=6)
    kept = catalog.open_kept(path, min_length=min_length, make_side_file=True, vocab_size=200)
    assert kept.ids is not None
    found = pickle.loads(pickle.dumps(packer(kept, packed_length=12, seq_len=6)))
    assert len(found) == len(wanted) > 5
    for number in range(len(found)):
        for name in ("tokens", "labels", "cu_seqlens", "type_ids"):
            left, right = getattr(found[number], name), getattr(wanted[number], name)
            assert (left.dtype, left.tolist()) == (right.dtype, right.tolist())


def test_one_that_lies_there_is_used_whatever_the_configuration_says(path: str) -> None:
    assert catalog.open_kept(path).ids is None
    assert side_file.make(path) == sum(number % 9 for number in range(60))
    assert catalog.open_kept(path).ids is not None


def _other_text_of_the_same_time(path: str) -> None:
    state = os.stat(path)
    Path(path).write_bytes(Path(path).read_bytes().replace(b"3", b"4"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: write_bin(Path(path), 60, first=2, overwrite=True),
        lambda path: os.utime(f"{path}.meta", ns=(5, 5)),
        _other_text_of_the_same_time,
    ],
)
def test_a_stale_one_is_named_and_made_anew(
    path: str, change: Callable[[str], object], caplog: pytest.LogCaptureFixture
) -> None:
    side_file.make(path)
    change(path)
    with caplog.at_level(logging.WARNING):
        assert catalog.open_kept(path).ids is None
    assert "x.bin.ids was made from another bin or meta and is not used" in caplog.text
    kept = catalog.open_kept(path, make_side_file=True)
    assert kept.ids is not None
    assert kept.read_span(0, 60).tolist() == np.concatenate([kept.read(number) for number in range(60)]).tolist()


def test_a_file_that_is_not_whole_is_none(path: str) -> None:
    side_file.make(path)
    os.truncate(f"{path}.ids", os.path.getsize(f"{path}.ids") - 4)
    assert side_file.find(path) is None
    assert catalog.open_kept(path, make_side_file=True).ids is not None


def test_changes_under_a_run_are_noticed(path: str) -> None:
    kept = catalog.open_kept(path, make_side_file=True)
    os.truncate(f"{path}.ids", 600)
    with pytest.raises(DataFormatError, match=r"x\.bin\.ids: the side file has changed under this run; start the run"):
        kept.read_span(0, 3)
    kept = catalog.open_kept(path, make_side_file=True)
    os.truncate(path, 30)
    with pytest.raises(DataFormatError, match=r"x\.bin: the file has changed under this run"):
        kept.read_span(0, 3)


def test_ids_beyond_the_vocabulary_are_named_with_their_line(path: str) -> None:
    side_file.make(path)
    kept = catalog.open_kept(path, vocab_size=60, samples_to_check=1)
    with pytest.raises(DataFormatError, match=r"x\.bin, line 54, .*token id 61"):
        kept.read_span(0, 60)


def test_folders_that_cannot_be_written_leave_the_text(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cachefile, "write", refuse)
    kept = catalog.open_kept(path, make_side_file=True)
    assert kept.ids is None and kept.read_span(1, 3).tolist() == [2, 3, -4]
    assert "x.bin (Permission denied): its text is read" in caplog.text


def test_ids_of_more_than_four_bytes_have_none(tmp_path: Path) -> None:
    with binmeta.Writer(tmp_path / "x.bin") as writer:
        writer.write([2**31])
    with pytest.raises(DataFormatError, match="an id needs more than four bytes"):
        side_file.make(str(tmp_path / "x.bin"))
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.bin.meta"]


def test_several_who_ask_at_once_make_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = side_file.make
    monkeypatch.setattr(side_file, "make", lambda path: made.append(path) or make(path))
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(side_file.find_or_make(path))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 5 and None not in found and len(made) == 1


def test_the_command_makes_those_that_are_missing(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.path.dirname(path)
    for expected in (f"{path}.ids: {sum(number % 9 for number in range(60))} ids\n", f"{path}.ids: there already\n"):
        assert main(["data", "side-file", folder]) == 0
        assert capsys.readouterr().out == expected
    assert main(["data", "side-file", f"{folder}/none.bin"]) == 2
