"""InternLM's chat templates: how a conversation of any length reads, and which of it is learned.

`internlm` is the first generation's (`<|User|>:` … `<eoh>`, `<|Bot|>:` … `<eoa>`), the tutorial's Alpaca for one turn;
`internlm2` the second's (`<|im_start|>role` … `<|im_end|>`). Records are `chat`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.alpaca import BOT_MARK, USER_MARK, chat_ids
from internlm_ds.preprocess.samples import Frame
from internlm_ds.preprocess.segments import Part, TextTokenizer

NAMES = ("internlm", "internlm2")
ROLES = ("system", "user", "assistant")
SYSTEM_MARK = "<|System|>:"
# InternLM2's sentencepiece model has its chat pieces under these names; its Hugging Face tokenizer renames them
_IM_PIECES = {"im_start": ("<|im_start|>", "[UNUSED_TOKEN_146]"), "im_end": ("<|im_end|>", "[UNUSED_TOKEN_145]")}


class Message(NamedTuple):
    """What one side says; `role` is one of `ROLES`, `learned` matters for the assistant's alone."""

    role: str
    text: str
    learned: bool = True


@dataclass(frozen=True)
class Template:
    """A chat template, filled with the ids of one model.

    Attributes:
        name: One of `NAMES`.
        frame: bos and eos around the conversation.
        pieces: Ids by name, for the provenance file.
        message: The parts of one message.
    """

    name: str
    frame: Frame
    pieces: dict[str, int]
    message: Callable[[Message], list[Part]]

    @property
    def framing(self) -> tuple[int, ...]:
        """Ids that begin or end a turn."""
        return tuple(number for name, number in self.pieces.items() if name != "newline")

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """A whole conversation; only what the assistant writes, with what ends it, is learned."""
        return [part for message in messages for part in self.message(message)]


def make_template(
    name: str,
    tokenizer: TextTokenizer,
    *,
    given: dict[str, str],
    bos: bool | None = None,
    eos: bool | None = None,
) -> Template:
    """The template of this name for this model.

    Args:
        given: Pieces or ids by option (`eoh`, `eoa`, `im_start`, `im_end`), instead of those looked up.
        bos, eos: Around the conversation; None for the template's own way.

    Raises:
        TokenizerError: The model lacks a piece, or an option belongs to the other template.
    """
    own = ("eoh", "eoa") if name == "internlm" else ("im_start", "im_end")
    if foreign := sorted(given.keys() - set(own)):
        options = ", ".join(f"--{option.replace('_', '-')}" for option in foreign)
        raise TokenizerError(f"{options}: the template {name} has no such piece; it has {' and '.join(own)}")
    build = _internlm if name == "internlm" else _internlm2
    message, pieces, own_eos = build(tokenizer, given)
    with_bos, with_eos = bos is not False, own_eos if eos is None else eos
    frame = Frame(
        bos=(tokenizer.bos_id,) if with_bos else (),
        eos=(tokenizer.eos_id,) if with_eos else (),
    )
    return Template(name, frame, pieces, message)


_Built = tuple[Callable[[Message], list[Part]], dict[str, int], bool]


def _internlm(tokenizer: TextTokenizer, given: dict[str, str]) -> _Built:
    """`<|User|>:` question `<eoh>` newline `<|Bot|>:` answer `<eoa>` newline, and eos at the end.

    Source: InternEvo `tools/alpaca_tokenizer.py` (one turn); several turns follow each other as in the published chat
    models' `build_inputs`. A system text stands first as `<|System|>:` text newline.
    """
    ids = chat_ids(tokenizer, eoh=given.get("eoh"), eoa=given.get("eoa"))

    def message(said: Message) -> list[Part]:
        if said.role == "system":
            return [Part(SYSTEM_MARK + said.text, False), Part((ids.newline,), False)]
        if said.role == "user":
            return [Part(USER_MARK + said.text, False), Part((ids.eoh, ids.newline), False)]
        return [
            Part(BOT_MARK, False),
            Part(said.text, said.learned),
            Part((ids.eoa, ids.newline), said.learned),
        ]

    return message, {"eoh": ids.eoh, "eoa": ids.eoa, "newline": ids.newline}, True


def _internlm2(tokenizer: TextTokenizer, given: dict[str, str]) -> _Built:
    """`<|im_start|>` role newline text `<|im_end|>` newline for every message; no eos, `<|im_end|>` ends an answer.

    Source: the chat template of InternLM2's published chat models.
    """
    ids = {name: _find(tokenizer, given, name) for name in _IM_PIECES}
    start, end = ids["im_start"], ids["im_end"]

    def message(said: Message) -> list[Part]:
        if said.role != "assistant":
            return [
                Part((start,), False),
                Part(f"{said.role}\n{said.text}", False),
                Part((end,), False),
                Part("\n", False),
            ]
        # at generation the prompt ends behind the newline: the answer is encoded on its own
        return [
            Part((start,), False),
            Part("assistant\n", False),
            Part(said.text, said.learned),
            Part((end,), said.learned),
            Part("\n", said.learned),
        ]

    return message, ids, False


def _find(tokenizer: TextTokenizer, given: dict[str, str], name: str) -> int:
    option = f"--{name.replace('_', '-')}"
    if name in given:
        return tokenizer.piece_or_id(given[name], option=option)
    for piece in _IM_PIECES[name]:
        if (found := tokenizer.piece_id(piece)) is not None:
            return found
    tried = " nor ".join(map(repr, _IM_PIECES[name]))
    message = f"{tokenizer.name} has no piece {tried}; give {option} a piece or an id that it has (0 to "
    raise TokenizerError(f"{message}{tokenizer.vocab_size - 1}), or use --template internlm")


def settings_of(template: Template) -> dict[str, Any]:
    """What the provenance file says about it."""
    bos_eos = {"bos": template.frame.bos, "eos": template.frame.eos}
    return {"template": template.name, "pieces": {**{k: v[0] for k, v in bos_eos.items() if v}, **template.pieces}}
