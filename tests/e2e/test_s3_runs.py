"""A run that saves to an S3 store goes on from there, on a host that has nothing of it, as if it had never stopped."""

from __future__ import annotations

import json
import shutil

import boto3
import pytest
import s3_server
import tiny_runs

from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint.storage import s3

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def server():
    with s3_server.running() as address:
        yield "{}:{}".format(*address)


def store_at(server: str, bucket: str) -> s3.S3Store:
    store = s3.S3Store(addresses.parse(f"s3://{bucket}.{server}/run"), environ=s3_server.KEYS)
    client = boto3.client(
        "s3", endpoint_url=f"http://{server}", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket=bucket)
    return store


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Ten steps without a stop and without a store."""
    folder = tmp_path_factory.mktemp("plain")
    return tiny_runs.train(tiny_runs.write_run(folder / "run", stop_at=10), folder / "out", ranks=2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_goes_on_from_a_store(server, plain, tmp_path, monkeypatch, asynchronous):
    for name, value in s3_server.KEYS.items():
        monkeypatch.setenv(name, value)
    bucket = "later" if asynchronous else "now"
    store = store_at(server, bucket)
    config = tiny_runs.write_run(tmp_path / "run")
    overrides = [
        f"ckpt.save_ckpt_folder=boto3:s3://{bucket}.{server}/run",
        "ckpt.checkpoint_every=4",
        "ckpt.oss_snapshot_freq=3",
        "internlm_ds.keep_checkpoints=1",
        f"ckpt.async_upload={asynchronous}",
    ]
    staging = tmp_path / "staging"
    if asynchronous:
        overrides.append(f"ckpt.async_upload_tmp_folder={staging}")
    else:
        monkeypatch.setenv("TMPDIR", str(staging))
        staging.mkdir()
    (config.parent / "stop").write_text("7")
    before = tiny_runs.train(config, tmp_path / "a", *overrides, ranks=2)
    assert before[-1]["step_count"] == 7
    held = store.files()
    manifests = sorted(name for name in held if name.endswith("manifest.json"))
    assert manifests == ["7/manifest.json", "snapshot/0/manifest.json", "snapshot/1/manifest.json"]
    assert json.loads(store.read("7", "manifest.json"))["step"] == 7
    assert not [name for name in held if ".lock" in name]

    shutil.rmtree(staging)
    staging.mkdir()
    (config.parent / "stop").write_text("10")
    after = tiny_runs.train(config, tmp_path / "b", *overrides, ranks=2)
    assert before + after == plain
