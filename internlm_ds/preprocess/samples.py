"""From segments to the samples of a bin: bos and eos, the limit on length, and a count of all that was left out.

Nothing is shortened in silence: what is dropped, cut, split or has nothing to learn is in the `Tally`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.segments import Segment, num_ids, num_learned

TooLong = Literal["drop", "cut", "split"]
WAYS: tuple[TooLong, ...] = ("drop", "cut", "split")


@dataclass(frozen=True)
class Limit:
    """How many tokens a sample may have, bos and eos counted, and what becomes of a longer one.

    Attributes:
        max_tokens: None for no limit.
        too_long: "drop" leaves the sample out; "cut" keeps its beginning and ends it with eos; "split" makes several
            samples of it, each with bos and eos of its own, between exchanges where that is possible.

    Raises:
        DataFormatError: There is no room for a token between bos and eos.
    """

    max_tokens: int | None = None
    too_long: TooLong = "cut"

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 3:
            raise DataFormatError(f"--max-tokens {self.max_tokens}: a sample needs 3 tokens at least, such as 2048")


class Piece(NamedTuple):
    """All of a body or a part of it; `whole`: it ends where an exchange ends."""

    segments: list[Segment]
    whole: bool


@dataclass(frozen=True)
class Frame:
    """What stands around a body.

    Attributes:
        bos, eos: One id, or none. The eos is learned behind a whole answer: behind a question, or in the middle of an
            answer, there is no reason to stop. A sample with nothing else to learn is left out.
        reference: The eos is learned always, and every sample is kept.
    """

    bos: tuple[int, ...]
    eos: tuple[int, ...]
    reference: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.bos) + len(self.eos)

    def around(self, piece: Piece) -> list[Segment]:
        answered = piece.whole and bool(piece.segments) and piece.segments[-1].learned
        return [Segment(self.bos, True), *piece.segments, Segment(self.eos, answered or self.reference)]


@dataclass
class Tally:
    """What became of the samples of one output; `truncated` are those that were cut."""

    samples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0
    split: int = 0
    split_parts: int = 0
    unlearned: int = 0
    unlearned_tokens: int = 0

    def counts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def finished(body: Sequence[Segment], *, frame: Frame, limit: Limit, tally: Tally) -> Iterator[list[Segment]]:
    """The samples, none to many, that become of a body; counted in `tally`."""
    room = None if limit.max_tokens is None else limit.max_tokens - frame.num_tokens
    total = num_ids(body)
    pieces = [Piece(list(body), True)]
    if room is not None and total > room:
        if limit.too_long == "drop":
            tally.dropped += 1
            tally.dropped_tokens += total + frame.num_tokens
            return
        if limit.too_long == "cut":
            pieces = [Piece(cut(body, room), False)]
            tally.truncated += 1
            tally.truncated_tokens += total - room
        else:
            pieces = list(split(body, room))
            tally.split += 1
            tally.split_parts += len(pieces)
    for piece in pieces:
        sample = frame.around(piece)
        if not (frame.reference or num_learned(piece.segments)):
            tally.unlearned += 1
            tally.unlearned_tokens += num_ids(sample)
            continue
        tally.samples += 1
        tally.tokens += num_ids(sample)
        # the first token of a sample is never a target
        tally.learned_tokens += num_learned(sample) - bool(frame.bos)
        yield sample


def cut(body: Sequence[Segment], room: int) -> list[Segment]:
    """The first `room` tokens.

    >>> cut([Segment([1, 2], False), Segment([3, 4], True)], 3)
    [Segment(ids=[1, 2], learned=False), Segment(ids=[3], learned=True)]
    """
    kept = []
    for segment in body:
        if room <= 0:
            break
        kept.append(Segment(segment.ids[:room], segment.learned))
        room -= len(segment.ids)
    return kept


def split(body: Sequence[Segment], room: int) -> Iterator[Piece]:
    """Pieces of at most `room` tokens that hold all tokens in order.

    As many exchanges go together as fit; one that does not fit on its own is cut every `room` tokens.
    """
    part: list[Segment] = []
    for exchange in exchanges(body):
        if num_ids(part) + num_ids(exchange) > room:
            if part:
                yield Piece(part, True)
            part = []
            *whole, exchange = _chunks(exchange, room)
            yield from (Piece(chunk, False) for chunk in whole)
        part += exchange
    if part:
        yield Piece(part, True)


def exchanges(body: Sequence[Segment]) -> list[list[Segment]]:
    """Runs of segments that are not learned, each with the learned ones behind it: a question and its answer."""
    found: list[list[Segment]] = []
    for segment in body:
        if not found or (found[-1][-1].learned and not segment.learned):
            found.append([])
        found[-1].append(segment)
    return found


def _chunks(body: Sequence[Segment], room: int) -> list[list[Segment]]:
    """Consecutive chunks of `room` tokens, the last one of what is left."""
    chunks: list[list[Segment]] = [[]]
    left = room
    for segment in body:
        ids = segment.ids
        while len(ids) > left:
            chunks[-1].append(Segment(ids[:left], segment.learned))
            chunks.append([])
            ids, left = ids[left:], room
        chunks[-1].append(Segment(ids, segment.learned))
        left -= len(ids)
    return chunks
