"""Publishing a folder is one step, with and without the system call that exchanges two."""

from __future__ import annotations

import pytest

from internlm_ds.checkpoint.storage import local
from internlm_ds.checkpoint.storage.local import LocalStorage


def make(storage, final, text):
    folder = storage.make_temporary(final)
    (folder / "x").write_text(text)
    return folder


@pytest.mark.parametrize("can_exchange", [True, False])
def test_publish_replaces_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(local, "exchange", lambda first, second: False)
    storage, final = LocalStorage(), tmp_path / "run" / "5"
    for text in ("old", "new"):
        storage.publish(make(storage, final, text), final)
        assert (final / "x").read_text() == text
        assert [path.name for path in final.parent.iterdir()] == ["5"]


def test_a_replacement_that_died_half_way_is_undone(tmp_path):
    storage = LocalStorage()
    (tmp_path / ".replaced-5-ab12").mkdir()
    (tmp_path / ".replaced-5-ab12" / "x").write_text("old")
    make(storage, tmp_path / "5", "new")
    words = storage.recover(tmp_path)
    assert (tmp_path / "5" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    assert "being replaced when its writer died" in words[0] and "was unfinished: removed" in words[1]


def test_leftover_of_a_finished_replacement_goes(tmp_path):
    (tmp_path / "5").mkdir()
    (tmp_path / ".replaced-5-ab12").mkdir()
    assert LocalStorage().recover(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_exchange_of_a_missing_folder_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        local.exchange(tmp_path / "a", tmp_path / "b")
