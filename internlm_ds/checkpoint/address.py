"""Where a checkpoint folder is: `local:/path`, a plain path, `boto3:s3://bucket/prefix`, and InternLM's older forms.

Owns reading such a text; whether a backend can be used is `storage`'s. Credentials are never part of an address.

An S3 host is a bucket, dots and underscores included, unless an IPv4 address follows its first dot:
`bucket.10.0.0.1:9000` names the endpoint `http://10.0.0.1:9000` as well (port 80 if none is given), as InternLM
writes it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internlm_ds.errors import CheckpointError

Backend = Literal["local", "boto3", "volc", "oss2"]

_SCHEMES: dict[str, Backend] = {"s3": "boto3", "vc": "volc", "ali": "oss2"}
_PREFIXES: tuple[Backend, ...] = ("local", "boto3", "volc", "oss2")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)$", re.DOTALL)
_PORT = 80


@dataclass(frozen=True)
class Address:
    """A parsed address.

    Attributes:
        text: As it was written.
        path: What follows the backend's name: a local path, or the URL.
        bucket, endpoint, key: Of object stores; `endpoint` is None where the store's own configuration gives it,
            `key` is the prefix inside the bucket, without a leading slash.
    """

    text: str
    backend: Backend
    path: str
    bucket: str | None = None
    endpoint: str | None = None
    key: str | None = None

    @property
    def local_path(self) -> Path:
        """The folder of a local address."""
        assert self.backend == "local", f"{self.text} is no local address"
        return Path(self.path).expanduser()


def parse(text: str) -> Address:
    """Read an address.

    Raises:
        CheckpointError: It is empty, of an unknown scheme, or names no bucket.

    >>> parse("boto3:s3://weights.10.0.0.1/run/7").endpoint
    'http://10.0.0.1:80'
    """
    backend, path = _split_backend(text)
    if backend == "local":
        if not path:
            raise CheckpointError(f"checkpoint address {text!r} names no path; write local:/path or a plain path")
        return Address(text, backend, path)
    scheme = next(scheme for scheme, owner in _SCHEMES.items() if owner == backend)
    match = _URL.match(path)
    if not match or match[1] != scheme:
        raise CheckpointError(f"checkpoint address {text!r}: after {backend}: comes {scheme}://bucket/prefix")
    host, _, key = match[2].partition("/")
    bucket, endpoint = _split_host(host, backend=backend)
    if not bucket:
        raise CheckpointError(f"checkpoint address {text!r} names no bucket; write {backend}:{scheme}://bucket/prefix")
    return Address(text, backend, path, bucket=bucket, endpoint=endpoint, key=key)


def _split_backend(text: str) -> tuple[Backend, str]:
    for prefix in _PREFIXES:
        if text.startswith(f"{prefix}:"):
            return prefix, text[len(prefix) + 1 :]
    url = _URL.match(text)
    if url is None:
        return "local", text
    if url[1] not in _SCHEMES:
        known = ", ".join(("local:/path", "a plain path", "boto3:s3://bucket/prefix"))
        raise CheckpointError(f"checkpoint address {text!r}: unknown scheme {url[1]!r}; known are {known}")
    return _SCHEMES[url[1]], text


def _split_host(host: str, *, backend: Backend) -> tuple[str, str | None]:
    """Bucket and endpoint."""
    bucket, _, rest = host.partition(".")
    if backend != "boto3":
        return bucket, rest or None
    address, _, port = rest.partition(":")
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        return host, None
    return bucket, f"http://{address}:{port or _PORT}"


def boto3_equivalent(address: Address) -> str:
    """How to reach what a `volc:` or `oss2:` address names: both stores speak S3's protocol."""
    target = "/".join(part for part in (f"boto3:s3://{address.bucket}", (address.key or "").strip("/")) if part)
    where = f" with AWS_ENDPOINT_URL=https://{address.endpoint}" if address.endpoint else ""
    return f"{target}{where}"
