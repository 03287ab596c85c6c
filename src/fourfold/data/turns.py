"""Turns of a conversation, as data sets write them, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourfold.errors import DataError

__all__ = [
    "ROLES",
    "Message",
    "Row",
    "answers",
    "checked",
    "no_media",
    "optional_text",
    "text",
    "text_or_turns",
    "turns",
]

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_PLAIN = {"role", "content"}

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Who speaks in `{"from": ..., "value": ...}`; names as data sets on the hub have them."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_MEDIA = frozenset(MEDIA)


def text(row: Row, key: str) -> str:
    """The text of a field. Raises DataError for none, or an empty one."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"key {key!r}: no text", found=_brief(value), allowed="a string that is not empty")
    return value


def optional_text(row: Row, key: str) -> str | None:
    """The text of a field that may be missing or empty."""
    return None if row.get(key) in (None, "") else text(row, key)


def turns(row: Row, key: str) -> list[Any]:
    """The turns of a field, unchecked. Raises DataError for no list, or an empty one."""
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"key {key!r}: no turns", found=_brief(value), allowed='a list of {"role": ..., "content": ...}'
        )
    return value


def text_or_turns(row: Row, key: str, role: str) -> list[Message]:
    """The checked turns of a field; a text is one turn of `role`, one turn that is not in a list a list of it."""
    value = row.get(key)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return [_checked_turn(turn, number, key) for number, turn in enumerate(value, start=1)] or turns(row, key)
    return [{"role": role, "content": text(row, key)}]


def answers(row: Row, key: str) -> list[Message]:
    """The turns of a field that holds an answer: text is the assistant's."""
    return text_or_turns(row, key, "assistant")


def no_media(row: Row) -> None:
    """Raise DataError for a row with images, video or sound: a text model would answer without having seen them."""
    for key in sorted(row.keys() & _MEDIA):
        if row[key] not in (None, "", []):
            raise DataError(
                f"key {key!r}: a text model sees no {key.removesuffix('s')}s",
                found=_brief(row[key]),
                allowed="rows of text",
                hint="leave such rows out; where the column means nothing, take it out of the data",
            )


def checked(conversation: list[Any]) -> list[Message]:
    """A conversation in one form: roles of `ROLES`, texts, an answer at the end and none at the start.

    Raises:
        DataError: Whatever is not so, with the number of the turn.
    """
    messages = [_checked_turn(turn, number) for number, turn in enumerate(conversation, start=1)]
    if messages[-1]["role"] != "assistant":
        raise DataError(
            "key 'role': the last turn is not the assistant's",
            found=[message["role"] for message in messages],
            allowed="a conversation that ends with an answer to learn",
        )
    if messages[0]["role"] == "assistant":
        raise DataError("key 'role': the assistant speaks first", found="assistant", allowed="system or user first")
    return messages


def _checked_turn(turn: Any, number: int, key: str | None = None) -> Message:
    if isinstance(turn, dict) and turn.keys() == _PLAIN and turn["role"] in ROLES:
        content = turn["content"]
        if isinstance(content, str) and content.strip():
            return turn
    where = f"turn {number}" if key is None else f"key {key!r}, turn {number}"
    if not isinstance(turn, dict):
        raise DataError(f"{where}: not a message", found=_brief(turn), allowed='{"role": ..., "content": ...}')
    is_sharegpt = turn.get("role") is None and turn.get("from") is not None
    speaker, said = ("from", "value") if is_sharegpt else ("role", "content")
    # Arrow fills the keys that only other rows have with None. A weight of 1 asks for what is done anyway.
    extra = [
        key
        for key, value in turn.items()
        if key not in (speaker, said) and value is not None and not (key == "weight" and value == 1)
    ]
    if extra:
        raise DataError(
            f"{where}: keys that would be lost", found=", ".join(extra), allowed=f"{speaker}, {said}",
            hint="take them out of the rows; tool calls and weights of single turns are not trained on",
        )  # fmt: skip
    role = SHAREGPT_ROLES.get(str(turn[speaker]).lower()) if is_sharegpt else turn.get("role")
    if role not in ROLES:
        allowed = SHAREGPT_ROLES if is_sharegpt else ROLES
        raise DataError(f"{where}, key {speaker!r}: unknown role", found=_brief(turn.get(speaker)), allowed=allowed)
    try:
        return {"role": role, "content": text({said: _joined(turn.get(said))}, said)}
    except DataError as error:
        raise DataError(f"{where}, {error.what}", found=error.found, allowed=error.allowed, hint=error.hint) from None


def _joined(content: Any) -> Any:
    """Content as parts, `[{"type": "text", "text": ...}]`, as one text."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type") != "text":
            raise DataError(
                f"key 'content': a text model sees no part of type {part.get('type')!r}",
                found=_brief(part),
                allowed='text, or parts {"type": "text", "text": ...}',
                hint="take such rows out: without what is shown there, answers to it would be made up",
            )
    return "".join(str(part.get("text") or "") for part in content)


def _brief(value: object) -> str:
    return repr(value)[:120]
