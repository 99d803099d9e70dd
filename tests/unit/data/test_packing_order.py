"""The order of packing on disk: the same as made on the spot, noticed when stale, shared, and never needed."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from internlm_ds.data import binmeta, cachefile, kernels
from internlm_ds.data.bintext import BinText
from internlm_ds.data.metarows import MetaRows, Order
from internlm_ds.data.samples import FileSamples
from internlm_ds.errors import DataFormatError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return write_bin(tmp_path / "en" / "x.bin", range(50))


def write_bin(path: Path, samples: range, *, overwrite: bool = False) -> str:
    with binmeta.Writer(path, overwrite=overwrite) as writer:
        for number in samples:
            writer.write([number + 1] * (number % 7))
    return str(path)


def _order(path: str, *, min_length: int = 0, cached: bool = True, seed: int = 1024) -> Order:
    rows = MetaRows(path, min_length=min_length, seed=seed, samples_to_cache=1 if cached else 10**9)
    return rows.in_packing_order


def _same(left: Order, right: Order) -> bool:
    return all(getattr(left, name).tolist() == getattr(right, name).tolist() for name in ("rows", "offsets", "ends"))


@pytest.mark.parametrize("min_length", [0, 3])
def test_a_cached_order_is_the_order(path: str, min_length: int) -> None:
    made = _order(path, min_length=min_length, cached=False)
    assert made.cache is None
    for _ in range(2):
        found = _order(path, min_length=min_length)
        assert found.cache is not None and os.path.basename(found.cache.path) == f".x.bin.order-{min_length}"
        assert _same(found, made)
    offsets, lengths = binmeta.read_meta(path)
    kept = np.flatnonzero(lengths >= min_length)
    shuffled = np.arange(len(kept))
    np.random.RandomState(1024).shuffle(shuffled)
    assert made.rows.tolist() == kept[shuffled].tolist()
    assert made.offsets.tolist() == offsets[made.rows].tolist()
    assert np.diff(made.ends, prepend=0).tolist() == lengths[made.rows].tolist()


def test_what_is_known_is_not_read_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = MetaRows(path, min_length=2, samples_to_cache=1)
    assert not first.is_cached and first.in_packing_order.cache is not None
    monkeypatch.setattr("internlm_ds.data.metarows._Table.read", lambda *args, **kwargs: pytest.fail("read"))
    again = MetaRows(path, min_length=2)
    assert again.is_cached and again.counts == first.counts and _same(again.in_packing_order, first.in_packing_order)


def _meta_in_other_order(path: str) -> None:
    table = np.load(f"{path}.meta")
    with open(f"{path}.meta", "wb") as file:
        np.save(file, table[::-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda path: write_bin(Path(path), range(60), overwrite=True),
        lambda path: write_bin(Path(path), range(50), overwrite=True),
        _meta_in_other_order,
        lambda path: os.truncate(os.path.join(os.path.dirname(path), ".x.bin.order-0"), 700),
        lambda path: Path(os.path.dirname(path), ".x.bin.order-0").write_bytes(b"no cache"),
        lambda path: Path(os.path.dirname(path), ".x.bin.order-0").write_bytes(b"null\n"),
    ],
)
def test_a_stale_or_broken_cache_is_made_anew(path: str, change: Callable[[str], object]) -> None:
    _order(path)
    change(path)
    found = _order(path)
    assert found.cache is not None and _same(found, _order(path, cached=False))
    assert MetaRows(path, min_length=0).is_cached


def test_another_seed_is_another_order(path: str) -> None:
    assert not _same(_order(path), _order(path, seed=7))
    assert _same(_order(path), _order(path, cached=False))


def test_a_copy_with_new_times_is_known_by_its_content(path: str, tmp_path: Path) -> None:
    _order(path)
    os.utime(f"{path}.meta", ns=(5, 5))
    assert MetaRows(path, min_length=0).is_cached
    os.utime(path, ns=(5, 5))
    assert not MetaRows(path, min_length=0).is_cached  # of a bin nobody reads the content


def _read_only(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Refuse to write below these folders (file modes do not stop the superuser)."""
    write = cachefile.write

    def refusing(path: str, *args: object) -> None:
        if any(Path(path).is_relative_to(folder) for folder in folders):
            raise PermissionError(13, "Permission denied", path)
        write(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(cachefile, "write", refusing)


def test_read_only_folders_have_their_cache_elsewhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _read_only(monkeypatch, tmp_path / "en")
    found = _order(path)
    assert found.cache is not None and Path(found.cache.path).is_relative_to(tmp_path / "home" / "internlm_ds")
    assert MetaRows(path, min_length=0).is_cached and sorted(os.listdir(tmp_path / "en")) == ["x.bin", "x.bin.meta"]


def test_without_any_place_the_order_stays_in_memory(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _order(path, cached=False)
    _read_only(monkeypatch, tmp_path)
    found = _order(path)
    assert found.cache is None and _same(found, wanted)


def test_small_files_leave_nothing_behind(path: str, tmp_path: Path) -> None:
    MetaRows(path, min_length=0).in_packing_order  # noqa: B018
    assert sorted(os.listdir(tmp_path / "en")) == ["x.bin", "x.bin.meta"]


def test_many_who_open_at_once_make_it_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = cachefile.write
    monkeypatch.setattr(cachefile, "write", lambda place, *args: (written.append(place), write(place, *args)))
    start, found = threading.Barrier(6), []

    def opened() -> None:
        rows = MetaRows(path, min_length=0, samples_to_cache=1)
        start.wait(10)
        found.append(rows.in_packing_order)

    threads = [threading.Thread(target=opened) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6 and all(_same(order, _order(path, cached=False)) for order in found)
    assert len(written) == 1


def test_a_failed_write_leaves_nothing(path: str, tmp_path: Path) -> None:
    def pieces() -> object:
        yield np.arange(2)
        raise OSError(28, "No space left on device")

    spec = cachefile.ArraySpec("<i8", 4, pieces())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        cachefile.write(str(tmp_path / "cache"), {}, {"x": spec})
    assert not [name for name in os.listdir(tmp_path) if name.startswith("cache")]


def test_the_kernel_takes_mapped_orders(path: str) -> None:
    samples = [FileSamples(BinText(path), _order(path, cached=cached)) for cached in (True, False)]
    wanted = samples[1].read_span(2, 40).tolist()
    assert kernels.load() is not None
    assert [each.read_span(2, 40).tolist() for each in samples] == [wanted, wanted]


def test_mapped_samples_travel_as_a_path(path: str) -> None:
    samples = FileSamples(BinText(path), _order(path))
    sent = pickle.dumps(samples)
    assert len(sent) < 1000
    copied = pickle.loads(sent)
    assert copied.read_span(3, 30).tolist() == samples.read_span(3, 30).tolist()


def test_metas_of_other_shapes_are_read_whole(path: str, tmp_path: Path) -> None:
    wanted = _order(path, cached=False)
    table = np.load(f"{path}.meta")
    for other in (np.asfortranarray(table), table.astype(np.int32), table.astype(">i8"), table[:, [0, 0, 1]]):
        with open(f"{path}.meta", "wb") as file:
            np.save(file, other)
        assert _same(_order(path, cached=False), wanted)


def test_faults_are_named_whatever_was_cached(path: str) -> None:
    _order(path)
    shutil.copyfile(path, f"{path}.whole")
    os.truncate(path, os.path.getsize(path) - 3)
    with pytest.raises(DataFormatError, match=r"x\.bin, line 50, .*torn or damaged"):
        _order(path)
    os.unlink(f"{path}.meta")
    with pytest.raises(DataFormatError, match=r"the meta file .* is missing"):
        _order(path)
    os.unlink(path)
    with pytest.raises(DataFormatError, match="no such bin file"):
        _order(path)
