"""Plain BPE on a string, straight from the pieces: slow, and the second opinion of the engines' tests.

Source: what sentencepiece's `bpe_model.cc` does, written down from its description: user-defined pieces are taken out
first (longest at each place, from the left), then the best-scored pair of neighbours is merged, the leftmost of equals,
until none of them makes a piece; what has no piece falls to bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from internlm_ds.preprocess.engine.model_file import SPACE_PIECE, ModelFile, PieceType


class SlowBpe:
    """`encode(text)` for a model for which `model_file.why_not` has nothing to say; texts hold no NUL."""

    def __init__(self, model: ModelFile):
        kinds = (PieceType.NORMAL, PieceType.UNUSED)
        self._scores = {piece.text: piece.score for piece in model.pieces if piece.type in kinds}
        self._ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type in kinds}
        user = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type == PieceType.USER_DEFINED}
        self._user, self._longest = user, max((len(text) for text in user), default=0)
        self._bytes = {p.text: i for i, p in enumerate(model.pieces) if p.type == PieceType.BYTE}

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        for stretch, is_user in self._stretches(text.replace(" ", SPACE_PIECE)):
            if is_user:
                ids.append(self._user[stretch])
                continue
            for symbol in self._merge(list(stretch)):
                ids.extend([self._ids[symbol]] if symbol in self._ids else self._bytes_of(symbol))
        return ids

    def _stretches(self, text: str) -> Iterator[tuple[str, bool]]:
        """User-defined pieces and what stands between them."""
        begin = place = 0
        while place < len(text):
            sizes = range(min(self._longest, len(text) - place), 0, -1)
            size = next((size for size in sizes if text[place : place + size] in self._user), 0)
            if size:
                yield text[begin:place], False
                yield text[place : place + size], True
                begin = place + size
            place += size or 1
        yield text[begin:], False

    def _merge(self, symbols: list[str]) -> list[str]:
        while True:
            pairs = [(self._scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(symbols))]
            known = [(score, place) for score, place in pairs if score is not None]
            if not known:
                return symbols
            at = -max(known)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]

    def _bytes_of(self, symbol: str) -> list[int]:
        return [self._bytes[f"<0x{byte:02X}>"] for byte in symbol.encode()]
