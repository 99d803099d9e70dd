"""A prompt as a user's turn of a conversation: the ids that a chat model answers to, and those that end its answer.

The templates are `preprocess.templates`', which made the training data: what a model reads here is what it learned
from.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from internlm_ds.preprocess.segments import encode_parts, spell
from internlm_ds.preprocess.templates import Message, Template, make_template
from internlm_ds.preprocess.tokenizers import Tokenizer


@dataclass(frozen=True)
class Chat:
    """How a prompt is framed.

    Attributes:
        template: One of `preprocess.templates.NAMES`.
        system: What a system message says; none when empty.
        pieces: Pieces or ids by option (`eoh`, `eoa`, `im_start`, `im_end`), instead of those looked up.
    """

    template: str
    system: str = ""
    pieces: dict[str, str] = field(default_factory=dict)


def question(prompt: str, chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], tuple[int, ...]]:
    """Ids up to the place where the answer begins, and the ids that end the answer.

    Raises:
        TokenizerError: The tokenizer lacks a piece of the template.
    """
    template = make_template(chat.template, tokenizer, given=chat.pieces)
    said = [*([Message("system", chat.system)] if chat.system else []), Message("user", prompt)]
    answer = template.message(Message("assistant", ""))
    opening = list(itertools.takewhile(lambda part: not part.learned, answer))
    parts = [*(part for message in said for part in template.message(message)), *opening]
    names = {number: tokenizer.piece(number) for number in _controls(template)}
    turned = zip(names, tokenizer.encode(list(names.values())), strict=True)
    spelled = {number: spell(names[number], tokenizer) for number, ids in turned if number in ids}
    (segments,) = encode_parts([parts], tokenizer=tokenizer, controls={}, spelled=spelled)
    ids = [*template.frame.bos, *(number for segment in segments for number in segment.ids)]
    return ids, tuple(_controls(template))


def _controls(template: Template) -> list[int]:
    """Ids that no text may become, and that an answer ends before; a newline is neither."""
    return [number for name, number in template.pieces.items() if name != "newline"]
