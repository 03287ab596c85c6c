"""Row formats: what one row of a data set looks like, and how it becomes a conversation.

A new format is one function and one row of `ROW_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.errors import DataError

__all__ = ["ROLES", "ROW_FORMATS", "Message", "RowFormat", "detect_row_format", "map_columns"]

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class RowFormat:
    """How rows of one kind become conversations.

    Attributes:
        name: The name under which configuration knows the format.
        required: Columns without which a row is not of this format.
        optional: Columns that are read where they stand.
        convert: Makes the turns of one row, unchecked where the row itself holds turns.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], list[Any]]

    def to_messages(self, row: Row) -> list[Message]:
        """The conversation of one row: it starts before the assistant speaks and ends with the assistant.

        Raises:
            DataError: A field or turn that is missing, empty or no string, an unknown role, or no answer at
                the end. The message names the key; who knows the row's number adds it.
        """
        return _checked(self.convert(row))


def _messages(row: Row) -> list[Any]:
    return _turns(row, "messages")


def _alpaca(row: Row) -> list[Any]:
    prompt = _text(row, "instruction")
    if row.get("input") not in (None, ""):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    system = []
    if row.get("system") not in (None, ""):
        system = [{"role": "system", "content": _text(row, "system")}]
    return [
        *system,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def _prompt_completion(row: Row) -> list[Any]:
    return [*_text_or_turns(row, "prompt", "user"), *_text_or_turns(row, "completion", "assistant")]


ROW_FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat("messages", ("messages",), (), _messages),
    "alpaca": RowFormat("alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
    "prompt_completion": RowFormat("prompt_completion", ("prompt", "completion"), (), _prompt_completion),
}


def detect_row_format(column_names: Iterable[str]) -> RowFormat:
    """The one format whose required columns are all there.

    Raises:
        DataError: No format fits, or several do.
    """
    found = list(column_names)
    fitting = [row_format for row_format in ROW_FORMATS.values() if set(row_format.required) <= set(found)]
    if len(fitting) == 1:
        return fitting[0]
    raise DataError(
        "the columns fit no row format" if not fitting else "the columns fit several row formats",
        found=", ".join(found),
        allowed="; ".join(f"{name}: {' + '.join(row.required)}" for name, row in ROW_FORMATS.items()),
        hint="set row_format, or map columns, as in columns: {prompt: question, completion: answer}",
    )


def map_columns(column_names: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Check a column mapping against a data set and turn it around.

    Args:
        column_names: Columns of the data set.
        columns: For each key of a row format, the data set's column that holds it: `{"prompt": "question"}`.

    Returns:
        New name of each column that is read: `{"question": "prompt"}`.

    Raises:
        DataError: A key that no row format has, a column that is not there, or one column for two keys.
    """
    keys = sorted({key for row in ROW_FORMATS.values() for key in (*row.required, *row.optional)})
    unknown = [key for key in columns if key not in keys]
    if unknown:
        raise DataError(
            "columns maps a key that no row format has", found=", ".join(unknown), allowed=keys,
            hint="a mapping is written key: column, as in columns: {prompt: question, completion: answer}",
        )  # fmt: skip
    found = list(column_names)
    missing = [column for column in columns.values() if column not in found]
    if missing:
        raise DataError("columns names a column that is not there", found=", ".join(missing), allowed=found)
    renamed = {column: key for key, column in columns.items()}
    if len(renamed) < len(columns):
        raise DataError("columns maps one column to two keys", found=dict(columns))
    return renamed


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"key {key!r}: no text", found=_brief(value), allowed="a string that is not empty")
    return value


def _turns(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"key {key!r}: no turns", found=_brief(value), allowed='a list of {"role": ..., "content": ...}'
        )
    return value


def _text_or_turns(row: Row, key: str, role: str) -> list[Any]:
    if isinstance(row.get(key), list):
        return _turns(row, key)
    return [{"role": role, "content": _text(row, key)}]


def _checked(turns: list[Any]) -> list[Message]:
    messages = [_checked_turn(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
    if messages[-1]["role"] != "assistant":
        raise DataError(
            "key 'role': the last turn is not the assistant's",
            found=[message["role"] for message in messages],
            allowed="a conversation that ends with an answer to learn",
        )
    if messages[0]["role"] == "assistant":
        raise DataError("key 'role': the assistant speaks first", found="assistant", allowed="system or user first")
    return messages


def _checked_turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: not a message", found=_brief(turn), allowed='{"role": ..., "content": ...}')
    # Arrow fills the keys that only other rows have with None.
    extra = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise DataError(
            f"{where}: keys that would be lost", found=", ".join(extra), allowed="role, content",
            hint="take them out of the rows; tool calls and weights of single turns are not trained on",
        )  # fmt: skip
    role = turn.get("role")
    if role not in ROLES:
        raise DataError(f"{where}, key 'role': unknown role", found=_brief(role), allowed=ROLES)
    try:
        return {"role": role, "content": _text(turn, "content")}
    except DataError as error:
        raise DataError(f"{where}, {error.what}", found=error.found, allowed=error.allowed) from None


def _brief(value: object) -> str:
    return repr(value)[:120]
