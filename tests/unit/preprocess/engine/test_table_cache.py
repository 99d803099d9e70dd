"""Tables on disk: reused, rebuilt when damaged, never an error."""

from __future__ import annotations

import numpy as np
import pytest

from internlm_ds.preprocess.engine.table_cache import cache_folder, load_or_build


def never():
    raise AssertionError("was built although it is stored")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_stored_once_and_read_after(tables, tmp_path):
    assert same(load_or_build("ab" * 32, lambda: tables, folder=tmp_path / "new"), tables)
    assert same(load_or_build("ab" * 32, never, folder=tmp_path / "new"), tables)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_made_again(tables, tmp_path, damage):
    load_or_build("ab" * 32, lambda: tables, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    path.write_bytes({"empty": b"", "other": b"something else"}.get(damage, bytes(content)))
    assert same(load_or_build("ab" * 32, lambda: tables, folder=tmp_path), tables)
    assert same(load_or_build("ab" * 32, never, folder=tmp_path), tables)


def test_an_unwritable_folder_is_no_error(tables, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert same(load_or_build("ab" * 32, lambda: tables, folder=tmp_path / "file" / "below"), tables)


def test_where_the_folder_is():
    assert str(cache_folder({"XDG_CACHE_HOME": "/somewhere"})) == "/somewhere/internlm-ds"
    for environ in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert str(cache_folder(environ)).endswith("/.cache/internlm-ds")
