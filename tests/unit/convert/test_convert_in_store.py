"""Checkpoints in an S3 store are converted like those on a disk."""

from __future__ import annotations

import pytest
import s3_server
import torch

from internlm_ds.arch import blueprint
from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.inspection import inspect
from internlm_ds.checkpoint.place import localized
from internlm_ds.checkpoint.storage import s3
from internlm_ds.config.schema import ModelConfig
from internlm_ds.convert.run import Request, convert
from internlm_ds.convert.sources import dict_of_model
from internlm_ds.errors import ConversionError


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    for name, value in s3_server.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    with s3_server.running() as (host, port):
        text = f"boto3:s3://models.{host}:{port}"
        s3.S3Store(addresses.parse(text))._client.create_bucket(Bucket="models")
        yield text


def test_there_and_back(bucket, tmp_path):
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, mlp_ratio=2.0)
    arch = blueprint("INTERNLM", model)
    weights = {spec.name: torch.randn(spec.shape) for spec in arch.iter_params()}
    (tmp_path / "here").mkdir()
    settings = dict_of_model(model, dtype=torch.float32, model_type="INTERNLM")
    internlm.write_weights(tmp_path / "here", weights, arch=arch, model_config=settings)

    convert(Request(str(tmp_path / "here"), f"{bucket}/v1/native", None, "native"))
    convert(Request(f"{bucket}/v1/native", f"{bucket}/v1/hf", None, "hf"))
    convert(Request(f"{bucket}/v1/hf", str(tmp_path / "back"), None, "internlm", tensor=2))
    found = internlm.read_weights(tmp_path / "back", arch=arch)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert {one.format for one in inspect(localized(f"{bucket}/v1/native"), verify=True)} == {"native"}
    with pytest.raises(ConversionError, match="v1/hf exists"):
        convert(Request(str(tmp_path / "here"), f"{bucket}/v1/hf", None, "hf"))
