"""Which older checkpoints of a run go when a new one is there: `internlm_ds.keep_checkpoints`.

Only native checkpoints that a run saved under their step count are ever removed, and only behind enough good ones that
are newer; snapshots, foreign folders and what is damaged stay.
"""

from __future__ import annotations

import logging
from pathlib import Path

from internlm_ds.checkpoint.storage.base import Storage
from internlm_ds.checkpoint.storage.local import LocalStorage
from internlm_ds.errors import CheckpointError

log = logging.getLogger(__name__)


def remove_older(folder: Path, *, newest: int, keep: int, storage: Storage | None = None) -> list[Path]:
    """Remove checkpoints of a save folder beyond the last `keep`, that of step `newest` included.

    Steps above `newest` (of a run that went further, and was taken up earlier) are left alone and do not count.

    Args:
        keep: 0 keeps all.
        storage: Where the folder lies; None: on a disk.
    Returns:
        What was removed. What cannot be is a warning: the new checkpoint is good all the same.
    """
    if keep == 0:
        return []
    storage = storage or LocalStorage()
    steps = sorted((int(name) for name in storage.published(folder) if name.isdigit()), reverse=True)
    good = [step for step in steps if step <= newest]
    removed = []
    for step in good[keep:]:
        path = folder / str(step)
        try:
            storage.discard(path)
        except (OSError, CheckpointError) as error:
            log.warning("%s is older than the last %d checkpoints but cannot be removed: %s", path, keep, error)
        else:
            removed.append(path)
    return removed
