"""Sentencepiece models: which one, what it can do, and the two ways of encoding.

`find_model` follows the order that users are promised; `Tokenizer` wraps a model; `PlainEncoder` and `ReferenceEncoder`
differ in one thing, literal control pieces in a text. sentencepiece is imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm_ds.errors import TokenizerError

ENVIRONMENT_VARIABLE = "INTERNLM_DS_TOKENIZER"
NEIGHBOUR_NAMES = ("V7_sft.model", "tokenizer_internlm.model")
_REFERENCE_SPECIALS = ("<unk>", "<s>", "</s>")


def find_model(given: str | None, *, environ: Mapping[str, str], constant: str = "", folder: Path | None = None) -> str:
    """Path of the tokenizer model: the option, the environment, the script's constant, a known file beside the script.

    Args:
        given: Value of `--tokenizer`.
        constant: `TOKENIZER` of `preprocessing/tokenizer.py`; relative to `folder`.
        folder: Folder of that script, None where there is none.

    Raises:
        TokenizerError: The first of them that says something names no file, or none says anything.
    """
    in_script = str((folder or Path()) / Path(constant).expanduser()) if constant else None
    for path, origin in (
        (given, "--tokenizer"),
        (environ.get(ENVIRONMENT_VARIABLE) or None, f"${ENVIRONMENT_VARIABLE}"),
        (in_script, "TOKENIZER at the top of preprocessing/tokenizer.py"),
    ):
        if path is not None:
            return _existing(os.path.expanduser(path), origin)
    for name in NEIGHBOUR_NAMES if folder else ():
        if folder and (folder / name).is_file():
            return str(folder / name)
    ways = ["give --tokenizer MODEL (a sentencepiece .model file)", f"set ${ENVIRONMENT_VARIABLE}"]
    if folder:
        ways += [f"set TOKENIZER at the top of {folder / 'tokenizer.py'}", f"put {NEIGHBOUR_NAMES[0]} beside it"]
    raise TokenizerError(f"no tokenizer model: {', '.join(ways[:-1])} or {ways[-1]}")


def _existing(path: str, origin: str) -> str:
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "tokenizer.model")):
        return os.path.join(path, "tokenizer.model")  # a Hugging Face folder
    if not os.path.isfile(path):
        what = "is a folder without tokenizer.model" if os.path.isdir(path) else "does not exist"
        raise TokenizerError(f"the tokenizer model {path} {what} (from {origin}); name a sentencepiece .model file")
    return path


class Tokenizer:
    """A sentencepiece model and the facts that a provenance file records.

    Attributes:
        path, name: The model file, and its name alone.
        sha256: Hex digest of the file.
        vocab_size: Number of pieces.

    Raises:
        TokenizerError: The file is no sentencepiece model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        import sentencepiece

        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"the tokenizer model {self.path} cannot be read: {error.strerror}") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        # else the library warns about a piece of InternLM's own model each time it is loaded
        sentencepiece.set_min_log_level(2)
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise TokenizerError(f"{self.path} is no sentencepiece model ({error})") from None
        self.vocab_size = int(self._model.get_piece_size())
        self._threads = min(8, os.cpu_count() or 1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; a control piece that a text spells out is ordinary text to sentencepiece."""
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=self._threads)
        return ids

    @property
    def bos_id(self) -> int:
        return self._control("bos", self._model.bos_id(), "--no-bos")

    @property
    def eos_id(self) -> int:
        return self._control("eos", self._model.eos_id(), "--no-eos")

    def piece_id(self, piece: str) -> int | None:
        """Id of a piece, None if the model lacks it."""
        found = int(self._model.piece_to_id(piece))
        return found if self._model.id_to_piece(found) == piece else None

    def piece(self, number: int) -> str:
        """Name of a piece by its id, below `vocab_size`."""
        name: str = self._model.id_to_piece(number)
        return name

    def piece_or_id(self, text: str, *, option: str) -> int:
        """Id for the value of an option that takes a piece or an id.

        Raises:
            TokenizerError: The model lacks the piece, or the id is outside its vocabulary.
        """
        if text.isascii() and text.isdigit():
            if int(text) >= self.vocab_size:
                message = f"{option} {text}: the ids of {self.name} run from 0 to {self.vocab_size - 1}"
                raise TokenizerError(message)
            return int(text)
        found = self.piece_id(text)
        if found is None:
            message = f"{self.name} has no piece {text!r}; give {option} a piece or an id that it has (0 to "
            raise TokenizerError(f"{message}{self.vocab_size - 1})")
        return found

    def _control(self, name: str, found: int, option: str) -> int:
        if found < 0:
            raise TokenizerError(f"{self.name} has no {name} piece; run without it ({option}) or use another model")
        return found


class Encoder(Protocol):
    """Texts to ids, without bos and eos."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class PlainEncoder:
    """Everything in a text is text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode(texts)


class ReferenceEncoder:
    """Literal `<unk>`, `<s>`, `</s>` become their ids, the rest is encoded piecewise around them, blanks kept.

    Source: the slow tokenizer of transformers 4.41.2 (`PreTrainedTokenizer.tokenize`), which the reference's tool uses.

    Attributes:
        specials: Those of them that the model has, and their ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        ids = {piece: tokenizer.piece_id(piece) for piece in _REFERENCE_SPECIALS}
        self.specials = {piece: number for piece, number in ids.items() if number is not None}
        pattern = "|".join(re.escape(piece) for piece in self.specials)
        self._pattern = re.compile(f"({pattern})" if pattern else r"(?!)")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode(texts)
        for index, text in enumerate(texts):
            if self._pattern.search(text):
                encoded[index] = self._piecewise(text)
        return encoded

    def _piecewise(self, text: str) -> list[int]:
        parts = [part for part in self._pattern.split(text) if part]
        ids = self._tokenizer.encode(parts)
        return [i for part, own in zip(parts, ids) for i in ([self.specials[part]] if part in self.specials else own)]
