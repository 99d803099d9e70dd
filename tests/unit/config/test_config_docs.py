"""The reference page names every key."""

from __future__ import annotations

import re
from pathlib import Path

from internlm_ds.config.keys import all_keys

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "configuration.md"


def test_every_key_is_in_the_reference() -> None:
    words = set(re.findall(r"`([^`\n]+)`", PAGE.read_text(encoding="utf-8")))
    suffixes = {word: {word, *(f"{section}.{word}" for section in _sections())} for word in words}
    named = set().union(*suffixes.values())
    assert [key for key in all_keys() if key not in named] == []


def _sections() -> set[str]:
    return {key.partition(".")[0] for key in all_keys() if "." in key}
