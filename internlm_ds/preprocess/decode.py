"""Ids to text for looking at: byte pieces joined to characters, what has no text made visible.

Only for people's eyes: the text is not what went in (blanks and line ends are shown by signs where asked for).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.tokenizers import JsonTokenizer


def open_decoder(path: str) -> Decoder:
    """The decoder of a `.model` file, or of a `tokenizer.json`.

    Raises:
        TokenizerError: It is neither.
    """
    if path.endswith(".json"):
        return JsonDecoder(JsonTokenizer(path))
    import sentencepiece

    sentencepiece.set_min_log_level(2)
    try:
        return Decoder(sentencepiece.SentencePieceProcessor(model_file=path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path} is no sentencepiece model ({error})") from None


class Decoder:
    """The pieces of a sentencepiece model by id.

    Args:
        model: The loaded `SentencePieceProcessor`.
    """

    def __init__(self, model: Any):
        self.vocab_size = int(model.get_piece_size())
        self._model = model
        self._kinds: dict[int, tuple[str, bytes]] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, signs ignored; `⟨name⟩` for control pieces, `⟨id 7⟩` for ids the model lacks, `⟨E4⟩` for
        bytes that make no character.
        """
        out, waiting = [], b""
        for number in ids:
            kind, content = self._piece(abs(number))
            if kind == "text":
                waiting += content
            else:
                out.append(shown_bytes(waiting) + content.decode())
                waiting = b""
        return "".join([*out, shown_bytes(waiting)])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id on its own."""
        return [self.text([number]) for number in ids]

    def _piece(self, number: int) -> tuple[str, bytes]:
        found = self._kinds.get(number)
        if found is None:
            found = self._kinds[number] = self._looked_up(number)
        return found

    def _looked_up(self, number: int) -> tuple[str, bytes]:
        if number >= self.vocab_size:
            return "sign", f"⟨id {number}⟩".encode()
        piece = self._model.id_to_piece(number)
        if self._model.is_byte(number):
            return "text", bytes([int(piece[3:5], 16)])
        if self._model.is_control(number) or self._model.is_unknown(number):
            return "sign", f"⟨{piece.strip('<>')}⟩".encode()
        return "text", piece.replace("▁", " ").encode()


class JsonDecoder(Decoder):
    """The same for a `tokenizer.json`; special tokens are shown as they are spelled."""

    def __init__(self, tokenizer: JsonTokenizer):
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer = tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, signs ignored."""
        return self._tokenizer.decode([abs(number) for number in ids], skip_special=False)


def shown_bytes(content: bytes) -> str:
    """UTF-8 as text; bytes that are none, and control characters but line ends and tabs, by number.

    >>> shown_bytes(b"caf\\xc3\\xa9 \\xe4\\xbb\\0")
    'café ⟨E4⟩⟨BB⟩⟨00⟩'
    """
    text = content.decode("utf-8", "surrogateescape")
    return "".join(_shown(sign) for sign in text)


def _shown(sign: str) -> str:
    if 0xDC80 <= ord(sign) <= 0xDCFF:
        return f"⟨{ord(sign) - 0xDC00:02X}⟩"
    return sign if sign in "\n\t" or sign.isprintable() else f"⟨{ord(sign):02X}⟩"
