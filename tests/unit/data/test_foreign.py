"""Conversions: the same samples come back from every format, published layouts byte by byte, damage named."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.data.binmeta import Reader, Writer, join_signed_tokens, split_signed_tokens
from internlm_ds.data.foreign import blocks
from internlm_ds.data.foreign.convert import FORMATS, convert, inputs
from internlm_ds.data.foreign.internlm import lines
from internlm_ds.data.foreign.megatron import index_bytes, read_index
from internlm_ds.errors import DataFormatError, MissingExtraError

FOREIGN = [name for name in FORMATS if name != "internlm"]
ENDINGS = {"megatron": "", "numpy": "", "parquet": ".parquet", "datasets": ""}
SAMPLES = [[1, -2, 0], [], [70000, 5], [-9]]


def write(path, samples):
    with Writer(path, overwrite=True) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def read(path):
    return [sample.tolist() for sample in Reader(path)]


def there(folder, name, samples=SAMPLES, **options):
    """A bin, and what it becomes in a format."""
    path = write(folder / "x.bin", samples)
    to = str(folder / "foreign" / f"y{ENDINGS[name]}")
    convert(str(path), to, target_format=name, **options)
    return path, to


ids = st.integers(-(2**31) + 1, 2**31 - 1)
sample_lists = st.lists(st.lists(ids, max_size=6), max_size=8)


@pytest.mark.parametrize("name", FOREIGN)
@settings(max_examples=15)
@given(samples=sample_lists, block=st.integers(1, 12))
def test_there_and_back_gives_the_same_bytes(name, samples, block, tmp_path_factory):
    folder = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_TOKENS", block)
        _, to = there(folder, name, samples)
        convert(to, str(folder / "back.bin"), source_format=name)
    for ending in ("", ".meta"):
        assert (folder / f"back.bin{ending}").read_bytes() == (folder / f"x.bin{ending}").read_bytes()


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_every_type_of_ids(tmp_path, name, dtype):
    samples = [[0, 65535, -7], [3]] + ([[2**40, -(2**41)]] if dtype == "int64" else [])
    _, to = there(tmp_path, name, samples, dtype=dtype)
    convert(to, str(tmp_path / "back.bin"), source_format=name)
    assert read(tmp_path / "back.bin") == samples


@pytest.mark.parametrize("name", FOREIGN)
def test_an_id_that_does_not_fit_is_named_and_nothing_is_left(tmp_path, name):
    write(tmp_path / "x.bin", [[1], [2, 70000]])
    with pytest.raises(DataFormatError, match="sample 2 has the id 70000, uint16 ends at 65535; use --dtype int32"):
        convert(str(tmp_path / "x.bin"), str(tmp_path / "o" / "y"), target_format=name, dtype="uint16")
    assert not any(tmp_path.glob("o/*")) and not any(tmp_path.glob("o/.*"))


@pytest.mark.parametrize("first", FOREIGN)
@pytest.mark.parametrize("second", FOREIGN)
def test_from_each_foreign_format_to_each(tmp_path, first, second):
    _, to = there(tmp_path, first)
    convert(to, str(tmp_path / "z"), source_format=first, target_format=second)
    convert(str(tmp_path / "z"), str(tmp_path / "back.bin"), source_format=second)
    assert read(tmp_path / "back.bin") == SAMPLES


@given(sample_lists.map(lambda found: [*found, [], [2**63 - 1, 1 - 2**63, 2**32 - 1, 2**32, 10**10, 0, -1, 9, 10]]))
def test_compiled_lines_are_those_of_the_readable_twin(samples):
    lengths = np.array([len(sample) for sample in samples])
    signed = np.array([number for sample in samples for number in sample], dtype=np.int64)
    (slow, slow_sizes), (fast, sizes) = (lines(signed, lengths, compiled=way) for way in (False, True))
    assert bytes(fast) == slow and sizes.tolist() == slow_sizes.tolist()
    assert not isinstance(fast, bytes), "numba cannot be used here"


def test_a_sign_is_joined_as_it_was_split():
    raw = np.array([5, -6, 0, 7])
    assert join_signed_tokens(*split_signed_tokens(raw)).tolist() == raw.tolist()


# Megatron's index of the samples [10, 11, 12], [], [7] as int32, byte by byte (see docs/reference/data-formats.md)
VECTOR_IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX and two zero bytes
    "0100000000000000"  # version 1
    "04"  # int32
    "0300000000000000"  # 3 sequences
    "0400000000000000"  # 4 entries of the document index
    "03000000 00000000 01000000"  # lengths
    "0000000000000000 0c00000000000000 0c00000000000000"  # where they begin, in bytes
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # documents
)
VECTOR_BIN = bytes.fromhex("0a000000 0b000000 0c000000 07000000")


def test_megatron_files_are_the_published_layout_byte_by_byte(tmp_path):
    path = write(tmp_path / "x.bin", [[10, 11, 12], [], [7]])
    convert(str(path), str(tmp_path / "m"), target_format="megatron")
    assert (tmp_path / "m.idx").read_bytes() == VECTOR_IDX
    assert (tmp_path / "m.bin").read_bytes() == VECTOR_BIN
    assert not (tmp_path / "m_loss_mask.idx").exists()


def test_the_vector_is_read(tmp_path):
    (tmp_path / "m.idx").write_bytes(VECTOR_IDX)
    (tmp_path / "m.bin").write_bytes(VECTOR_BIN)
    for number, named in enumerate(("m", "m.idx", "m.bin")):
        convert(str(tmp_path / named), str(tmp_path / f"{number}" / "x.bin"))
        assert read(tmp_path / f"{number}" / "x.bin") == [[10, 11, 12], [], [7]]


def test_a_megatron_mask_is_an_indexed_dataset_of_its_own(tmp_path):
    path = write(tmp_path / "x.bin", [[1, -2, 0], [3]])
    convert(str(path), str(tmp_path / "m"), target_format="megatron")
    index = read_index(str(tmp_path / "m_loss_mask.idx"))
    assert index.dtype == "uint8" and index.lengths.tolist() == [3, 1]
    assert (tmp_path / "m_loss_mask.bin").read_bytes() == b"\1\0\0\1"
    assert np.fromfile(tmp_path / "m.bin", "<i4").tolist() == [1, 2, 0, 3]


def test_a_document_of_several_sequences_is_one_sample(tmp_path):
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 3)
    arrays = [np.array([2, 1, 3], "<i4"), np.array([0, 4, 6], "<i8"), np.array([0, 2, 3], "<i8")]
    (tmp_path / "m.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    (tmp_path / "m.bin").write_bytes(np.arange(1, 7, dtype="<u2").tobytes())
    convert(str(tmp_path / "m"), str(tmp_path / "x.bin"), source_format="megatron")
    assert read(tmp_path / "x.bin") == [[1, 2, 3], [4, 5, 6]]


def changed(content, offset, new):
    return content[:offset] + new + content[offset + len(new) :]


@pytest.mark.parametrize(
    ("index", "offset", "message"),
    [
        (b"", 0, "no Megatron index: it begins with b''"),
        (changed(VECTOR_IDX, 0, b"X"), 0, "no Megatron index"),
        (changed(VECTOR_IDX, 9, b"\2"), 9, "version 2 of the index, this reads version 1"),
        (changed(VECTOR_IDX, 17, b"\6"), 17, "type 6 (float64) of the ids; token ids are integers"),
        (changed(VECTOR_IDX, 17, b"\x63"), 17, "type 99 (unknown)"),
        (VECTOR_IDX[:-1], len(VECTOR_IDX) - 1, "torn or too long: 101 bytes where 3 sequences"),
        (VECTOR_IDX + b"ab", len(VECTOR_IDX), "torn or too long"),
        (VECTOR_IDX + b"\0\0\0", len(VECTOR_IDX), "an index with a mode for each sequence"),
        (changed(VECTOR_IDX, 38, b"\xff\xff\xff\xff"), 38, "sequence 2 has -1 ids"),
        (changed(VECTOR_IDX, 54, b"\x08"), 54, "sequence 2 begins at byte 8 of the bin, those before it end at 12"),
        (changed(VECTOR_IDX, 94, b"\2"), 70, "the document index does not run from 0 to 3"),
        (changed(VECTOR_IDX, 26, b"\0"), 70, "torn or too long"),
    ],
)
def test_a_damaged_megatron_index_is_named_with_its_byte(tmp_path, index, offset, message):
    (tmp_path / "m.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(VECTOR_BIN)
    with pytest.raises(DataFormatError) as raised:
        convert(str(tmp_path / "m"), str(tmp_path / "x.bin"), source_format="megatron")
    assert message in str(raised.value) and "copy both files again" in str(raised.value)
    assert (raised.value.path, raised.value.offset_bytes) == (str(tmp_path / "m.idx"), offset)
    assert not (tmp_path / "x.bin").exists()


def test_a_megatron_bin_that_its_index_does_not_describe(tmp_path):
    (tmp_path / "m.idx").write_bytes(VECTOR_IDX)
    with pytest.raises(DataFormatError, match=r"m\.bin: no such file; .*m\.idx describes it"):
        convert(str(tmp_path / "m"), str(tmp_path / "x.bin"))
    (tmp_path / "m.bin").write_bytes(VECTOR_BIN[:-2])
    with pytest.raises(DataFormatError, match=r"m\.bin, byte 14: 14 bytes where .*m\.idx describes 16"):
        convert(str(tmp_path / "m"), str(tmp_path / "x.bin"))
    (tmp_path / "m.bin").write_bytes(changed(VECTOR_BIN, 11, b"\xff"))
    with pytest.raises(DataFormatError, match=r"m\.bin, byte 8: the id -\d+ in documents 1 to 3; ids are 0 or more"):
        convert(str(tmp_path / "m"), str(tmp_path / "x.bin"))
    assert not (tmp_path / "x.bin").exists()


def test_a_mask_of_other_samples_is_refused(tmp_path):
    _, to = there(tmp_path, "megatron")
    with open(f"{to}_loss_mask.idx", "wb") as file:
        file.write(index_bytes([2, 1, 2, 1], "uint8"))
    with pytest.raises(DataFormatError, match="its sequences have other lengths than those of"):
        convert(to, str(tmp_path / "z.bin"), source_format="megatron")


def test_numpy_files_are_mapped_by_numpy(tmp_path):
    _, to = there(tmp_path, "numpy")
    tokens, offsets, mask = (np.load(f"{to}.{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "loss_mask"))
    assert (tokens.dtype, offsets.dtype, mask.dtype) == (np.int32, np.int64, np.bool_)
    assert offsets.tolist() == [0, 3, 3, 5, 6] and tokens.tolist() == [1, 2, 0, 70000, 5, 9]
    assert mask.tolist() == [True, False, False, True, True, False]
    about = json.loads((tmp_path / "foreign" / "y.about.json").read_text())
    assert (about["format"], about["samples"], about["tokens"], about["loss_mask"]) == ("numpy", 4, 6, True)


def test_numpy_files_of_others_with_lengths(tmp_path):
    np.save(tmp_path / "n.tokens.npy", np.arange(5, dtype=np.uint8))
    np.save(tmp_path / "n.lengths.npy", np.array([2, 3], np.int32))
    np.save(tmp_path / "n.loss_mask.npy", np.array([1, 0, 1, 1, 0], np.int8))
    convert(str(tmp_path / "n.tokens.npy"), str(tmp_path / "x.bin"))
    assert read(tmp_path / "x.bin") == [[0, -1], [2, 3, -4]]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("tokens", np.array([1.5]), r"n\.tokens\.npy: this is float64 of shape \(1,\); ids \(integers\) in one"),
        ("tokens", np.array([[1]]), r"this is int64 of shape \(1, 1\)"),
        ("tokens", np.array([1, -2, 3]), r"n\.tokens\.npy, byte 136: the id -2 in samples 1 to 2"),
        ("tokens", b"\x93NUMPY", r"n\.tokens\.npy, byte 6: no numpy file, or a torn one"),
        ("offsets", np.array([0, 2]), r"n\.offsets\.npy: offsets rise from 0 to the number of ids, 3; .* 0 to 2;"),
        ("offsets", np.array([0, 4, 3]), "offsets rise from 0"),
        ("offsets", None, r"n\.offsets\.npy: no such file, nor .*n\.lengths\.npy"),
        ("loss_mask", np.array([True]), r"n\.loss_mask\.npy: 1 entries for 3 ids"),
    ],
)
def test_damaged_numpy_files(tmp_path, name, array, message):
    files = {"tokens": np.array([1, 2, 3]), "offsets": np.array([0, 2, 3]), name: array}
    for one, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / f"n.{one}.npy").write_bytes(content)
        elif content is not None:
            np.save(tmp_path / f"n.{one}.npy", content)
    with pytest.raises(DataFormatError, match=message):
        convert(str(tmp_path / "n"), str(tmp_path / "x.bin"), source_format="numpy")
    assert not (tmp_path / "x.bin").exists()


def test_torn_numpy_tokens(tmp_path):
    _, to = there(tmp_path, "numpy")
    os.truncate(f"{to}.tokens.npy", 140)
    with pytest.raises(DataFormatError, match=r"tokens\.npy, byte 140: no numpy file, or a torn one .*write the files"):
        convert(to, str(tmp_path / "z.bin"), source_format="numpy")


def test_parquet_has_the_columns_of_transformers(tmp_path):
    _, to = there(tmp_path, "parquet")
    table = pq.read_table(to)
    assert table.column("input_ids").to_pylist() == [[1, 2, 0], [], [70000, 5], [9]]
    assert table.column("labels").to_pylist() == [[1, -100, -100], [], [70000, 5], [-100]]
    _, bare = there(tmp_path / "b", "parquet", [[1, 2]])
    assert pq.read_table(bare).column_names == ["input_ids"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"p\.parquet: no column input_ids or tokens; its columns: text"),
        ({"input_ids": [1]}, "the column input_ids is int64; a list of integers"),
        ({"input_ids": [["a"]]}, "the column input_ids is list"),
        ({"input_ids": [[1], [2, -3]]}, "row 2 has an id below 0 in input_ids"),
        ({"input_ids": [[1], None]}, r"row 2 has nothing \(null\) in input_ids"),
        ({"input_ids": [[1], [2, None]]}, r"row 2 has nothing \(null\) in input_ids"),
        ({"input_ids": [[1], [2]], "labels": [[1], [2, 3]]}, "row 2 has another number of labels than of input_ids"),
        (
            {"input_ids": [[1], [2, 3]], "labels": [[1], [3, -100]]},
            r"row 2 has the label 3 at the id 2; .* not shifted",
        ),
    ],
)
def test_unusable_parquet_is_named_by_file_and_row(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(DataFormatError, match=message) as raised:
        convert(str(tmp_path / "p.parquet"), str(tmp_path / "x.bin"))
    assert raised.value.path == str(tmp_path / "p.parquet") and not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("kind", [pa.large_list(pa.uint32()), pa.list_(pa.int16(), 2), pa.list_(pa.int64())])
def test_lists_of_every_kind(tmp_path, kind):
    pq.write_table(pa.table({"tokens": pa.array([[1, 2], [3, 4]], kind)}), tmp_path / "p.parquet")
    convert(str(tmp_path / "p.parquet"), str(tmp_path / "x.bin"))
    assert read(tmp_path / "x.bin") == [[1, 2], [3, 4]]


def test_torn_parquet_and_arrow_files(tmp_path):
    _, to = there(tmp_path, "parquet")
    size = os.path.getsize(to) - 5
    os.truncate(to, size)
    with pytest.raises(DataFormatError, match=rf"y\.parquet, byte {size}: damaged \(.*copy it again"):
        convert(to, str(tmp_path / "z.bin"))
    _, to = there(tmp_path / "d", "datasets")
    os.truncate(f"{to}/data-00000-of-00001.arrow", 100)
    with pytest.raises(DataFormatError, match=r"arrow, byte 100: damaged"):
        convert(to, str(tmp_path / "z.bin"))


def test_a_folder_of_datasets_with_chosen_rows_is_refused(tmp_path):
    _, to = there(tmp_path, "datasets")
    state = json.loads((tmp_path / "foreign/y/state.json").read_text())
    (tmp_path / "foreign/y/state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DataFormatError, match=r"call \.flatten_indices"):
        convert(to, str(tmp_path / "z.bin"))
    (tmp_path / "foreign/y/state.json").write_text("{")
    with pytest.raises(DataFormatError, match=r"state\.json: no folder of datasets\.save_to_disk"):
        convert(to, str(tmp_path / "z.bin"))


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    write(tmp_path / "x.bin", [[1]])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'internlm-ds\[datasets\]'"):
        convert(str(tmp_path / "x.bin"), str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_keeps_its_types_and_what_preprocessing_noted(tmp_path, name):
    write(tmp_path / "d/train/en/a.bin", [[1, 2], [3]])
    write(tmp_path / "d/train/cn/b.bin", [[-4, 5]])
    note = {"format": 1, "tokenizer": {"vocab_size": 9}, "sources": [], "counts": {"samples": 2, "tokens": 3}}
    (tmp_path / "d/train/en/a.bin.json").write_text(json.dumps(note))
    convert(str(tmp_path / "d"), str(tmp_path / "f"), target_format=name)
    found = convert(str(tmp_path / "f"), str(tmp_path / "back"), target_format="internlm")
    assert [os.path.relpath(one.target, tmp_path) for one in found] == ["back/train/cn/b.bin", "back/train/en/a.bin"]
    assert read(tmp_path / "back/train/cn/b.bin") == [[-4, 5]]
    back = json.loads((tmp_path / "back/train/en/a.bin.json").read_text())
    assert back["tokenizer"] == {"vocab_size": 9} and back["counts"]["largest_id"] == 3
    assert not (tmp_path / "back/train/cn/b.bin.json").exists()


def test_a_bin_of_a_folder_without_its_meta_is_not_passed_over(tmp_path):
    write(tmp_path / "d/en/a.bin", [[1]])
    write(tmp_path / "d/en/b.bin", [[1]])
    (tmp_path / "d/en/b.bin.meta").unlink()
    with pytest.raises(DataFormatError, match=r"b\.bin: the meta file .* is missing"):
        convert(str(tmp_path / "d"), str(tmp_path / "f"), target_format="numpy")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_an_existing_output_is_kept_or_replaced_whole(tmp_path, name):
    path, to = there(tmp_path, name)
    write(path, [[1, 2]])
    with pytest.raises(DataFormatError, match="the output exists; --overwrite replaces it"):
        convert(str(path), to, target_format=name)
    convert(to, str(tmp_path / "old.bin"), source_format=name)
    convert(str(path), to, target_format=name, overwrite=True)
    convert(to, str(tmp_path / "new.bin"), source_format=name)
    assert (read(tmp_path / "old.bin"), read(tmp_path / "new.bin")) == (SAMPLES, [[1, 2]])


@pytest.mark.parametrize("name", FOREIGN)
def test_a_full_disk_leaves_nothing_and_names_the_output(tmp_path, name):
    """The system's limit on the size of a file stands in for a full disk."""
    path = write(tmp_path / "x.bin", [list(range(100_000, 120_000))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            convert(str(path), str(tmp_path / "o" / "y"), target_format=name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.filename == str(tmp_path / "o" / "y")
    assert not (tmp_path / "o").exists() or not os.listdir(tmp_path / "o")


def test_an_output_never_replaces_its_input(tmp_path):
    path = write(tmp_path / "x.bin", SAMPLES)
    with pytest.raises(DataFormatError, match="the output would replace the input"):
        convert(str(path), str(tmp_path / "x"), target_format="megatron", overwrite=True)
    assert read(path) == SAMPLES


def test_a_note_of_an_older_bin_goes_with_it(tmp_path):
    _, to = there(tmp_path, "numpy")
    (tmp_path / "z.bin.json").write_text("{}")
    convert(to, str(tmp_path / "z.bin"), source_format="numpy", overwrite=True)
    assert not (tmp_path / "z.bin.json").exists()


def test_formats_are_told_from_names_and_neighbours(tmp_path):
    assert inputs(str(write(tmp_path / "x.bin", [[1]])), None)[0][1] == "internlm"
    for name in FOREIGN:
        _, to = there(tmp_path / name, name, [[1]])
        assert inputs(to, None) == [(to, name, "")]
    assert inputs(f"{tmp_path}/megatron/foreign/y.bin", None)[0][1] == "megatron"
    with pytest.raises(DataFormatError, match="no such file or folder; give --from"):
        inputs(str(tmp_path / "nothing"), None)
    with pytest.raises(DataFormatError, match="holds internlm and megatron and numpy and parquet and datasets; choose"):
        inputs(str(tmp_path), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataFormatError, match="nothing to convert in this folder"):
        inputs(str(tmp_path / "empty"), None)
    with pytest.raises(DataFormatError, match=r"which format is wanted\? Give --to"):
        convert(str(tmp_path / "x.bin"), str(tmp_path / "y"))


def test_a_damaged_bin_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "x.bin", [[1, 2], [3], [4]])
    path.write_bytes(path.read_bytes().replace(b"[3]", b"[x]"))
    with pytest.raises(DataFormatError, match=r"x\.bin, line 2, byte 19: torn or damaged line"):
        convert(str(path), str(tmp_path / "y"), target_format="numpy")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.bin", "x.bin.meta"]
