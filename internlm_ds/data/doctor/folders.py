"""Which bins lie below a path, whether their folders are named as training reads them, and what lies beside them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence

from internlm_ds.data.catalog import walk_bins
from internlm_ds.data.doctor.findings import Finding
from internlm_ds.errors import DataFormatError

DATA_TYPES = ("cn", "en", "code", "ja", "ar", "kaoshi")
SHARES = ("train", "valid")
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")


def bins_below(path: str) -> list[str]:
    """The bin itself, or the bins below a folder in the order of training.

    Raises:
        DataFormatError: There is none.
    """
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise DataFormatError("no such file or folder", path=path)
        return [path]
    found = [os.path.join(root, name) for root, names in walk_bins(path, key="PATH") for name in names]
    if not found:
        raise DataFormatError("no .bin file in this folder or below it", path=path)
    return found


def check_folder(folder: str, bins: Sequence[str], *, typed: bool = True) -> Iterator[Finding]:
    """What is wrong around the bins of a folder.

    Args:
        typed: Its folders are to be named after types; those of validation sets may have any name.
    """
    if typed:
        yield from check_names(folder, bins)
    for root, _ in walk_bins(folder, key="PATH"):
        names = set(os.listdir(root))
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.endswith(".bin.meta") and name.removesuffix(".meta") not in names and not name.startswith("."):
                yield Finding("meta-orphan", path, f"{name.removesuffix('.meta')} does not exist")
            elif name.startswith(".") and name.endswith(".bin.partial"):
                yield Finding("unfinished", path, f"{name[1:].removesuffix('.partial')} is not whole yet")
            elif _looks_like_a_bin(name) and not os.path.isdir(path):
                yield Finding("ignored-file", path, "the name does not end in .bin")


def check_names(folder: str, bins: Sequence[str]) -> Iterator[Finding]:
    """Bins that lie in no type's folder, and folders that are none of the six types.

    `folder` may be a data set (`en/…`), one type of it, or what the SFT tools write (`train/en/…`, `valid/en/…`).
    A folder named `valid` may hold bins directly: there a set may have any name.
    """
    own = os.path.basename(os.path.abspath(folder))
    seen = set()
    for path in bins:
        above = os.path.relpath(path, folder).split(os.sep)[:-1]
        share = above.pop(0) if above and above[0] in SHARES else own
        if own in DATA_TYPES or share == "valid":
            continue
        if not above:
            yield Finding("no-type-folder", path, "it lies in no folder named after a data type")
        elif above[0] not in DATA_TYPES and above[0] not in seen:
            seen.add(above[0])
            near = difflib.get_close_matches(above[0], DATA_TYPES, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            yield Finding("unknown-type", path, f"{above[0]!r} is none of {', '.join(DATA_TYPES)}{guess}")


def type_below(folder: str, path: str) -> str:
    """The type of a bin below a folder, with its share if it lies in one.

    >>> type_below("out", "out/train/en/a.bin"), type_below("data/en", "data/en/a.bin")
    ('train/en', 'en')
    """
    own = os.path.basename(os.path.abspath(folder if folder != path else os.path.dirname(path)))
    above = os.path.relpath(path, folder).split(os.sep)[:-1]
    if own in DATA_TYPES or not above or folder == path:
        return own
    return "/".join(above[:2]) if above[0] in SHARES else above[0]


def _looks_like_a_bin(name: str) -> bool:
    stem, ending = os.path.splitext(name.lower())
    return not name.startswith(".") and (
        (ending == ".bin" and not name.endswith(".bin")) or (ending in _PACKED and stem.endswith(".bin"))
    )
