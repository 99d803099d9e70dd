"""The small model's tables, built once, in a cache folder of the tests' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm_ds.preprocess.engine import model_file
from internlm_ds.preprocess.engine.tables import build


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    # one for the whole session: the kernel is compiled once
    return tmp_path_factory.getbasetemp() / "engine-cache"


@pytest.fixture(autouse=True)
def own_cache(cache_home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture(scope="session")
def parsed(tiny_model):
    return model_file.parse(Path(tiny_model).read_bytes())


@pytest.fixture(scope="session")
def tables(parsed):
    return build(parsed)
