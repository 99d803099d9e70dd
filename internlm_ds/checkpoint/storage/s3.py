"""Checkpoint folders in an S3 store: sent file by file, the manifest last, so that no half checkpoint counts as one.

A folder of objects below a prefix is a checkpoint once its manifest is there; the manifest is sent after everything
else and removed before anything else. Every object carries the SHA-256 of its content as metadata, so a second attempt
leaves alone what the first one brought over, and an answer that got lost (the store has the object, the client saw an
error) is recognised. Transfers are boto3's own manager: parts of 8 MB from 100 MB on, ten at a time.

When to save and what to load is the manager's; which text names a store is `address`'s.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from internlm_ds.checkpoint.address import Address
from internlm_ds.errors import CheckpointDamagedError, CheckpointError

log = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.json"
HASH = "sha256"
KEY_VARIABLES = (
    ("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY_ID"),
    ("ACCESS_KEY", "SECRET_ACCESS_KEY"),
)
_READ_BYTES = 1 << 20
_FINAL_CODES = (
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "NoSuchBucket",
    "InvalidBucketName",
)
_MISSING_CODES = ("404", "NoSuchKey", "NotFound")


@dataclass(frozen=True)
class Transfers:
    """How hard to try.

    Attributes:
        attempts: Tries of one operation before it counts as failed, with waits that double from `wait_s` to 20 s.
        timeout_s: Longest silence of the store.
        multipart_bytes, part_bytes, threads: boto3's transfer manager.
    """

    attempts: int = 8
    wait_s: float = 0.5
    timeout_s: float = 60.0
    multipart_bytes: int = 100_000_000
    part_bytes: int = 8_000_000
    threads: int = 10


@dataclass(frozen=True)
class Sent:
    """What an upload did: files sent now, and files that were there already."""

    sent: tuple[str, ...]
    kept: tuple[str, ...]


class S3Store:
    """The objects below one address, `boto3:s3://bucket/prefix`.

    Args:
        transfers: Retries and sizes.
        environ: Where credentials are looked for before boto3's own chain.
        client: An S3 client to use instead of one made from all this.

    Raises:
        CheckpointError: Nothing names the store's endpoint or region. Every method raises it too, with the address and
            what to do, when the store refuses or stays silent.
    """

    def __init__(
        self,
        address: Address,
        *,
        transfers: Transfers | None = None,
        environ: Mapping[str, str] = os.environ,
        client: Any = None,
    ):
        assert address.backend == "boto3" and address.bucket, f"{address.text} names no S3 store"
        self.address = address
        self._transfers = transfers or Transfers()
        self._bucket = address.bucket
        self._prefix = (address.key or "").strip("/")
        self._client = client or _make_client(address, self._transfers, environ)

    def files(self, folder: str = "") -> dict[str, int]:
        """Objects below a folder with their sizes in bytes, by their names relative to it.

        Raises:
            CheckpointError: A name would leave the folder when it is written to a disk (`..`, an empty part).
        """
        prefix = self._key(folder)

        def listed() -> dict[str, int]:
            found: dict[str, int] = {}
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                found |= {item["Key"][len(prefix) :]: item["Size"] for item in page.get("Contents", ())}
            return found

        found = self._try(listed, doing=f"listing {self.shown(folder)}")
        names = {name: size for name, size in found.items() if not name.endswith("/")}
        for name in names:
            self._check_name(name)
        return names

    def upload(self, local: Path, folder: str, *, last: str = MANIFEST) -> Sent:
        """Make the objects below `folder` be the files of `local`, `last` after all others.

        What is there with the same content is left alone; what is there and not in `local` is removed. A folder that
        holds another `last` loses it first: it is no checkpoint while it changes.
        """
        names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
        assert last in names, f"{local} holds no {last}"
        present = self.files(folder)
        if last in present and not self._holds(folder, last, file_hash(local / last)):
            self._remove(folder, [last])
        first = self.send(local, folder, [name for name in names if name != last])
        self._remove(folder, sorted(set(present) - set(names)))
        second = self.send(local, folder, [last])
        self.abort_leftovers(folder)
        return Sent(first.sent + second.sent, first.kept + second.kept)

    def send(self, local: Path, folder: str, names: Sequence[str], *, hashes: Mapping[str, str] | None = None) -> Sent:
        """Bring these files of `local` over; what is there with the same content is left alone.

        Args:
            hashes: SHA-256 of each file where they are known; else the files are read for them.
        """
        sent, kept = [], []
        for name in names:
            digest = hashes[name] if hashes is not None else file_hash(local / name)
            if self._holds(folder, name, digest):
                kept.append(name)
            else:
                self._send(local / name, folder, name, digest=digest)
                sent.append(name)
        return Sent(tuple(sent), tuple(kept))

    def download(self, folder: str, local: Path, *, names: Sequence[str] | None = None) -> list[Path]:
        """Bring objects of a folder to `local` (all of them, or those named); returns the files.

        A file that is there with the content that the store says is left alone; others appear whole or not at all.

        Raises:
            CheckpointDamagedError: What arrived is not what was sent there.
        """
        present = self.files(folder)
        wanted = sorted(present if names is None else names)
        missing = [name for name in wanted if name not in present]
        if missing:
            raise CheckpointError(f"{self.shown(folder)} holds no {', '.join(missing)}")
        return [self._fetch(folder, name, local / name) for name in wanted]

    def read(self, folder: str, name: str, *, limit_bytes: int = 64_000_000) -> bytes | None:
        """Content of a small object, None if it is not there.

        Raises:
            CheckpointError: It is larger than `limit_bytes`.
        """

        def content() -> bytes | None:
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(folder, name))
            except Exception as error:
                if _code(error) in _MISSING_CODES:
                    return None
                raise
            size = int(answer["ContentLength"])
            if size > limit_bytes:
                raise CheckpointError(
                    f"{self.shown(folder, name)} has {size} bytes, {limit_bytes} at most are expected"
                )
            body: bytes = answer["Body"].read()
            if len(body) != size:
                raise ConnectionError(f"{len(body)} of {size} bytes arrived")
            return body

        return self._try(content, doing=f"reading {self.shown(folder, name)}")

    def write(self, folder: str, name: str, content: bytes, *, only_new: bool = False) -> bool:
        """Put a small object there.

        Args:
            only_new: Only if there is none yet, decided by the store (`If-None-Match`).
        Returns:
            False if there was one and `only_new` was asked for.
        """
        key, digest = self._key(folder, name), hashlib.sha256(content).hexdigest()
        extra = {"IfNoneMatch": "*"} if only_new else {}

        def put() -> bool:
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=content, Metadata={HASH: digest}, **extra)
            except Exception as error:
                if only_new and _code(error) in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
                    # an earlier try of ours may have arrived without its answer
                    return self.read(folder, name) == content
                raise
            return True

        return self._try(put, doing=f"writing {self.shown(folder, name)}")

    def remove(self, folder: str, *, last: str = MANIFEST) -> None:
        """Remove a folder: `last` first, so that nobody takes what is left for a checkpoint."""
        present = self.files(folder)
        if last in present:
            self._remove(folder, [last])
        self._remove(folder, sorted(set(present) - {last}))
        self.abort_leftovers(folder)

    def remove_file(self, folder: str, name: str) -> None:
        """Remove one object; nothing happens if it is not there."""
        self._remove(folder, [name])

    def _send(self, path: Path, folder: str, name: str, *, digest: str) -> None:
        from boto3.s3.transfer import TransferConfig

        how = self._transfers
        config = TransferConfig(
            multipart_threshold=how.multipart_bytes, multipart_chunksize=how.part_bytes, max_concurrency=how.threads
        )

        def put() -> None:
            try:
                self._client.upload_file(
                    str(path),
                    self._bucket,
                    self._key(folder, name),
                    ExtraArgs={"Metadata": {HASH: digest}},
                    Config=config,
                )
            except Exception:
                if not self._holds(folder, name, digest):
                    raise  # else only the answer was lost

        self._try(put, doing=f"sending {path} to {self.shown(folder, name)}")

    def _fetch(self, folder: str, name: str, target: Path) -> Path:
        self._check_name(name)
        head = self._head(folder, name)
        stored = None if head is None else head.get("Metadata", {}).get(HASH)
        if stored is not None and target.is_file() and file_hash(target) == stored:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            self._try(
                lambda: self._client.download_file(self._bucket, self._key(folder, name), str(temporary)),
                doing=f"fetching {self.shown(folder, name)}",
            )
            if stored is not None and file_hash(temporary) != stored:
                raise CheckpointDamagedError(f"{self.shown(folder, name)} is not what was sent there (SHA-256 differs)")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _holds(self, folder: str, name: str, digest: str) -> bool:
        head = self._head(folder, name)
        return head is not None and head.get("Metadata", {}).get(HASH) == digest

    def _head(self, folder: str, name: str) -> dict[str, Any] | None:
        def head() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=self._key(folder, name))
            except Exception as error:
                if _code(error) in _MISSING_CODES:
                    return None
                raise
            return found

        return self._try(head, doing=f"looking at {self.shown(folder, name)}")

    def _remove(self, folder: str, names: Sequence[str]) -> None:
        for name in names:
            self._try(
                lambda name=name: self._client.delete_object(Bucket=self._bucket, Key=self._key(folder, name)),  # type: ignore[misc]
                doing=f"removing {self.shown(folder, name)}",
            )

    def abort_leftovers(self, folder: str) -> None:
        """Parts of uploads that never ended cost money and are seen by nobody."""

        def abort() -> None:
            found = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._key(folder))
            for upload in found.get("Uploads", ()):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])

        try:
            self._try(abort, doing=f"removing unfinished uploads below {self.shown(folder)}")
        except CheckpointError as error:  # not everybody may list them; the checkpoint is whole all the same
            log.warning("%s", error)

    def _try(self, action: Callable[[], T], *, doing: str) -> T:
        """`action`, again and again while the store fails in a way that may pass."""
        wait_s = self._transfers.wait_s
        for attempt in range(1, self._transfers.attempts + 1):
            try:
                return action()
            except CheckpointError:
                raise
            except Exception as error:
                if attempt == self._transfers.attempts or _is_final(error):
                    raise CheckpointError(
                        f"{doing} failed ({attempt} attempts): {_words(error)}{_advice(error, self.address)}"
                    ) from error
                log.info("%s: %s; trying again", doing, _words(error))
                # spread, so that the ranks of a job do not come back all at once
                time.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, 20.0)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _key(self, folder: str, name: str = "") -> str:
        """Key of an object; without a name, what the keys of a folder's objects begin with."""
        return "/".join([*(part.strip("/") for part in (self._prefix, folder) if part.strip("/")), name])

    def shown(self, folder: str, name: str = "") -> str:
        return f"s3://{self._bucket}/{self._key(folder, name)}"

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        if PurePosixPath(name).is_absolute() or any(
            part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts
        ):
            raise CheckpointError(
                f"s3://{self._bucket}/{self._prefix} holds an object with the unsafe name {name!r}: refused"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file as a hex digest."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """boto3's arguments from InternLM's variables, {} where none is set (boto3's own chain decides then).

    >>> credentials({"S3_ACCESS_KEY_ID": "a", "S3_SECRET_ACCESS_KEY_ID": "b"})
    {'aws_access_key_id': 'a', 'aws_secret_access_key': 'b'}
    """
    for identity, secret in KEY_VARIABLES:
        if environ.get(identity) and environ.get(secret):
            return {"aws_access_key_id": environ[identity], "aws_secret_access_key": environ[secret]}
    return {}


def _make_client(address: Address, how: Transfers, environ: Mapping[str, str]) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(**credentials(environ))
    config = Config(
        retries={"mode": "standard", "max_attempts": 2},
        connect_timeout=min(10.0, how.timeout_s),
        read_timeout=how.timeout_s,
        max_pool_connections=2 * how.threads,
        s3={"addressing_style": "path"},
        # stores that are not Amazon's often do not know the newer checksum headers
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = session.region_name
    known = address.endpoint or _configured_endpoint(session)
    if not known and not region:
        raise CheckpointError(
            f"{address.text}: nothing says where the bucket {address.bucket} lies; set AWS_ENDPOINT_URL or "
            f"AWS_DEFAULT_REGION (or boto3's configuration file), or write boto3:s3://{address.bucket}.IP:PORT/prefix"
        )
    return session.client("s3", endpoint_url=address.endpoint, region_name=region or "us-east-1", config=config)


def _configured_endpoint(session: Any) -> str | None:
    found = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    profile = session._session.get_scoped_config() if not found else {}
    return found or profile.get("endpoint_url") or (profile.get("s3") or {}).get("endpoint_url")


def _code(error: BaseException) -> str:
    """The store's code for an error, "" for one that is not the store's (a lost connection)."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_final(error: BaseException) -> bool:
    """Trying again would give the same answer."""
    from botocore.exceptions import NoCredentialsError, ParamValidationError

    if isinstance(error, (NoCredentialsError, ParamValidationError)):
        return True
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return True  # this machine's disk
    # boto3's transfer manager wraps an error and keeps its words only
    return any(code in (_code(error), *re.findall(r"\w+", str(error))) for code in _FINAL_CODES)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _advice(error: BaseException, address: Address) -> str:
    text = f"{_code(error)} {error}"
    if "NoSuchBucket" in text:
        return f"; make the bucket {address.bucket} first, or mend the address"
    if any(
        code in text for code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "credentials")
    ):
        first, second = KEY_VARIABLES[0]
        return f"; check ${first} and ${second} (or boto3's own configuration) and the rights on the bucket"
    return "; check the address and the network, then start again: what arrived is kept"
