"""From a pack's number to the arrays of a micro-batch, the fast way where there is one.

With the kernel loaded, a pack of a stream packer becomes a micro-batch in two calls: rows to numbers, numbers to
tokens, labels, borders and types. Everything else goes through `packing.Pack` and `collate`, which are also the oracle
of the fast way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internlm_ds.data import kernels
from internlm_ds.data.collate import BatchStats, MicroBatchArrays, micro_batch_arrays, row_arrays
from internlm_ds.data.packing import Concatenation, FixedSegmentPacker, PackSource, StreamPacker
from internlm_ds.data.samples import FileSamples

TOKENS_FOR_KERNELS = 20_000_000

# segments of a micro-batch, tokens of the longest, tokens in all
Counts = tuple[int, int, int]


def micro_batch(
    packs: PackSource, index: int, *, rows: int | None = None, seq_len: int = 0
) -> tuple[MicroBatchArrays, Counts]:
    """The arrays of pack `index`, and what statistics need of it.

    Args:
        packs: One packer, or several behind one another.
        rows, seq_len: Lay the pack out in so many rows of `seq_len` (unpacked data); None leaves it flat.
    Raises:
        DataFormatError: A row cannot be read, see `bintext.BinText.read`.
        IndexError: There is no such pack.
    """
    if isinstance(packs, Concatenation):
        packs, index = packs.locate(index)
    if rows is None and isinstance(packs, StreamPacker) and kernels.loaded() is not None:
        return _laid_out(packs, index)
    pack = packs[index]
    segments = np.diff(pack.cu_seqlens)
    arrays = micro_batch_arrays(pack) if rows is None else row_arrays(pack, rows=rows, seq_len=seq_len)
    return arrays, (len(segments), int(segments.max()), len(pack.labels))


def stats_of(counts: Sequence[Counts]) -> BatchStats:
    """Statistics of the micro-batches of a step; those of `BatchStats.of` for the same packs."""
    segments = [each[0] for each in counts]
    return BatchStats(
        num_samples=sum(segments),
        largest_length=max((each[1] for each in counts), default=0),
        largest_batch=max(segments, default=0),
        smallest_batch=min(segments, default=0),
        num_packs=len(counts),
        num_tokens=sum(each[2] for each in counts),
    )


def worth_compiling(packs: Concatenation) -> bool:
    """Files hold so many tokens that numba's start (half a second, more the first time) pays in an epoch."""
    from_files = [part for part in packs.parts if isinstance(getattr(part, "samples", None), FileSamples)]
    return sum(len(part) * part.packed_length for part in from_files) >= TOKENS_FOR_KERNELS  # type: ignore[attr-defined]


def _laid_out(packer: StreamPacker, index: int) -> tuple[MicroBatchArrays, Counts]:
    kernel = kernels.loaded()
    assert kernel is not None
    span, total = packer.span(index), packer.packed_length
    signed = packer.samples.read_span(span.first, span.stop)
    tokens, labels, types = (np.empty(total, dtype=np.int64) for _ in range(3))
    borders = np.empty(total + 1, dtype=np.int32)
    fixed, type_id = isinstance(packer, FixedSegmentPacker), packer.samples.type_id
    segments, longest = kernel.lay_out(
        signed, packer.lengths(span), span.skip, packer.seq_len, fixed, type_id, tokens, borders, labels, types
    )
    return MicroBatchArrays(tokens, borders, labels, types), (segments, longest, total)
