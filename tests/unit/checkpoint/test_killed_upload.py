"""A writer to an S3 store that is killed at any moment leaves whole checkpoints, and the next one finds them."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import s3_server
import torch

from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.place import StorePlace
from internlm_ds.checkpoint.storage import s3
from internlm_ds.checkpoint.storage.s3_folder import S3Storage
from internlm_ds.layout.ranks import Layout

pytestmark = pytest.mark.timeout(900)
TRANSFERS = s3.Transfers(attempts=3, wait_s=0.0, timeout_s=20.0, multipart_bytes=6_000_000, part_bytes=5_300_000)


@pytest.fixture(scope="module")
def server():
    with s3_server.running() as address:
        yield "{}:{}".format(*address)


def store_at(server: str, bucket: str) -> s3.S3Store:
    address = addresses.parse(f"s3://{bucket}.{server}/run")
    return s3.S3Store(address, transfers=TRANSFERS, environ=s3_server.KEYS)


def save(storage: S3Storage, slot: int, step: int) -> None:
    """Slots 0 and 1 in turn, one of them in several parts."""
    weights = {f"layer{i}": torch.full((600_000 if i == 0 else 2000,), float(step)) for i in range(3)}
    native.save(
        storage.root / "snapshot" / str(slot),
        weights=weights.items(),
        fragments=[native.Fragment(name, kind, 0, w) for name, w in weights.items() for kind in native.KINDS],
        train_state={"step_count": step},
        config_text="",
        layout=Layout(),
        arch=None,
        dtype="float32",
        storage=storage,
    )


def killed(server: str, bucket: str, root, chance: random.Random, *, first: int) -> None:
    writer = os.fork()
    if writer == 0:
        try:
            storage, step = S3Storage(store_at(server, bucket), root), first
            while True:
                step += 1
                save(storage, step % 2, step)
        finally:
            os._exit(1)
    time.sleep(chance.uniform(0.1, 1.2))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)


def through_kills(server: str, tmp_path, *, seed: int, kills: int) -> None:
    chance, bucket, root = random.Random(seed), f"killed{seed}", tmp_path / "root"
    store = store_at(server, bucket)
    store._client.create_bucket(Bucket=bucket)
    storage, step = S3Storage(store, root), 1
    save(storage, 1, 1)
    for _ in range(kills):
        killed(server, bucket, root, chance, first=step)
        place = StorePlace(store, tmp_path / "reader")
        found = place.candidates()
        assert found, "both slots lost"
        newest = native.open(place.bring(found[0].path))  # compares all files with the manifest
        assert newest.step >= step
        values = {int(newest.weight(f"layer{i}").unique().item()) for i in range(3)}
        assert values == {newest.step}
        step = newest.step
        storage.recover(root / "snapshot")
    save(storage, (step + 1) % 2, step + 1)
    assert not [path.name for path in (root / "snapshot").iterdir()]
    assert "Uploads" not in store._client.list_multipart_uploads(Bucket=bucket, Prefix=f"run/snapshot/{(step + 1) % 2}")
    manifest = json.loads(store.read(f"snapshot/{(step + 1) % 2}", s3.MANIFEST))
    assert set(store.files(f"snapshot/{(step + 1) % 2}")) == {*manifest["files"], s3.MANIFEST}


def test_killed_uploads(server, tmp_path):
    through_kills(server, tmp_path, seed=0, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_many_killed_uploads(server, tmp_path, seed):
    through_kills(server, tmp_path, seed=seed, kills=50)
