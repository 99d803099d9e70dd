"""Tokenizer models: which one, what it can do, and the two ways of encoding.

`find_model` follows the order that users are promised; `open_tokenizer` opens what it found, a sentencepiece model
(`Tokenizer`) or a `tokenizer.json` of Hugging Face (`JsonTokenizer`); `PlainEncoder` and `ReferenceEncoder` differ in
one thing, literal control pieces in a text. The libraries are imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm_ds.errors import MissingExtraError, TokenizerError

ENVIRONMENT_VARIABLE = "INTERNLM_DS_TOKENIZER"
NEIGHBOUR_NAMES = ("V7_sft.model", "tokenizer_internlm.model")
FOLDER_NAMES = ("tokenizer.model", "tokenizer.json")  # in a folder of Hugging Face, the first that is there
_USUAL_CONTROLS = {"bos": "<s>", "eos": "</s>"}
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
    ways = ["give --tokenizer MODEL (a sentencepiece .model file, or a tokenizer.json)", f"set ${ENVIRONMENT_VARIABLE}"]
    if folder:
        ways += [f"set TOKENIZER at the top of {folder / 'tokenizer.py'}", f"put {NEIGHBOUR_NAMES[0]} beside it"]
    raise TokenizerError(f"no tokenizer model: {', '.join(ways[:-1])} or {ways[-1]}")


def _existing(path: str, origin: str) -> str:
    if os.path.isdir(path):
        for name in FOLDER_NAMES:
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
    if not os.path.isfile(path):
        what = f"is a folder without {' or '.join(FOLDER_NAMES)}" if os.path.isdir(path) else "does not exist"
        message = f"the tokenizer model {path} {what} (from {origin}); name a sentencepiece .model file"
        raise TokenizerError(f"{message} or a tokenizer.json")
    return path


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file, whatever its kind.

    Raises:
        TokenizerError: It is no tokenizer.
        MissingExtraError: It is a `tokenizer.json` and `tokenizers` is not installed.
    """
    name = os.fspath(path)
    if name.endswith(".json") or _head(name).startswith(b"{"):
        return JsonTokenizer(name)
    return Tokenizer(name)


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1)
    except OSError:
        return b""  # loading says what is the matter


class Tokenizer:
    """A sentencepiece model and the facts that a provenance file records.

    Attributes:
        path, name: The model file, and its name alone.
        sha256: Hex digest of the file.
        vocab_size: Number of pieces.
        library: What encodes.

    Raises:
        TokenizerError: The file is no sentencepiece model.
    """

    library = "sentencepiece"

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"the tokenizer model {self.path} cannot be read: {error.strerror}") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._threads = min(8, os.cpu_count() or 1)
        self._model = self._load(content)
        self.vocab_size = self._count_pieces()

    def _load(self, content: bytes) -> Any:
        import sentencepiece

        # else the library warns about a piece of InternLM's own model each time it is loaded
        sentencepiece.set_min_log_level(2)
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise TokenizerError(f"{self.path} is no sentencepiece model ({error})") from None

    def _count_pieces(self) -> int:
        return int(self._model.get_piece_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; a control piece that a text spells out is ordinary text to sentencepiece."""
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=self._threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control pieces left out."""
        return str(self._model.decode(list(ids)))

    @property
    def bos_id(self) -> int:
        return self._control("bos", self._control_id("bos"), "--no-bos")

    @property
    def eos_id(self) -> int:
        return self._control("eos", self._control_id("eos"), "--no-eos")

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

    def _control_id(self, name: str) -> int:
        return int(getattr(self._model, f"{name}_id")())

    def _control(self, name: str, found: int, option: str) -> int:
        if found < 0:
            raise TokenizerError(f"{self.name} has no {name} piece; run without it ({option}) or use another model")
        return found


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face with the same facts; bos and eos are those of `tokenizer_config.json` beside.

    Special tokens that a text spells out are ordinary text, as with sentencepiece.

    Raises:
        TokenizerError: The file is no such tokenizer.
        MissingExtraError: `tokenizers` is not installed.
    """

    library = "tokenizers"

    def _load(self, content: bytes) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise MissingExtraError("tokenizers", extra="tokenizers", needed_for=f"reading {self.path}") from None
        try:
            model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{self.path} is no tokenizer.json ({error})") from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        return model

    def _count_pieces(self) -> int:
        # the highest id counts: there may be gaps below it
        return 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [found.ids for found in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out, or shown as they are spelled."""
        return str(self._model.decode(list(ids), skip_special_tokens=skip_special))

    def piece_id(self, piece: str) -> int | None:
        """Id of a token, None if the model lacks it."""
        found: int | None = self._model.token_to_id(piece)
        return found

    def piece(self, number: int) -> str:
        """Name of a token by its id, "" for a gap."""
        name: str | None = self._model.id_to_token(number)
        return name or ""

    def _control_id(self, name: str) -> int:
        beside = Path(self.path).with_name("tokenizer_config.json")
        try:
            token = json.loads(beside.read_bytes()).get(f"{name}_token")
        except (OSError, ValueError, AttributeError):
            token = None
        token = token.get("content") if isinstance(token, dict) else token
        found = self.piece_id(token if isinstance(token, str) else _USUAL_CONTROLS[name])
        return -1 if found is None else found


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
