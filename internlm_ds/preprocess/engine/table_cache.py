"""Tables of models kept on disk: one file a model, under the user's cache folder. Never an error, at worst slower.

The name holds the model's sha256 and a digest of the code that makes tables; a file that cannot be read is made again,
one that cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from internlm_ds.preprocess.engine.tables import Tables


def cache_folder(environ: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/internlm-ds`, by default `~/.cache/internlm-ds`."""
    base = environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else os.path.expanduser("~/.cache")) / "internlm-ds"


def load_or_build(sha256: str, build: Callable[[], Tables], *, folder: Path) -> Tables:
    """Tables from `folder`, or built and put there."""
    path = folder / f"tables-{sha256[:32]}-{_code_digest()}.npz"
    found = _load(path)
    if found is None:
        found = build()
        _store(found, path)
    return found


def _code_digest() -> str:
    """Other code may make other tables."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("model_file.py", "tables.py")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def _load(path: Path) -> Tables | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Tables(**{name: stored[name] for name in Tables._fields})
    except Exception:  # missing, cut, not ours: what numpy and zipfile raise then is no closed list
        return None


def _store(tables: Tables, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **tables._asdict())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError:
        pass  # a full or read-only disk: the next run builds again
