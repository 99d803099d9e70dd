"""Hidden parts of an output: one writer at a time, a journal, names that change when all is whole."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import signal

import numpy as np
import pytest

from internlm_ds.data.binmeta import Reader, Writer
from internlm_ds.data.partial import PartialOutput
from internlm_ds.data.rowfile import RowFile
from internlm_ds.errors import DataFormatError


def test_second_writer_of_an_output_is_refused_until_the_first_is_done(tmp_path):
    first = Writer(tmp_path / "a.bin")
    with pytest.raises(DataFormatError, match=r"a\.bin: another process is writing this output"):
        Writer(tmp_path / "a.bin")
    first.write([1])
    first.commit()
    with Writer(tmp_path / "a.bin", overwrite=True) as second:
        second.write([2])
    assert Reader(tmp_path / "a.bin").tokens(0).tolist() == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.bin.meta"]


def test_lock_of_a_folder_that_was_moved_away_is_no_lock(tmp_path, monkeypatch):
    first = PartialOutput(tmp_path / "a.bin")
    first.open()
    real, tries = fcntl.flock, []

    def flock(handle, how):
        tries.append(handle)
        if len(tries) == 1:
            first.discard()  # the first writer ends between the second's opening and locking
        return real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = PartialOutput(tmp_path / "a.bin")
    second.open()
    assert len(tries) == 2 and second.folder.is_dir()
    second.discard()
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Writer(tmp_path / "a.bin") as writer:
        writer.write([1])
    assert len(Reader(tmp_path / "a.bin")) == 1


def killed_writer(path):
    writer = Writer(path)
    writer.write([1] * 300_000)
    os.kill(os.getpid(), signal.SIGKILL)


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_writer, args=(tmp_path / "a.bin",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".a.bin.partial"]
    with Writer(tmp_path / "a.bin") as writer:
        writer.write([2])
    assert [tokens.tolist() for tokens in Reader(tmp_path / "a.bin")] == [[2]]
    assert len(list(tmp_path.iterdir())) == 2


def test_journal_is_read_back_and_a_torn_one_is_none(tmp_path):
    partial = PartialOutput(tmp_path / "a.bin")
    partial.open()
    assert partial.read_journal() is None
    partial.write_journal({"a": ["\udcff", 1]})
    assert partial.read_journal() == {"a": ["\udcff", 1]}
    for content in ("{", "[]"):
        partial.path("journal.json").write_text(content)
        assert partial.read_journal() is None
    partial.clear()
    assert [path.name for path in partial.folder.iterdir()] == ["lock"]
    partial.leave()
    assert partial.folder.exists()


def row_file(folder, **more):
    return RowFile(folder / "rows", folder / "table", shown="x.bin", **more)


def pair(folder):
    return (folder / "rows").read_bytes(), np.load(folder / "table").tolist()


def test_rows_parts_and_what_was_kept(tmp_path):
    file = row_file(tmp_path)
    file.write_rows(b"aa\nb\n", np.array([3, 2]), np.array([7, 1]))
    file.write_rows(b"", np.zeros(0, np.int64), np.zeros(0, np.int64))
    file.write_part(b"cc")
    file.write_part(b"c\n")
    file.end_row(5)
    assert (file.num_bytes, file.num_samples, file.num_tokens) == (9, 3, 13)
    file.write_rows(b"lost\n", np.array([5]), np.array([1]))
    file.close()
    file = row_file(tmp_path, num_bytes=9, num_samples=3, num_tokens=13)
    file.write_rows(b"d\n", np.array([2]), np.array([2]))
    file.finish()
    assert pair(tmp_path) == (b"aa\nb\nccc\nd\n", [[0, 7], [3, 1], [5, 5], [9, 2]])


def test_full_disk_names_the_output_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"cannot be written: File too large: '.*a\.bin'"),
            Writer(tmp_path / "a.bin") as writer,
        ):
            for _ in range(5000):
                writer.write(list(range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
