"""`--update-snapshots`: rewrite the stored outputs instead of comparing with them (on this folder)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", default=False, help="rewrite stored outputs")


@pytest.fixture
def same_as_stored(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compares a text with a file byte for byte, or stores it under `--update-snapshots`."""

    def check(path: Path, text: str) -> None:
        if request.config.getoption("--update-snapshots", default=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("utf-8"))
        assert path.exists(), f"{path} is not stored yet: run pytest tests/snapshots --update-snapshots"
        assert path.read_bytes().decode("utf-8") == text

    return check
