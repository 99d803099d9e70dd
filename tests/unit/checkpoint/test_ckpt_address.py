"""Addresses: what decisions on storage say, text by text."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm_ds.checkpoint import address
from internlm_ds.checkpoint.storage import base
from internlm_ds.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "backend", "bucket", "endpoint", "key"),
    [
        ("local:/a/b", "local", None, None, None),
        ("llm_ckpts", "local", None, None, None),
        ("boto3:s3://weights.10.0.0.1/x/y", "boto3", "weights", "http://10.0.0.1:80", "x/y"),
        ("boto3:s3://weights.10.0.0.1:9000/x", "boto3", "weights", "http://10.0.0.1:9000", "x"),
        ("s3://my_bucket.v2.final/x", "boto3", "my_bucket.v2.final", None, "x"),
        ("boto3:s3://bucket", "boto3", "bucket", None, ""),
        ("boto3:s3://weights.1.2.3/x", "boto3", "weights.1.2.3", None, "x"),
        ("volc:vc://bucket.tos-cn-x.com/p", "volc", "bucket", "tos-cn-x.com", "p"),
        ("ali://bucket.oss-cn-x.com/p", "oss2", "bucket", "oss-cn-x.com", "p"),
    ],
)
def test_address_is_parsed(text, backend, bucket, endpoint, key):
    parsed = address.parse(text)
    assert (parsed.backend, parsed.bucket, parsed.endpoint, parsed.key) == (backend, bucket, endpoint, key)


def test_local_address_is_a_path():
    assert address.parse("local:/a/b").local_path == Path("/a/b")
    assert address.parse("~/c").local_path == Path.home() / "c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no path"),
        ("local:", "names no path"),
        ("gs://bucket/x", "unknown scheme 'gs'; known are local:/path, a plain path, boto3:s3://bucket/prefix"),
        ("boto3:/bucket/x", "after boto3: comes s3://bucket/prefix"),
        ("boto3:vc://bucket/x", "after boto3: comes s3://bucket/prefix"),
        ("s3:///x", "names no bucket"),
    ],
)
def test_bad_address_says_what_would_work(text, message):
    with pytest.raises(CheckpointError, match=message):
        address.parse(text)


def test_the_local_counterpart_of_a_store_is_its_own(tmp_path):
    first, second = (base.local_counterpart(address.parse(f"s3://bucket/{key}"), staging=str(tmp_path)) for key in "ab")
    assert first != second and first.parent == second.parent == tmp_path


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        (
            "volc:vc://bucket.tos.example.com/run/7",
            "boto3:s3://bucket/run/7 with AWS_ENDPOINT_URL=https://tos.example.com",
        ),
        ("oss2:ali://bucket.oss.example.com/", "boto3:s3://bucket with AWS_ENDPOINT_URL=https://oss.example.com"),
    ],
)
def test_other_stores_are_refused_with_the_boto3_equivalent(text, instead):
    with pytest.raises(CheckpointError, match=instead):
        base.of(address.parse(text))
