"""Tables of a model: which neighbours may fuse, ids of characters, merges, texts of ids. Arrays only.

BPE only ever makes strings that are pieces. So where no piece holds the characters `ab` side by side, no merge crosses
a|b whatever stands around it, and text may be cut there. Characters with the same partners share a class; the question
"may these two fuse" is then one bit of a small matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from internlm_ds.preprocess.engine.model_file import SPACE_PIECE, ModelFile, Piece, PieceType

ID_BITS = 20  # a merge is three ids in one word
MAX_PIECES = 900_000  # ids have six digits, and characters without a piece get numbers above the pieces'
MAX_TRIE_NODES = 4096
HASH_FACTOR = 0x1E3779B97F4A7C15
NO_RANK = 2**31 - 1
_FLAG = -(2**63)  # sign bit: a character that begins a user-defined piece, or NUL

Array = npt.NDArray[Any]


class Tables(NamedTuple):
    """All that an engine knows of a model.

    Attributes:
        classes: int64 by code point: bits 32-62 first bit of its row in `joins` (as the left one of two), bits 0-31
            its column (as the right one); sign bit: look it up in the trie, or it is NUL. Code points beyond the table
            fuse with none.
        joins: uint8, a bit for each pair of classes, lowest bit first: 1 where some piece holds such neighbours.
        char_ids: int32 by code point: its piece; a number from `num_pieces` on where it has none but is part of one;
            -1 for a character in no piece.
        merges: int64, open-addressed by `merge_slot`: left id, right id, merged id, 20 bits each; 0 is empty.
        ranks: int32 by id: place among the distinct scores, best first.
        byte_ids: int32 `(256,)`, pieces of single bytes.
        trie: int32 `(nodes, 256)`, the node behind a node and a byte, 0 for none; node 0 is the root.
        trie_ids: int32 `(nodes,)`, user-defined piece that ends here, -1 for none.
        id_texts: int64 by id: `"123, "` as eight bytes, filled with blanks.
        id_sizes: int32 by id: how many of those count.
    """

    classes: Array
    joins: Array
    char_ids: Array
    merges: Array
    ranks: Array
    byte_ids: Array
    trie: Array
    trie_ids: Array
    id_texts: Array
    id_sizes: Array

    @property
    def num_pieces(self) -> int:
        return len(self.id_texts)


def build(model: ModelFile) -> Tables:
    """Tables of a model for which `model_file.why_not` has nothing to say.

    Raises:
        ValueError: Its user-defined pieces are too many.
    """
    pieces = model.pieces
    merged = {piece.text: i for i, piece in enumerate(pieces) if piece.type in (PieceType.NORMAL, PieceType.UNUSED)}
    user = {piece.text: i for i, piece in enumerate(pieces) if piece.type == PieceType.USER_DEFINED}
    symbols = _symbols(merged, user, num_pieces=len(pieces))
    num_codes = 1 + max(ord(character) for character in {SPACE_PIECE, *"".join(merged), *"".join(user)})
    classes, joins = _adjacency(merged, num_codes=num_codes)
    classes[[0, *(ord(text[0]) for text in user)]] |= np.int64(_FLAG)
    char_ids = _char_ids({text: i for text, i in symbols.items() if len(text) == 1}, num_codes=num_codes)
    trie, trie_ids = _trie(user)
    texts = b"".join(b"%-8b" % (b"%d, " % i) for i in range(len(pieces)))
    return Tables(
        classes=classes,
        joins=joins,
        char_ids=char_ids,
        merges=_merges(merged, symbols),
        ranks=_ranks(pieces),
        byte_ids=_byte_ids(pieces),
        trie=trie,
        trie_ids=trie_ids,
        id_texts=np.frombuffer(texts, dtype="<i8").astype(np.int64),
        id_sizes=np.array([len(str(i)) + 2 for i in range(len(pieces))], dtype=np.int32),
    )


def with_user_pieces(tables: Tables, more: Mapping[str, int]) -> Tables:
    """The tables with further texts that stand for an id as a whole, wherever they occur.

    Raises:
        ValueError: One of them overlaps with a user-defined piece of the model: which comes first is not ours to say.
    """
    known = user_pieces(tables)
    for text in more:
        rivals = [other for other in known if _overlap(text, other)]
        if rivals or not text:
            raise ValueError(f"{text!r} and its user-defined piece {', '.join(map(repr, rivals))} overlap")
    trie, trie_ids = _trie({**known, **more})
    classes = tables.classes.copy()
    classes[[ord(text[0]) for text in more]] |= np.int64(_FLAG)
    return tables._replace(classes=classes, trie=trie, trie_ids=trie_ids)


def user_pieces(tables: Tables) -> dict[str, int]:
    """The user-defined pieces and their ids, read back from the trie."""
    found: dict[str, int] = {}
    waiting = [(0, b"")]
    while waiting:
        node, text = waiting.pop()
        if tables.trie_ids[node] >= 0:
            found[text.decode()] = int(tables.trie_ids[node])
        waiting += [(int(tables.trie[node, b]), text + bytes([b])) for b in np.flatnonzero(tables.trie[node]).tolist()]
    return found


def _overlap(a: str, b: str) -> bool:
    """Whether there is a text in which both stand with a character in common."""
    shared = range(1, min(len(a), len(b)) + 1)
    return a in b or b in a or any(a[-i:] == b[:i] or b[-i:] == a[:i] for i in shared)


def merge_slot(left: Array, right: Array, *, num_slots: int) -> Array:
    """First slot of `merges` to look at for a pair of ids; the kernel computes the same."""
    with np.errstate(over="ignore"):
        mixed = ((left.astype(np.int64) << ID_BITS) | right) * np.int64(HASH_FACTOR)
    slot: Array = (mixed >> np.int64(36)) & np.int64(num_slots - 1)
    return slot


def _symbols(merged: Mapping[str, int], user: Mapping[str, int], *, num_pieces: int) -> dict[str, int]:
    """Ids of everything a merge can start from: pieces, and lone characters that are only found inside of pieces."""
    symbols = dict(merged)
    # a user-defined character stands for itself and never fuses
    single = {text: number for text, number in user.items() if len(text) == 1}
    symbols.update(single)
    for character in sorted({c for text in merged for c in text} - symbols.keys()):
        symbols[character] = num_pieces
        num_pieces += 1
    return symbols


def _adjacency(merged: Iterable[str], *, num_codes: int) -> tuple[Array, Array]:
    """`classes` (without flags) and `joins`."""
    pairs = {pair for text in merged for pair in pairwise(text)}
    behind: dict[str, set[str]] = defaultdict(set)
    before: dict[str, set[str]] = defaultdict(set)
    for first, second in pairs:
        behind[first].add(second)
        before[second].add(first)
    left, right = _numbered(behind), _numbered(before)
    row = (max(right.values(), default=0) + 8) // 8 * 8
    bits = np.zeros((max(left.values(), default=0) + 1, row), dtype=np.uint8)
    for first, second in pairs:
        bits[left[first], right[second]] = 1
    classes = np.zeros(num_codes, dtype=np.int64)
    for character in {*left, *right}:
        classes[ord(character)] = (left.get(character, 0) * row << 32) | right.get(character, 0)
    classes[ord(" ")] = classes[ord(SPACE_PIECE)]
    return classes, np.packbits(bits, axis=None, bitorder="little")


def _numbered(partners: Mapping[str, set[str]]) -> dict[str, int]:
    """Classes from 1 on: one for each distinct set of partners, those of ASCII and the space first (0: no partner).

    What most text looks at then lies close together.
    """
    numbers: dict[frozenset[str], int] = {}
    order = sorted(partners, key=lambda c: (c >= "\x80" and c != SPACE_PIECE, c))
    return {c: numbers.setdefault(frozenset(partners[c]), len(numbers) + 1) for c in order}


def _char_ids(characters: Mapping[str, int], *, num_codes: int) -> Array:
    ids = np.full(num_codes, -1, dtype=np.int32)
    for character, number in characters.items():
        ids[ord(character)] = number
    ids[ord(" ")] = ids[ord(SPACE_PIECE)]
    return ids


def _merges(merged: Mapping[str, int], symbols: Mapping[str, int]) -> Array:
    """Every way of making a piece from two symbols."""
    found = [
        (symbols[text[:i]], symbols[text[i:]], number)
        for text, number in merged.items()
        for i in range(1, len(text))
        if text[:i] in symbols and text[i:] in symbols
    ]
    num_slots = 1 << max(10, (2 * len(found)).bit_length())
    slots = np.zeros(num_slots, dtype=np.int64)
    if not found:
        return slots
    left, right, number = np.array(found, dtype=np.int64).T
    words = (left << 2 * ID_BITS) | (right << ID_BITS) | number
    where = merge_slot(left, right, num_slots=num_slots)
    while len(words):
        free = slots[where] == 0
        slots[where[free]] = words[free]  # of several for one slot the last one stays
        waiting = slots[where] != words
        words, where = words[waiting], (where[waiting] + 1) & (num_slots - 1)
    return slots


def _ranks(pieces: Sequence[Piece]) -> Array:
    scores = np.array([piece.score for piece in pieces], dtype=np.float32)
    return np.unique(-scores, return_inverse=True)[1].reshape(-1).astype(np.int32)


def _byte_ids(pieces: Sequence[Piece]) -> Array:
    ids = np.full(256, -1, dtype=np.int32)
    for number, piece in enumerate(pieces):
        if piece.type == PieceType.BYTE:
            ids[int(piece.text[3:5], 16)] = number  # <0x0A>
    return ids


def _trie(user: Mapping[str, int]) -> tuple[Array, Array]:
    nodes: list[dict[int, int]] = [{}]
    ids = [-1]
    for text, number in user.items():
        node = 0
        for byte in text.encode():
            if byte not in nodes[node]:
                nodes[node][byte] = len(nodes)
                nodes.append({})
                ids.append(-1)
            node = nodes[node][byte]
        ids[node] = number
    if len(nodes) > MAX_TRIE_NODES:
        raise ValueError(f"it has too many user-defined pieces ({len(user)})")
    table = np.zeros((len(nodes), 256), dtype=np.int32)
    for node, branches in enumerate(nodes):
        for byte, target in branches.items():
            table[node, byte] = target
    return table, np.array(ids, dtype=np.int32)
