"""The slow obvious packings, token by token on lists: what the tests hold `packing` against.

Nothing here is used in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internlm_ds.data.metarows import PACKING_SEED
from internlm_ds.data.packing import IGNORED, Pack


def pack_stream(
    samples: Sequence[Sequence[int]], index: int, *, packed_length: int, seq_len: int, type_id: int, fixed: bool
) -> Pack:
    """Pack `index` of `SegmentPacker`, or of `FixedSegmentPacker` if `fixed`."""
    stream = [(number, place) for number in _order(len(samples)) for place in range(len(samples[number]))]
    window = stream[index * packed_length : (index + 1) * packed_length]
    tokens, labels, borders, begin = [], [], [0], 0
    for at, (number, place) in enumerate(window):
        if at and number != window[at - 1][0]:
            begin = at
        if at and (at - begin) % seq_len == 0:
            borders.append(at)
        following = (number, place + 1)
        is_known = place + 1 < len(samples[number]) and (not fixed or following in window)
        tokens.append(samples[number][place])
        labels.append(samples[number][place + 1] if is_known else IGNORED)
    borders.append(packed_length)
    if fixed:
        borders = list(range(0, packed_length + 1, seq_len))
    return _as_pack(tokens, labels, borders, [type_id] * packed_length)


def pack_rows(samples: Sequence[Sequence[int]], index: int, *, packed_length: int, seq_len: int, type_id: int) -> Pack:
    """Pack `index` of `PaddedBatcher`."""
    rows = packed_length // seq_len
    tokens: list[int] = []
    labels: list[int] = []
    borders = [0]
    for number in _order(len(samples))[index * rows : (index + 1) * rows]:
        row = list(samples[number][:seq_len])
        if row:
            tokens += row
            labels += [*row[1:], IGNORED]
            borders.append(len(tokens))
    missing = packed_length - len(tokens)
    types = [type_id] * len(tokens) + [0] * missing
    if missing:
        borders.append(packed_length)
    return _as_pack(tokens + [0] * missing, labels + [0] * missing, borders, types)


def _order(count: int) -> list[int]:
    order = list(range(count))
    as_array = np.array(order)
    np.random.RandomState(PACKING_SEED).shuffle(as_array)
    return [int(number) for number in as_array]


def _as_pack(tokens: list[int], labels: list[int], borders: list[int], types: list[int]) -> Pack:
    return Pack(
        np.array(tokens, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array(borders, dtype=np.int32),
        np.array(types, dtype=np.int64),
    )
