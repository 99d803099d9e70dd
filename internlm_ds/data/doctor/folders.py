"""Which bins lie below a path, and whether their folders are named as training reads them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence

from internlm_ds.data.catalog import walk_bins
from internlm_ds.data.doctor.findings import Finding
from internlm_ds.errors import DataFormatError

DATA_TYPES = ("cn", "en", "code", "ja", "ar", "kaoshi")
SHARES = ("train", "valid")


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


def check_names(folder: str, bins: Sequence[str]) -> Iterator[Finding]:
    """Bins that lie in no type's folder, and folders that are none of the six types.

    `folder` may be a data set (`en/…`), one type of it, or what the SFT tools write (`train/en/…`, `valid/en/…`).
    """
    if os.path.basename(os.path.abspath(folder)) in (*DATA_TYPES, "valid"):
        return
    seen = set()
    for path in bins:
        above = os.path.relpath(path, folder).split(os.sep)[:-1]
        above = above[1:] if above[:1] and above[0] in SHARES else above
        if not above:
            yield Finding("no-type-folder", path, "it lies in no folder named after a data type")
        elif above[0] not in DATA_TYPES and above[0] not in seen:
            seen.add(above[0])
            near = difflib.get_close_matches(above[0], DATA_TYPES, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(DATA_TYPES)
            yield Finding("unknown-type", path, f"the type {above[0]!r} is none of {known}{guess}")
