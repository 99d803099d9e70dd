"""Chat data: records of messages, through one of InternLM's templates.

Two ways of writing a conversation are read: `{"messages": [{"role": …, "content": …}]}` and
`{"conversations": [{"from": …, "value": …}]}`. A message of weight 0 is read, but not learned. What is no conversation
is an error with file, line and record.
"""

from __future__ import annotations

import os
from typing import IO, Any

from internlm_ds.preprocess.samples import Limit
from internlm_ds.preprocess.segments import Part, TextTokenizer
from internlm_ds.preprocess.sft import Outcome, Place, Recipe, Split, tokenize_records
from internlm_ds.preprocess.templates import ROLES, Message, Template, settings_of

# field of the record -> (field of the role, field of the text)
_LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLE_NAMES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant", "bot": "assistant"}


def messages_of(record: Any, place: Place) -> list[Message]:
    """The conversation of a record.

    Raises:
        DataFormatError: It holds none, or a message has no known role or no text.
    """
    layout = next((key for key in _LAYOUTS if isinstance(record, dict) and key in record), None)
    if layout is None:
        reads = '{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}'
        raise place.error(f'it has neither "messages" nor "conversations"; a record reads {reads}')
    said = record[layout]
    if not isinstance(said, list) or not said:
        raise place.error(f'"{layout}" is {_seen(said)}; a list of messages is needed')
    return [_message(one, place, layout=layout, number=number) for number, one in enumerate(said, start=1)]


def _message(one: Any, place: Place, *, layout: str, number: int) -> Message:
    role_key, text_key = _LAYOUTS[layout]
    where = f"message {number}"
    missing = [key for key in (role_key, text_key) if not isinstance(one, dict) or key not in one]
    if missing:
        lacks = " and ".join(f'"{key}"' for key in missing)
        raise place.error(f'{where} lacks {lacks}; a message reads {{"{role_key}": "user", "{text_key}": …}}')
    role = _ROLE_NAMES.get(one[role_key]) if isinstance(one[role_key], str) else None
    if role is None:
        raise place.error(f"{where} has the {role_key} {one[role_key]!r}; known: {', '.join(_ROLE_NAMES)}")
    text = _joined(one[text_key])
    if not isinstance(text, str):
        raise place.error(f'the "{text_key}" of {where} is {_seen(text)}; a string is needed')
    weight = one.get("weight", 1)
    if weight not in (0, 1):
        raise place.error(f"{where} has the weight {weight!r}; known: 1, and 0 for an answer that is not learned")
    if not _is_text(text):
        raise place.error(f'the "{text_key}" of {where} holds half a surrogate pair, which is no character')
    return Message(role, text, learned=bool(weight))


def _joined(content: Any) -> Any:
    """The text of `[{"type": "text", "text": …}, …]`; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts: list[Any] = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else content


def chat_recipe(template: Template) -> Recipe:
    def parts(record: Any, place: Place) -> list[Part]:
        return template.parts(messages_of(record, place))

    return Recipe(
        kind="chat", parts=parts, frame=template.frame, framing=template.framing, settings=settings_of(template)
    )


def tokenize_chat(
    dataset: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: TextTokenizer,
    template: Template,
    split: Split = Split(),
    limit: Limit = Limit(),
    data_type: str = "en",
    overwrite: bool = False,
    progress_to: IO[str] | None = None,
) -> Outcome:
    """Tokenize conversations into `output/train/TYPE` and `output/valid/TYPE`; see `sft.tokenize_records`."""
    return tokenize_records(
        chat_recipe(template),
        dataset,
        output,
        tokenizer=tokenizer,
        split=split,
        limit=limit,
        data_type=data_type,
        overwrite=overwrite,
        progress_to=progress_to,
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seen(value: Any) -> str:
    if isinstance(value, list):
        return "an empty list" if not value else "a list of other things than texts"
    names = {dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
