"""A sample as segments of ids, each learned or not; how texts become segments; the sign of a token on disk.

A recipe (`alpaca`, `chat`, `custom`) says what a sample is made of as `Part`s: texts, ids and control pieces. Here the
texts are encoded, many samples at once, and what a text spells out stays text. `signed` is the only place of this room
that knows how "input, but no loss" stands on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from internlm_ds.errors import TokenizerError

Ids = Sequence[int]


class TextTokenizer(Protocol):
    """What this room asks of a tokenizer, whatever its kind."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def piece(self, number: int) -> str: ...
    def piece_id(self, piece: str) -> int | None: ...
    def piece_or_id(self, text: str, *, option: str) -> int: ...


@dataclass(frozen=True)
class Control:
    """A piece of the model by its name, such as `<eoh>`: its id goes into the sample, whatever text says."""

    name: str


class Part(NamedTuple):
    """Something a sample is made of: a text, ids, or a control piece; `learned`: the model shall learn to write it."""

    content: str | tuple[int, ...] | Control
    learned: bool


class Segment(NamedTuple):
    """Ids one behind the other, all learned or none."""

    ids: Ids
    learned: bool


def signed(segments: Iterable[Segment]) -> list[int]:
    """Ids as they stand on disk: a negative one is input, but no loss where it is the target.

    Zero carries no sign and never is a target (`data.binmeta.split_signed_tokens`).

    >>> signed([Segment([5, 6], False), Segment([7], True)])
    [-5, -6, 7]
    """
    return [number if segment.learned else -number for segment in segments for number in segment.ids]


def num_ids(segments: Iterable[Segment]) -> int:
    return sum(len(segment.ids) for segment in segments)


def num_learned(segments: Iterable[Segment]) -> int:
    return sum(len(segment.ids) for segment in segments if segment.learned)


def encode_parts(
    samples: Sequence[Sequence[Part]],
    *,
    tokenizer: TextTokenizer,
    controls: Mapping[str, int],
    spelled: Mapping[int, Ids],
) -> list[list[Segment]]:
    """Segments of many samples; their texts are encoded together.

    Args:
        controls: Ids of the control pieces that the parts name.
        spelled: Ids that no text may become, and what stands for each instead: its name in ordinary pieces.
    """
    texts = [part.content for parts in samples for part in parts if isinstance(part.content, str)]
    encoded = iter(tokenizer.encode(texts) if texts else [])

    def ids_of(part: Part) -> Ids:
        if isinstance(part.content, str):
            return without(next(encoded), spelled)
        return (controls[part.content.name],) if isinstance(part.content, Control) else part.content

    return [[Segment(ids_of(part), part.learned) for part in parts] for parts in samples]


def without(ids: list[int], spelled: Mapping[int, Ids]) -> list[int]:
    """Ids of a text with every control id replaced by its name in ordinary pieces.

    Models may have chat pieces that a text turns into (InternLM's v1 model: `<eoh>`). A turn must not end because
    somebody writes about it.

    >>> without([5, 30, 6], {30: [7, 8]})
    [5, 7, 8, 6]
    """
    if spelled.keys().isdisjoint(ids):
        return ids
    return [number for found in ids for number in spelled.get(found, (found,))]


def spell(piece: str, tokenizer: TextTokenizer) -> list[int]:
    """A piece's name in other pieces of the model, each as long as can be; bytes where there is no such piece.

    Raises:
        TokenizerError: The model cannot write one of the name's characters.
    """
    ids: list[int] = []
    position = 0
    while position < len(piece):
        for end in range(len(piece), position, -1):
            found = tokenizer.piece_id(piece[position:end]) if end - position < len(piece) else None
            if found is not None:
                break
        if found is not None:
            ids.append(found)
        else:
            ids += _bytes_of(piece[position], tokenizer, piece=piece)
        position = end
    return ids


def _bytes_of(character: str, tokenizer: TextTokenizer, *, piece: str) -> list[int]:
    found = [tokenizer.piece_id(f"<0x{byte:02X}>") for byte in character.encode()]
    ids = [number for number in found if number is not None]
    if len(ids) < len(found):
        raise TokenizerError(f"{tokenizer.name} cannot write {character!r} of {piece} as text: no such piece, no bytes")
    return ids
