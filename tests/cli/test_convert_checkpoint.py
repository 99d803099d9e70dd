"""The command `convert-checkpoint`: exit codes, streams, files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from internlm_ds.arch import internlm as blueprint
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.cli.convert_checkpoint import parse_size
from internlm_ds.config.schema import ModelConfig
from internlm_ds.convert.sources import dict_of_model
from internlm_ds.errors import ConversionError

MODEL = ModelConfig(num_layers=2, hidden_size=16, vocab_size=24, num_attention_heads=4, mlp_ratio=2.0)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "internlm_ds.cli.main", "convert-checkpoint", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "ilm"
    folder.mkdir()
    arch = blueprint.build(MODEL)
    weights = {spec.name: torch.randn(spec.shape) for spec in arch.iter_params()}
    settings = dict_of_model(MODEL, dtype=torch.float32)
    internlm.write_weights(folder, weights, arch=arch, tensor_size=2, model_config=settings)
    return folder


def test_convert_checkpoint_exports_and_says_so(tmp_path, source):
    result = command(source, tmp_path / "hf", "--from", "internlm", "--to", "hf", "--dtype", "bfloat16")
    assert (result.returncode, result.stderr) == (
        0,
        "wrote model.safetensors (0.00 GB)\nreading back\ncomparing logits\n",
    )
    summary, _, difference = result.stdout.rpartition(" ")
    assert summary == (
        f"{tmp_path}/hf: 21 parameters, {blueprint.build(MODEL).num_params:,} elements, internlm -> hf, bfloat16; "
        "every parameter read back once, bit for bit equal; largest difference of logits"
    )
    assert float(difference) > 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_convert_checkpoint_splits_and_can_skip_verification(tmp_path, source):
    result = command(source, tmp_path / "out", "--to", "internlm", "--tensor", 4, "--pipeline", 2, "--no-verify")
    assert result.returncode == 0 and "not verified" in result.stdout
    assert (tmp_path / "out/model_tp3_pp1.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone", "out", "--to", "hf"), "CheckpointError: gone does not exist"),
        (("ilm", "ilm", "--to", "hf"), "ilm exists; remove it or name another place"),
        (("ilm", "out", "--to", "hf", "--content", "all"), "a Hugging Face folder holds weights only"),
        (("ilm", "out", "--to", "hf", "--max-shard-size", "huge"), "write a size like 10GB"),
        (("ilm", "out", "--to", "onnx"), "invalid choice: 'onnx'"),
        (("ilm", "out"), "the following arguments are required: --to"),
    ],
)
def test_convert_checkpoint_wrong_usage(tmp_path, source, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_convert_checkpoint_damaged_source_has_its_own_exit_code(tmp_path, source):
    assert command(source, tmp_path / "5", "--to", "native").returncode == 0
    (tmp_path / "5/config.py").unlink()
    result = command(tmp_path / "5", tmp_path / "hf", "--to", "hf")
    assert result.returncode == 4 and "config.py: missing" in result.stderr


def test_shard_sizes():
    assert [parse_size(text) for text in ("10GB", "500 mb", "1.5KB", "77")] == [10 * 10**9, 5 * 10**8, 1500, 77]
    for text in ("", "0", "-1GB", "GB", "1TB"):
        with pytest.raises(ConversionError, match="write a size like 10GB"):
            parse_size(text)
