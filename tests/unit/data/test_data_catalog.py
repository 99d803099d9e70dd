"""Walking a training folder: types, order, samples that are too short, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from internlm_ds.data import binmeta, catalog
from internlm_ds.data.bintext import BinText, OpenFiles, parse_line
from internlm_ds.data.metarows import Order
from internlm_ds.data.samples import FileSamples
from internlm_ds.errors import DataFormatError


def write_bin(path: Path, samples: list[list[int]], *, meta_dtype: binmeta.MetaDtype = "int64") -> Path:
    with binmeta.Writer(path, meta_dtype=meta_dtype) as writer:
        for tokens in samples:
            writer.write(tokens)
    return path


def _all(folder: Path, **kwargs: object) -> list[tuple[str, int, list[list[int]]]]:
    vocab_size = kwargs.pop("vocab_size", None)
    found = catalog.scan(str(folder), **kwargs)  # type: ignore[arg-type]
    return [
        (file.name, kept.type_id, [kept.read(number).tolist() for number in range(len(kept))])
        for file, kept in catalog.open_files(found, vocab_size=vocab_size)  # type: ignore[arg-type]
    ]


def test_files_and_types_are_sorted(tmp_path: Path) -> None:
    for name in ("en/z.bin", "en/a/b.bin", "cn/x.bin", "en/.hidden.bin", ".snapshot/cn/x.bin"):
        write_bin(tmp_path / name, [[len(name)]])
    (tmp_path / "ja").mkdir()
    (tmp_path / "notes.txt").write_text("not data")
    assert catalog.scan(str(tmp_path)).dataset_types == ("cn", "en", "ja")
    assert _all(tmp_path) == [("cn/x.bin", 0, [[8]]), ("en/z.bin", 1, [[8]]), ("en/a/b.bin", 1, [[10]])]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_bin(tmp_path / "elsewhere" / "x.bin", [[5]])
    (tmp_path / "train" / "en").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "en" / "linked")
    os.symlink(tmp_path / "train", tmp_path / "train" / "en" / "loop")
    assert _all(tmp_path / "train") == [("en/linked/x.bin", 0, [[5]])]


@pytest.mark.parametrize("meta_dtype", ["int32", "int64"])
def test_min_length_keeps_order_and_says_what_it_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, meta_dtype: binmeta.MetaDtype
) -> None:
    write_bin(tmp_path / "en/x.bin", [[1], [2, 2], [3], [4, -4, 4]], meta_dtype=meta_dtype)
    write_bin(tmp_path / "en/y.bin", [[1], [2]])
    write_bin(tmp_path / "en/z.bin", [])
    with caplog.at_level(logging.INFO):
        assert _all(tmp_path, min_length=2) == [("en/x.bin", 0, [[2, 2], [4, -4, 4]])]
    assert [record.getMessage() for record in caplog.records] == [
        "en/x.bin: 2 of 4 samples (2 tokens) dropped, shorter than 2 tokens",
        "en/y.bin is left out: none of its 2 samples has 2 tokens",
        "en/z.bin is left out: it is empty",
    ]


def test_min_length_by_key(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    for name in ("cn/x.bin", "en/x.bin"):
        write_bin(folder / name, [[1], [2, 2]])
    by_key = {"en/": 2}  # also occurs in the folder's own name, which must not count
    assert [len(samples) for *_, samples in _all(folder, min_length_dict=by_key)] == [2, 1]
    assert [len(samples) for *_, samples in _all(folder, min_length_dict={"golden/cn": 2}, min_length=1)] == [1, 2]
    with pytest.raises(DataFormatError, match=r"cn/x\.bin: several keys .* 'cn', 'x\.bin'; exactly one may"):
        _all(folder, min_length_dict={"cn": 1, "x.bin": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"no \.bin file below data\.train_folder; it holds one folder per data type"),
        (lambda folder: folder.rmdir(), r"data\.train_folder does not exist; give an existing folder, or None"),
        (lambda folder: (folder.rmdir(), folder.write_text("")), r"data\.train_folder is a file, not a folder"),
        (lambda folder: write_bin(folder / "x.bin", [[1]]), r"x\.bin: .* lies directly in .*move it .*/en/x\.bin"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, make: object, message: str) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    make(folder)  # type: ignore[operator]
    with pytest.raises(DataFormatError, match=message) as caught:
        _all(folder)
    assert caught.value.exit_code == 2


def test_missing_meta(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1]])
    binmeta.meta_path(path).unlink()
    with pytest.raises(DataFormatError, match=r"x\.bin: the meta file .*x\.bin\.meta is missing\. To mend it: "):
        _all(tmp_path)


def test_torn_meta(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1]] * 20)
    meta = binmeta.meta_path(path)
    meta.write_bytes(meta.read_bytes()[:-40])
    with pytest.raises(DataFormatError, match=r"x\.bin\.meta: no numpy file of integers .*To mend it: "):
        _all(tmp_path)


@pytest.mark.parametrize("change", [lambda raw: raw + b'{"tokens": [7]}\n', lambda raw: raw[:-5], lambda raw: raw[:20]])
def test_stale_meta(tmp_path: Path, change: object) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1, 2], [3, 4]])
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataFormatError, match=r"x\.bin, line \d, byte \d+: .*To mend it: "):
        _all(tmp_path)


def test_bin_changed_while_training(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1, 2], [3, 4], [5, 6]])
    kept = catalog.open_kept(str(path))
    kept.read_span(0, 3)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataFormatError, match=r"x\.bin: the file has changed under this run: it was written to since"):
        kept.read(1)
    os.truncate(path, 20)  # behind its end a mapping would kill the process
    for read in (kept.read, lambda number: kept.read_span(0, number)):
        with pytest.raises(
            DataFormatError, match=r"changed under this run: 57 bytes at the start, 20 now; put the old"
        ):
            read(2)


def test_bin_of_another_text(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for text, message in (
        (b'{"tokens": [1, 2]}\n{"tokens": [3, 44', r"x\.bin, line 2, byte 19: torn or damaged line"),
        (b'{"tokens": [1, 2]}\n{"tokens": [3, 4, 5]}\n', r"x\.bin, line 2, byte 19: 3 tokens where the meta says 2"),
        (b'{"tokens": [1, 2]}{"tokens": [3, 4]}\n\n', r"x\.bin, line 1, byte 19: no line starts here: the meta"),
    ):
        path.write_bytes(text)
        samples = FileSamples(BinText(str(path)), Order(np.arange(2), np.array([0, 19]), np.array([2, 4])))
        for read in (samples.read, lambda number, samples=samples: samples.read_span(number, 2)):
            with pytest.raises(DataFormatError, match=message):
                read(1)


def test_bin_gone_while_training(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1, 2]])
    kept = catalog.open_kept(str(path))
    path.unlink()
    with pytest.raises(DataFormatError, match=r"x\.bin: the file was there at the start and cannot be read any more"):
        kept.read(0)
    with pytest.raises(DataFormatError, match=r"x\.bin: .* cannot be read any more .*put it back and resume"):
        BinText(str(path)).read_rows(np.array([0]), np.array([1]))


def test_ids_beyond_the_vocabulary_are_found_before_training(tmp_path: Path) -> None:
    write_bin(tmp_path / "en/x.bin", [[1, 2], [3], [4, -50]])
    assert _all(tmp_path, vocab_size=51)
    with pytest.raises(DataFormatError, match=r"x\.bin, line 3, byte \d+: token id 50 .* model\.vocab_size = 50; set"):
        _all(tmp_path, vocab_size=50)


def test_ids_beyond_the_vocabulary_are_found_when_read(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1], [60], [2]])
    kept = catalog.open_kept(str(path), vocab_size=50, samples_to_check=2)  # looks at the first and the last
    with pytest.raises(DataFormatError, match=r"x\.bin, line 2, byte 16: token id 60"):
        kept.read(1)


def test_vocabulary_noted_by_preprocessing(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1]])
    note = Path(f"{path}.json")
    note.write_text(json.dumps({"tokenizer": {"vocab_size": 300}, "counts": {"largest_id": None}}))
    assert _all(tmp_path, vocab_size=300)
    with pytest.raises(DataFormatError, match=r"tokenizer of 300 ids .*model\.vocab_size = 299; set .* = 300, or"):
        _all(tmp_path, vocab_size=299)
    note.write_text(json.dumps({"tokenizer": {"vocab_size": 300}, "counts": {"largest_id": 1}}))
    assert _all(tmp_path, vocab_size=2)
    note.write_text("no note")
    assert _all(tmp_path, vocab_size=2)


def test_the_largest_id_noted_leads_to_its_line(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "en/x.bin", [[1]] * 40 + [[90, 91]] + [[1, 1]] * 60)
    Path(f"{path}.json").write_text(json.dumps({"tokenizer": {"vocab_size": 300}, "counts": {"largest_id": 91}}))
    with pytest.raises(DataFormatError, match=r"x\.bin, line 41, .*token id 91 .*model\.vocab_size = 91"):
        catalog.open_kept(str(path), vocab_size=91, samples_to_check=2)
    short = write_bin(tmp_path / "en/y.bin", [[99], [1, 1]])
    Path(f"{short}.json").write_text(json.dumps({"tokenizer": {"vocab_size": 300}, "counts": {"largest_id": 99}}))
    assert catalog.open_kept(str(short), vocab_size=50, min_length=2).rows.counts.kept_samples == 1


def test_many_files_need_few_handles(tmp_path: Path) -> None:
    opened = OpenFiles(limit=2)
    paths = [str(write_bin(tmp_path / f"{number}.bin", [[number]])) for number in range(5)]
    texts = [BinText(path, files=opened) for path in paths]
    files = [FileSamples(text, Order(np.arange(1), np.array([0]), np.array([1]))) for text in texts]
    assert [file.read(0).tolist() for file in files * 2] == [[n] for n in range(5)] * 2
    assert len(opened._open) == 2


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        (b'{"tokens": [1, -2, 3]}\n', 3, [1, -2, 3]),
        (b'{"tokens": [1,2]}', 2, [1, 2]),
        (b'{"tokens": [1, 2]}\n', 3, None),
        (b'{"tokens": [1, 2x]}\n', 2, None),
        (b'{"tokens": [1, 2-3]}\n', 2, None),
        (b'{"tokens": []}\n', 0, None),
        (b'{"tokens": [1, 2], "type": 3}\n', 2, None),
        (b'{"token": [1, 2]}\n', 2, None),
    ],
)
def test_fast_parsing_takes_the_usual_line_only(text: bytes, length: int, expected: list[int] | None) -> None:
    found = parse_line(text, length)
    assert (None if found is None else found.tolist()) == expected


def test_unusual_lines_are_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b'{"type": "a", "tokens": [1, 2]}\n{"tokens": []}\n')
    np.save(f"{path}.meta.npy", np.array([[0, 2], [32, 0]]))
    os.rename(f"{path}.meta.npy", f"{path}.meta")
    kept = catalog.open_kept(str(path))
    assert [kept.read(number).tolist() for number in range(2)] == [[1, 2], []]
