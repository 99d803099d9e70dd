"""Folders in a real S3 server: whole or not there, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import s3_server
from fault_proxy import FAULTS, FaultProxy

from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint.place import StorePlace
from internlm_ds.checkpoint.storage import s3
from internlm_ds.checkpoint.storage.s3_folder import S3Storage
from internlm_ds.checkpoint.store_lock import StoreLock
from internlm_ds.errors import CheckpointDamagedError, CheckpointError

QUICK = s3.Transfers(
    attempts=12, wait_s=0.0, timeout_s=20.0, multipart_bytes=6_000_000, part_bytes=5_300_000, threads=2
)
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def server():
    with s3_server.running() as address:
        yield address


def store_at(where: str, bucket: str, prefix: str = "runs/a", *, transfers: s3.Transfers = QUICK) -> s3.S3Store:
    return s3.S3Store(
        addresses.parse(f"boto3:s3://{bucket}.{where}/{prefix}"), transfers=transfers, environ=s3_server.KEYS
    )


@pytest.fixture
def store(server):
    """A store in a new bucket."""
    made = store_at("{}:{}".format(*server), f"bucket{next(NUMBERS)}")
    made._client.create_bucket(Bucket=made.address.bucket)
    return made


def checkpoint(folder: Path, step: int, *, big: bool = False) -> Path:
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(bytes([step % 256]) * (11_000_000 if big else 3000))
    (folder / "random").mkdir()
    (folder / "random" / "rank0.json").write_text(json.dumps({"step": step}))
    (folder / "config.py").write_text("same = 1\n")
    (folder / s3.MANIFEST).write_text(json.dumps({"step": step}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_comes_back_as_it_went(store, tmp_path):
    sent = store.upload(checkpoint(tmp_path / "7", 7, big=True), "7")
    assert sent.sent[-1] == s3.MANIFEST and not sent.kept
    store.download("7", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "7")
    assert store.files("7") == {name: len(content) for name, content in contents(tmp_path / "7").items()}


def test_a_second_upload_sends_what_differs_only(store, tmp_path):
    local = checkpoint(tmp_path / "7", 7)
    store.upload(local, "7")
    assert store.upload(local, "7").sent == ()
    (local / "config.py").write_text("same = 2\n")
    assert store.upload(local, "7").sent == ("config.py",)


def test_another_checkpoint_replaces_all_of_the_old_one(store, tmp_path):
    store.upload(checkpoint(tmp_path / "a", 1), "snapshot/0")
    other = checkpoint(tmp_path / "b", 2)
    (other / "random" / "rank0.json").unlink()
    store.upload(other, "snapshot/0")
    store.download("snapshot/0", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(other)


def test_a_neighbour_with_a_longer_name_is_not_touched(store, tmp_path):
    store.upload(checkpoint(tmp_path / "a", 1), "1")
    store.upload(checkpoint(tmp_path / "b", 10), "10")
    store.remove("1")
    assert store.files("1") == {} and len(store.files("10")) == 4


def test_while_a_checkpoint_changes_it_has_no_manifest(store, tmp_path, monkeypatch):
    store.upload(checkpoint(tmp_path / "a", 1), "1")
    other, seen = checkpoint(tmp_path / "b", 2), []
    send = store._send

    def watched(path, folder, name, *, digest):
        seen.append((name, s3.MANIFEST in store.files(folder)))
        send(path, folder, name, digest=digest)

    monkeypatch.setattr(store, "_send", watched)
    store.upload(other, "1")
    assert seen == [("random/rank0.json", False), ("weights.safetensors", False), (s3.MANIFEST, False)]


def test_removing_takes_the_manifest_first(store, tmp_path, monkeypatch):
    store.upload(checkpoint(tmp_path / "a", 1), "1")
    removed = []
    delete = store._client.delete_object
    monkeypatch.setattr(
        store._client, "delete_object", lambda **what: (removed.append(what["Key"].split("/")[-1]), delete(**what))
    )
    store.remove("1")
    assert removed[0] == s3.MANIFEST and len(removed) == 4


def test_an_object_changed_in_the_store_is_noticed(store, tmp_path):
    store.upload(checkpoint(tmp_path / "a", 1), "1")
    good = store._head("1", "config.py")["Metadata"]
    store._client.put_object(Bucket=store.address.bucket, Key="runs/a/1/config.py", Body=b"other = 1\n", Metadata=good)
    with pytest.raises(CheckpointDamagedError, match=r"runs/a/1/config\.py"):
        store.download("1", tmp_path / "back")
    assert "config.py" not in contents(tmp_path / "back")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a//b", "/etc/passwd"])
def test_unsafe_names_are_refused(store, tmp_path, name):
    store._client.put_object(Bucket=store.address.bucket, Key=f"runs/a/1/{name}", Body=b"x")
    with pytest.raises(CheckpointError, match="unsafe name"):
        store.download("1", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_small_objects(store):
    assert store.read("", ".lock") is None
    assert store.write("", ".lock", b"one", only_new=True)
    assert not store.write("", ".lock", b"two", only_new=True)
    assert store.read("", ".lock") == b"one"
    with pytest.raises(CheckpointError, match="3 bytes, 2 at most"):
        store.read("", ".lock", limit_bytes=2)
    store.remove_file("", ".lock")
    assert store.read("", ".lock") is None


def test_a_bucket_that_is_not_there_is_said_at_once(server, tmp_path):
    missing = store_at("{}:{}".format(*server), "nobody")
    with pytest.raises(CheckpointError, match=r"1 attempts.*make the bucket nobody"):
        missing.upload(checkpoint(tmp_path / "a", 1), "1")


def test_a_store_that_is_silent_is_an_error_with_its_address(tmp_path):
    silent = store_at("127.0.0.1:9", "b", transfers=s3.Transfers(attempts=2, wait_s=0.0, timeout_s=2.0))
    with pytest.raises(CheckpointError, match=r"s3://b/runs/a/.*2 attempts"):
        silent.files()


def test_without_endpoint_and_region_nothing_says_where(monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="AWS_ENDPOINT_URL or AWS_DEFAULT_REGION"):
        s3.S3Store(addresses.parse("boto3:s3://bucket/prefix"), environ=s3_server.KEYS)


def test_credentials_of_older_runs_are_found():
    assert s3.credentials({"ACCESS_KEY": "a", "SECRET_ACCESS_KEY": "b"})["aws_access_key_id"] == "a"
    assert s3.credentials({"S3_ACCESS_KEY_ID": "only half"}) == {}


def published_through_faults(server, tmp_path: Path, *, seed: int, saves: int) -> dict[str, int]:
    """Save again and again through a proxy that fails; whatever counts as a checkpoint must be one, and whole."""
    direct = store_at("{}:{}".format(*server), f"faulty{seed}")
    direct._client.create_bucket(Bucket=direct.address.bucket)
    with FaultProxy(server, seed=seed) as proxy:
        faulty = store_at(
            proxy.address,
            f"faulty{seed}",
            transfers=s3.Transfers(3, 0.0, 20.0, QUICK.multipart_bytes, QUICK.part_bytes, 1),
        )
        done = 0
        for number in range(saves):
            local = checkpoint(tmp_path / f"{seed}-{number}", number, big=number % 10 == 0)
            folder = f"snapshot/{number % 2}"
            for _ in range(100):  # a run would try again at its next save, or when it resumes
                try:
                    faulty.upload(local, folder)
                except CheckpointError:
                    if s3.MANIFEST in direct.files(folder):
                        whole_in_store(direct, folder, tmp_path / "check")
                    continue
                done += 1
                break
            assert whole_in_store(direct, folder, tmp_path / "check") == contents(local)
        assert done == saves
        back = tmp_path / f"{seed}-back"
        for _ in range(100):
            try:
                faulty.download(folder, back)
            except CheckpointDamagedError:
                raise
            except CheckpointError:
                continue
            break
        assert contents(back) == contents(local)
        for folder in ("snapshot/0", "snapshot/1"):
            direct.upload(tmp_path / f"{seed}-{saves - 1 - (saves - 1 + int(folder[-1])) % 2}", folder)
        assert "Uploads" not in direct._client.list_multipart_uploads(Bucket=direct.address.bucket)
        return proxy.counts


def whole_in_store(store: s3.S3Store, folder: str, scratch: Path) -> dict[str, bytes]:
    """What a reader gets who sees a manifest: all files of one and the same step."""
    shutil.rmtree(scratch, ignore_errors=True)
    store.download(folder, scratch)
    found = contents(scratch)
    step = json.loads(found[s3.MANIFEST])["step"]
    assert json.loads(found["random/rank0.json"])["step"] == step
    assert set(found["weights.safetensors"]) == {step % 256}
    assert set(found) == {"weights.safetensors", "random/rank0.json", "config.py", s3.MANIFEST}
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_saves_through_faults(server, tmp_path, seed):
    counts = published_through_faults(server, tmp_path, seed=seed, saves=6)
    assert sum(counts.values()) > 10


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_saves_through_faults(server, tmp_path):
    counts = published_through_faults(server, tmp_path, seed=3, saves=200)
    assert all(counts[fault] for fault in FAULTS)


def test_one_run_at_a_time_writes_a_prefix(store):
    first = StoreLock(store)
    try:
        with pytest.raises(CheckpointError, match=r"runs/a/ is in use by another run: process \d+"):
            StoreLock(store)
    finally:
        first.release()
    StoreLock(store).release()
    assert store.read("", ".lock") is None


@pytest.mark.parametrize("held", [b"{}", b"no json", b'{"host": "elsewhere", "pid": 1, "seen": 0}'])
def test_the_lock_of_a_dead_run_is_taken_over(store, held):
    store.write("", ".lock", held)
    StoreLock(store, clock=lambda: 1e9).release()


def test_what_a_killed_run_left_without_a_manifest_goes(store, tmp_path):
    storage = S3Storage(store, tmp_path)
    for name in ("7/weights-rank00000-00000.safetensors", "snapshot/1/optimizer-rank00001-00000.safetensors"):
        folder, _, file = name.rpartition("/")
        store.write(folder, file, b"half")
    store.write("mine", "notes.txt", b"kept")
    store.write("8", "weights-rank00000-00000.safetensors", b"whole")
    store.write("8", s3.MANIFEST, b"{}")
    (tmp_path / ".tmp-7-abcd").mkdir()
    said = storage.recover(tmp_path)
    assert len(said) == 3 and all("unfinished: removed" in line for line in said)
    assert set(store.files()) == {"mine/notes.txt", "8/weights-rank00000-00000.safetensors", f"8/{s3.MANIFEST}"}


def test_a_place_in_a_store_is_searched_by_names_and_brought_whole(store, tmp_path):
    store.upload(checkpoint(tmp_path / "5", 5), "5")
    place = StorePlace(store, tmp_path / "here")
    assert place.folder() is not None
    brought = place.bring(tmp_path / "here" / ".index" / "5")
    assert contents(brought) == contents(tmp_path / "5")
    (brought / "stale").write_text("of another checkpoint")
    assert contents(place.bring(tmp_path / "here" / ".index" / "5")) == contents(tmp_path / "5")
    with pytest.raises(CheckpointError, match="not there any more"):
        place.bring(tmp_path / "here" / ".index" / "6")
