"""Our writer of safetensors against the library's reader."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_ds.checkpoint import diskfile, tensorfile
from internlm_ds.errors import CheckpointDamagedError, CheckpointError


def test_library_reads_what_we_write(tmp_path):
    flat = torch.arange(12, dtype=torch.float32)
    tensors = {
        "a": flat[2:8],
        "b": flat[8:],
        "half": torch.randn(3, 4).to(torch.bfloat16).t(),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 5),
        "flags": torch.tensor([True, False]),
    }
    record = tensorfile.write(tmp_path / "x.safetensors", tensors, metadata={"format": "pt"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert record == diskfile.digest(tmp_path / "x.safetensors")


def test_range_reads_a_slice(tmp_path):
    tensorfile.write(tmp_path / "x.safetensors", {"a": torch.arange(10.0)})
    reader = tensorfile.TensorReader(tmp_path)
    assert reader.range("x.safetensors", "a", 3, 6).tolist() == [3, 4, 5]
    assert reader.shape("x.safetensors", "a") == (10,)


def test_shards_are_cut_by_size():
    named = [(str(i), torch.zeros(4)) for i in range(5)]
    assert [list(shard) for shard in tensorfile.shards(named, max_bytes=32)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(shard) for shard in tensorfile.shards(named[:2], max_bytes=1)] == [["0"], ["1"]]


def test_unreadable_file_is_damage_with_its_name(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointDamagedError, match=r"x\.safetensors: not a readable safetensors file"):
        tensorfile.TensorReader(tmp_path).names("x.safetensors")
    with pytest.raises(CheckpointDamagedError, match=r"gone\.safetensors"):
        tensorfile.TensorReader(tmp_path).tensor("gone.safetensors", "a")


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[" * 100_000, b""),
        ([1], b""),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, b""),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b""),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789"),
    ],
)
def test_headers_that_do_not_fit_are_damage(tmp_path, header, data):
    with_header(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointDamagedError, match=r"x\.safetensors: not a readable safetensors file"):
        tensorfile.TensorReader(tmp_path).tensor("x.safetensors", "a")


def test_types_that_are_not_read_are_named(tmp_path):
    with_header(tmp_path / "x.safetensors", {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"12")
    with pytest.raises(CheckpointError, match="'a' is of type F8_E4M3, which is not read"):
        tensorfile.TensorReader(tmp_path).tensor("x.safetensors", "a")


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {
        "a": torch.randn(4, 3, dtype=torch.float64),
        "half": torch.randn(5, 2).to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 5),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    reader = tensorfile.TensorReader(tmp_path)
    assert sorted(reader.names("x.safetensors")) == sorted(tensors)
    for name, tensor in tensors.items():
        found = reader.tensor("x.safetensors", name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert torch.equal(reader.range("x.safetensors", "half", 1, 4), tensors["half"][1:4])
