"""Where golden cases are found. A kind is a folder; what a case of it is, its README says.

The folder is `$INTERNLM_DS_GOLDEN`, by default `shared/golden` beside the checkout; tokenizer models lie under
`$INTERNLM_DS_TOKENIZERS`, by default `shared/tokenizers`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_SHARED = Path(__file__).resolve().parents[3] / "shared"


def golden_root() -> Path:
    return Path(os.environ.get("INTERNLM_DS_GOLDEN", _SHARED / "golden"))


def golden(kind: str) -> Path:
    """The folder of a kind; skips the test with a reason where it is absent."""
    folder = golden_root() / kind
    if not folder.is_dir():
        pytest.skip(f"no golden data of kind {kind!r}: {folder} does not exist (set INTERNLM_DS_GOLDEN)")
    return folder


def tokenizers() -> Path:
    """The folder of sentencepiece models; skips where it is absent."""
    folder = Path(os.environ.get("INTERNLM_DS_TOKENIZERS", _SHARED / "tokenizers"))
    if not folder.is_dir():
        pytest.skip(f"no tokenizer models: {folder} does not exist (set INTERNLM_DS_TOKENIZERS)")
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def entries(kind: str, file_name: str) -> list[Any]:
    """Entries of a JSON list of a kind; a list without entries fails the test, a missing file skips it."""
    path = golden(kind) / file_name
    if not path.exists():
        pytest.skip(f"no {file_name} among the golden data of kind {kind!r}")
    found = read_json(path)
    assert found, f"{path} holds no case"
    return list(found)


def case_folders(kind: str, marker: str) -> list[Path]:
    """Folders of a kind that hold a file `marker`, for parametrisation; [] where the kind is absent."""
    root = golden_root() / kind
    return sorted(path.parent for path in root.rglob(marker)) if root.is_dir() else []
