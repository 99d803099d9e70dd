"""The last step from packs and samples to numbers a model takes: unsigned tokens, labels, rows, padded borders.

Functions on numpy arrays. `packed_collate` and `jsonl_collate` give what InternLM's functions of these names give
(tests compare them with the reference); `micro_batch_arrays` and `row_arrays` give the flat form in which our engine
takes a micro-batch. Making tensors of it is `loader`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm_ds.data.binmeta import IntArray, split_signed_tokens
from internlm_ds.data.packing import IGNORED, BorderArray, Pack


@dataclass(frozen=True)
class BatchStats:
    """What the log says of the data of a step, on this rank.

    Attributes:
        num_samples: Segments in all micro-batches.
        largest_length: Tokens of the longest segment.
        largest_batch, smallest_batch: Most and fewest segments of a micro-batch.
        num_packs: Micro-batches.
        num_tokens: Tokens, padding included.
    """

    num_samples: int
    largest_length: int
    largest_batch: int
    smallest_batch: int
    num_packs: int
    num_tokens: int

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> BatchStats:
        """Statistics of packs; of unpacked data before it is laid out in rows, as InternLM counts."""
        segments = [len(pack.cu_seqlens) - 1 for pack in packs]
        return cls(
            num_samples=sum(segments),
            largest_length=max((int(np.diff(pack.cu_seqlens).max()) for pack in packs), default=0),
            largest_batch=max(segments, default=0),
            smallest_batch=min(segments, default=0),
            num_packs=len(packs),
            num_tokens=sum(len(pack.labels) for pack in packs),
        )


@dataclass(frozen=True)
class MicroBatchArrays:
    """A micro-batch as the engine takes it; T tokens.

    Attributes:
        tokens: int64 `(T,)`, all >= 0.
        cu_seqlens: int32 `(T + 1,)`, borders of segments, padded by repeating T: one shape whatever the samples.
        labels: int64 `(T,)`, -100 where nothing is to be learned.
        type_ids: int64 `(T,)`.
    """

    tokens: IntArray
    cu_seqlens: BorderArray
    labels: IntArray
    type_ids: IntArray


def input_ids(tokens: IntArray) -> IntArray:
    """Tokens without their sign."""
    return split_signed_tokens(tokens)[0]


def visible_labels(labels: IntArray) -> IntArray:
    """Labels that count; zero, negative and missing ones are -100.

    >>> visible_labels(np.array([5, -7, 0, -100])).tolist()
    [5, -100, -100, -100]
    """
    values, counts = split_signed_tokens(labels)
    return np.where(counts, values, IGNORED)


def pad_borders(cu_seqlens: BorderArray, total: int) -> BorderArray:
    """Borders at the fixed length `total + 1`; empty segments at the end.

    >>> pad_borders(np.array([0, 1, 4]), 4).tolist()
    [0, 1, 4, 4, 4]
    """
    padded = np.full(total + 1, total, dtype=np.int32)
    padded[: len(cu_seqlens)] = cu_seqlens
    return padded


def micro_batch_arrays(pack: Pack) -> MicroBatchArrays:
    """A pack as it is: one flat row with its own borders."""
    return MicroBatchArrays(
        tokens=input_ids(pack.tokens),
        cu_seqlens=pad_borders(pack.cu_seqlens, len(pack.tokens)),
        labels=visible_labels(pack.labels),
        type_ids=pack.type_ids,
    )


def row_arrays(pack: Pack, *, rows: int, seq_len: int) -> MicroBatchArrays:
    """A pack of `PaddedBatcher` with each sample in a row of `seq_len`, rows behind one another.

    Nothing is learned behind the end of a row (the reference trains towards token 0 there).
    """
    tokens, labels, types = (
        unpack(values, pack.cu_seqlens, rows=rows, seq_len=seq_len, fill=fill).ravel()
        for values, fill in ((input_ids(pack.tokens), 0), (visible_labels(pack.labels), IGNORED), (pack.type_ids, 0))
    )
    return MicroBatchArrays(tokens, fixed_borders(rows, seq_len), labels, types)


def fixed_borders(rows: int, seq_len: int) -> BorderArray:
    """Padded borders of rows of equal length.

    >>> fixed_borders(2, 3).tolist()
    [0, 3, 6, 6, 6, 6, 6]
    """
    return pad_borders(np.arange(0, rows * seq_len + 1, seq_len, dtype=np.int32), rows * seq_len)


def unpack(values: IntArray, cu_seqlens: BorderArray, *, rows: int, seq_len: int, fill: int) -> IntArray:
    """The first `rows` segments of a pack as a table `(rows, seq_len)`, `fill` behind short ones and in missing rows.

    A segment longer than `seq_len` is the padding at the end of the pack (samples are cut to `seq_len`): its row
    stays empty.
    """
    table = np.full((rows, seq_len), fill, dtype=np.int64)
    for row in range(min(rows, len(cu_seqlens) - 1)):
        start, stop = int(cu_seqlens[row]), int(cu_seqlens[row + 1])
        if stop - start <= seq_len:
            table[row, : stop - start] = values[start:stop]
    return table


def packed_collate(packs: Sequence[Pack]) -> tuple[dict[str, Any], IntArray]:
    """A batch of packs as InternLM's loader gives it: (input_ids, cu_seqlens, indexes, type_ids), labels.

    Tables are int64 `(packs, P)`; `cu_seqlens` is one int32 table if all have as many segments, else a list.

    Source: InternEvo `packed_collate_fn`.
    """
    borders = [pack.cu_seqlens for pack in packs]
    equal = len({len(each) for each in borders}) == 1
    inputs = {
        "input_ids": np.stack([input_ids(pack.tokens) for pack in packs]),
        "cu_seqlens": np.stack(borders) if equal else borders,
        "indexes": np.stack([pack.indexes for pack in packs]),
        "type_ids": np.stack([pack.type_ids for pack in packs]),
    }
    return inputs, np.stack([visible_labels(pack.labels) for pack in packs])


def jsonl_collate(samples: Sequence[Sequence[int] | IntArray], *, max_length: int) -> tuple[IntArray, IntArray]:
    """Samples as rows: input_ids and labels, int64 `(samples, max_length)`, padded with 0 and -100.

    Labels are the next token of the row; its last token has none, also where the sample was cut.

    Source: InternEvo `jsonl_ds_collate_fn`.
    """
    inputs = np.zeros((len(samples), max_length), dtype=np.int64)
    labels = np.full((len(samples), max_length), IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        signed = np.asarray(sample, dtype=np.int64)[:max_length]
        inputs[row, : len(signed)] = input_ids(signed)
        labels[row, : max(len(signed) - 1, 0)] = visible_labels(signed[1:])
    return inputs, labels
