"""Row formats: what one row of a data set looks like, and what it becomes.

A new format is one function and one row of `ROW_FORMATS`. What a row becomes is one of four kinds, with the columns
that TRL's trainers take: a conversation (`messages`), a document (`text`), a preference (`prompt`, `chosen`,
`rejected`) or an answer that was judged (`prompt`, `completion`, `label`); all but the document in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fourfold.data.turns import Message, Row, answers, checked, no_media, optional_text, text, text_or_turns, turns
from fourfold.errors import DataError

__all__ = [
    "KINDS",
    "METHODS",
    "ROW_FORMATS",
    "Kind",
    "RowFormat",
    "detect_row_format",
    "fitting_formats",
    "map_columns",
]

Kind = Literal["conversation", "document", "preference", "judged"]

KINDS: dict[Kind, tuple[str, ...]] = {
    "conversation": ("messages",),
    "document": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "judged": ("prompt", "completion", "label"),
}
"""The columns that a row of each kind becomes."""

METHODS: dict[Kind, str] = {
    "conversation": "sft",
    "document": "pretrain or sft",
    "preference": "dpo, orpo or reward",
    "judged": "kto",
}
"""The methods that learn from rows of each kind, for people."""


@dataclass(frozen=True)
class RowFormat:
    """How rows of one format are read.

    Attributes:
        name: The name under which configuration knows the format.
        required: Columns without which a row is not of this format.
        optional: Columns that are read where they stand.
        convert: Makes the columns of `KINDS[kind]` from one row.
        kind: What its rows are.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]
    kind: Kind = "conversation"

    def parse(self, row: Row) -> dict[str, Any]:
        """The columns of `KINDS[kind]` for one row: texts, turns (`Message`) and truth values.

        Raises:
            DataError: A field or turn that is missing, empty or of a wrong type, an unknown role, an image, or no
                answer at the end. The message names the key; who knows the row's number adds it.
        """
        no_media(row)
        return self.convert(row)

    def to_messages(self, row: Row) -> list[Message]:
        """The conversation of one row: it starts before the assistant speaks and ends with the assistant.

        Raises:
            DataError: As `parse`; or rows of this format are no conversations.
        """
        if self.kind != "conversation":
            raise DataError(f"rows of {self.name} are no conversations", found=f"kind {self.kind}")
        messages: list[Message] = self.parse(row)["messages"]
        return messages


def _messages(row: Row) -> dict[str, Any]:
    return {"messages": checked(turns(row, "messages"))}


def _sharegpt(row: Row) -> dict[str, Any]:
    system = optional_text(row, "system")
    opening = [{"role": "system", "content": system}] if system else []
    return {"messages": checked([*opening, *turns(row, "conversations")])}


def _alpaca(row: Row) -> dict[str, Any]:
    prompt, further = text(row, "instruction"), optional_text(row, "input")
    if further:
        prompt = f"{prompt}\n\n{further}"
    system = optional_text(row, "system")
    opening = [{"role": "system", "content": system}] if system else []
    conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(row, "output")}]
    return {"messages": checked([*opening, *conversation])}


def _prompt_completion(row: Row) -> dict[str, Any]:
    return {"messages": checked([*text_or_turns(row, "prompt", "user"), *answers(row, "completion")])}


def _text(row: Row) -> dict[str, Any]:
    # An empty document is no fault: text files have empty lines. Whoever tokenizes counts and drops them.
    value = row.get("text")
    if value is not None and not isinstance(value, str):
        raise DataError("key 'text': no text", found=repr(value)[:120], allowed="a string")
    return {"text": value or ""}


def _preference(row: Row) -> dict[str, Any]:
    chosen, rejected = answers(row, "chosen"), answers(row, "rejected")
    if row.get("prompt") in (None, "", []):
        # Whole conversations: what both begin with was asked.
        both = zip(chosen[:-1], rejected[:-1], strict=False)
        shared = next((place for place, (one, other) in enumerate(both) if one != other), None)
        shared = min(len(chosen), len(rejected)) - 1 if shared is None else shared
        if shared == 0:
            raise DataError(
                "key 'prompt': there is none, and chosen and rejected begin differently",
                found=f"chosen {chosen[0]!r}; rejected {rejected[0]!r}"[:160],
                allowed="a prompt, or two conversations that begin alike",
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt = text_or_turns(row, "prompt", "user")
        chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(prompt, answer, key)
    if chosen == rejected:
        raise DataError(
            "chosen and rejected are the same", found=repr(chosen[-1]["content"])[:120], allowed="two different answers"
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without_prompt(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """Some data sets repeat the prompt in the answer's turns."""
    repeated = len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeated else answer


def _check_answer(prompt: list[Message], answer: list[Message], key: str) -> None:
    try:
        checked([*prompt, *answer])
    except DataError as error:
        raise DataError(f"key {key!r}: {error.what}", found=error.found, allowed=error.allowed) from None


# 1 and 0 are true and false, as keys too.
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def _kto(row: Row) -> dict[str, Any]:
    label = row.get("label")
    label = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(label, bool | int | str) or label not in _LABELS:
        raise DataError(
            "key 'label': neither true nor false",
            found=repr(row.get("label"))[:120],
            allowed="true for a good answer, false for a bad one",
            hint="if the labels mean something else, set row_format: prompt_completion",
        )
    prompt, completion = text_or_turns(row, "prompt", "user"), answers(row, "completion")
    _check_answer(prompt, completion, "completion")
    return {"prompt": prompt, "completion": completion, "label": _LABELS[label]}


ROW_FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat("messages", ("messages",), (), _messages),
    "sharegpt": RowFormat("sharegpt", ("conversations",), ("system",), _sharegpt),
    "alpaca": RowFormat("alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
    "prompt_completion": RowFormat("prompt_completion", ("prompt", "completion"), (), _prompt_completion),
    "text": RowFormat("text", ("text",), (), _text, "document"),
    "preference": RowFormat("preference", ("chosen", "rejected"), ("prompt",), _preference, "preference"),
    "kto": RowFormat("kto", ("prompt", "completion", "label"), (), _kto, "judged"),
}


def fitting_formats(column_names: Iterable[str]) -> list[RowFormat]:
    """Formats whose required columns are all there, but for those that ask for less of the same columns: rows with
    prompt, completion and label are kto's. `text` counts where no other fits, since many data sets carry a rendered
    text beside their turns."""
    found = set(column_names)
    fitting = [row_format for row_format in ROW_FORMATS.values() if set(row_format.required) <= found]
    most = [one for one in fitting if not any(set(one.required) < set(other.required) for other in fitting)]
    return [one for one in most if one.name != "text"] or most


def detect_row_format(column_names: Iterable[str]) -> RowFormat:
    """The one format that fits; see `fitting_formats`.

    Raises:
        DataError: No format fits, or several do.
    """
    found = list(column_names)
    fitting = fitting_formats(found)
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
