"""From rows as they were read to tokens and labels, or to the columns that TRL's trainers of preferences take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

from fourfold.data.cache import cache_file, content_key
from fourfold.data.options import DataOptions
from fourfold.data.report import at, named
from fourfold.data.row_formats import (
    KINDS,
    METHODS,
    ROW_FORMATS,
    Kind,
    RowFormat,
    detect_row_format,
    fitting_formats,
    map_columns,
)
from fourfold.data.shapes import Shapes
from fourfold.data.templates import Encoded, check_tokenizer, encode_conversations, encode_documents, num_supervised
from fourfold.data.turns import MEDIA, Row
from fourfold.errors import DataError

__all__ = ["FEATURES", "PARSED", "BatchEncoder", "RecognisedRows", "encode", "parse_rows", "recognise"]

_TURNS = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
_IDS = datasets.List(datasets.Value("int32"))
_COUNT = datasets.Value("int64")
FEATURES = datasets.Features(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "messages": _TURNS,
        "num_tokens": _COUNT,
        "num_supervised_tokens": _COUNT,
        "row_number": _COUNT,
    }
)
"""Of encoded rows; documents, and rows that are to be packed, have no turns."""

PARSED: dict[str, Any] = {
    **dict.fromkeys(("messages", "prompt", "chosen", "rejected", "completion"), _TURNS),
    "text": datasets.Value("string"),
    "label": datasets.Value("bool"),
}
"""The features of the columns in `KINDS`."""


@dataclass(frozen=True)
class RecognisedRows:
    """Rows whose format is known.

    Attributes:
        rows: The columns that the format reads, by its names for them.
        row_format: The format.
        told_by: What it was recognised by, for people.
    """

    rows: datasets.Dataset
    row_format: RowFormat
    told_by: str


def recognise(rows: datasets.Dataset, options: DataOptions, name: str) -> RecognisedRows:
    """Find out what rows are, and give their columns the format's names.

    Raises:
        DataError: No rows; columns of no format, or of several; rows of several formats in one data set, with their
            numbers; rows of another kind than `options.kinds`; a mapping of columns that does not fit.
    """
    if len(rows) == 0:
        raise DataError(f"data set {name} is empty", found="0 rows", allowed="at least one row")
    given = rows.column_names
    try:
        if options.columns:
            renamed = map_columns(given, options.columns)
            # A column that has the key's name already is not the one that was asked for.
            shadowed = [key for key in renamed.values() if key in given and key not in renamed]
            rows = rows.remove_columns(shadowed)
            rows = rows.rename_columns({column: key for column, key in renamed.items() if column != key})
        row_format = _row_format(rows, options)
    except DataError as error:
        raise at(f"data set {name}", error) from None
    read = [key for key in (*row_format.required, *row_format.optional) if key in rows.column_names]
    media = [key for key in MEDIA if key in rows.column_names and key not in read]
    sources = {key: (options.columns or {}).get(key, key) for key in read}
    ignored = [column for column in given if column not in sources.values() and column not in media]
    told = "as row_format says, from" if options.row_format else "told by"
    by = [sources[key] for key in row_format.required]
    told_by = f"rows of {row_format.name}, {told} {'columns' if len(by) > 1 else 'column'} {', '.join(by)}"
    if ignored:
        told_by += f"; not read: {', '.join(ignored)}"
    recognised = RecognisedRows(rows.select_columns([*read, *media]), row_format, told_by)
    if options.kinds is not None:
        _require_kind(recognised, options.kinds, name)
    return recognised


def _require_kind(recognised: RecognisedRows, kinds: tuple[Kind, ...], name: str) -> None:
    row_format = recognised.row_format
    if row_format.kind in kinds:
        return
    how = "are compared, not learned one by one" if "conversation" in kinds else "are not what is learned from here"
    raise DataError(
        f"data set {name}: {row_format.name} rows {how}",
        found=recognised.told_by,
        allowed=[one.name for one in ROW_FORMATS.values() if one.kind in kinds],
        hint=f"such rows are for method: {METHODS[row_format.kind]}; else map the columns of such rows, or name their "
        "row_format",
    )


def _row_format(rows: datasets.Dataset, options: DataOptions) -> RowFormat:
    if options.row_format is not None:
        row_format = ROW_FORMATS[options.row_format]
        missing = [column for column in row_format.required if column not in rows.column_names]
        if missing:
            raise DataError(
                f"row format {row_format.name!r} needs column {', '.join(missing)}",
                found=", ".join(rows.column_names),
                allowed=row_format.required,
                hint="map other names with columns, as in columns: {prompt: question, completion: answer}",
            )
        return row_format
    fitting = fitting_formats(rows.column_names)
    if options.kinds is not None and len(fitting) > 1:
        fitting = [row_format for row_format in fitting if row_format.kind in options.kinds] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        # Arrow gives every row the columns of all: who has none but nulls there is of another format.
        numbers = {row_format.name: _rows_with(rows, row_format.required) for row_format in fitting}
        filled = {format_name: found for format_name, found in numbers.items() if found}
        shapes = list(filled.values())
        if len(filled) == 1 and len(shapes[0]) == len(rows):
            return ROW_FORMATS[next(iter(filled))]
        if len(filled) > 1 and not set(shapes[0]) & set().union(*shapes[1:]):
            raise DataError(
                "rows of several formats stand in one data set",
                found="; ".join(f"{format_name}: {named(found)}" for format_name, found in filled.items()),
                allowed="one format in a data set",
                hint="make a data set of each, and list them in train_dataset",
            )
    return detect_row_format(rows.column_names)


def _rows_with(rows: datasets.Dataset, columns: tuple[str, ...]) -> list[int]:
    """Numbers of the rows that have a value in all of the columns."""
    found: list[int] = []
    start = 1
    for table in rows.select_columns(list(columns)).with_format("arrow").iter(10_000):
        valid = [table.column(column).is_valid().to_pylist() for column in columns]
        found += [number for number, has in enumerate(zip(*valid, strict=True), start=start) if all(has)]
        start += len(table)
    return found


def encode(recognised: RecognisedRows, tokenizer: Any, options: DataOptions, name: str) -> datasets.Dataset:
    """Tokens and labels of rows, of any length, cached by content. Features: `FEATURES`.

    A document becomes as many rows as it has pieces; none, if it is empty.

    Raises:
        DataError: A tokenizer that does not do; a bad row, naming its number and key; rows that are no text to learn.
    """
    row_format = recognised.row_format
    _require_kind(recognised, ("conversation", "document"), name)
    check_tokenizer(tokenizer, kind=row_format.kind)
    # Of the options, what the result depends on.
    decisive = {"format": row_format.name, "train_on_prompt": options.train_on_prompt, "encoded": True}
    if row_format.kind == "document":
        decisive["max_length"] = options.max_length
    features = FEATURES
    if options.packing or row_format.kind == "document":
        features = datasets.Features({key: kind for key, kind in FEATURES.items() if key != "messages"})
    decisive["columns"] = list(features)
    key = content_key(recognised.rows, tokenizer, decisive)
    return recognised.rows.map(
        _encode_rows,
        batched=True,
        with_indices=True,
        remove_columns=recognised.rows.column_names,
        num_proc=options.workers(len(recognised.rows)),
        fn_kwargs={
            "encoder": BatchEncoder(tokenizer, row_format, options, name),
            "schema": features.arrow_schema,
        },
        features=features,
        new_fingerprint=key,
        cache_file_name=cache_file(key),
        desc=f"tokenizing {name}",
    )


def _encode_rows(batch: dict[str, list[Any]], indices: list[int], encoder: BatchEncoder, schema: pa.Schema) -> pa.Table:
    rows: list[Row] = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    columns = encoder.encode(rows, [index + 1 for index in indices])
    arrays = {field.name: pa.array(columns[field.name], field.type) for field in schema}
    return pa.table(arrays, schema)


class BatchEncoder:
    """Makes tokens of some rows after others, all of one format."""

    def __init__(self, tokenizer: Any, row_format: RowFormat, options: DataOptions, name: str) -> None:
        """
        Args:
            tokenizer: A tokenizer that passed `check_tokenizer`.
            row_format: What the rows are: conversations or documents.
            options: How rows become tokens.
            name: The data set's name, for errors.
        """
        self._tokenizer, self._row_format, self._options, self._name = tokenizer, row_format.name, options, name
        self._shapes = Shapes()

    def encode(self, rows: list[Row], numbers: list[int]) -> dict[str, list[Any]]:
        """The columns of `FEATURES` for some rows; `numbers`: the rows' numbers, for errors and for the column."""
        row_format = ROW_FORMATS[self._row_format]
        parsed = [_parsed(row, row_format, self._name, number) for row, number in zip(rows, numbers, strict=True)]
        pieces: list[list[Encoded]]
        if row_format.kind == "document":
            turns: list[Any] = [[] for _ in parsed]
            pieces = encode_documents([one["text"] for one in parsed], self._tokenizer, self._options.max_length)
        else:
            turns = [one["messages"] for one in parsed]
            pieces = [[one] for one in self._conversations(turns, numbers)]
        encoded: dict[str, list[Any]] = {key: [] for key in FEATURES}
        for messages, number, its_pieces in zip(turns, numbers, pieces, strict=True):
            for piece in its_pieces:
                encoded["input_ids"].append(piece.input_ids)
                encoded["labels"].append(piece.labels)
                encoded["messages"].append(messages)
                encoded["num_tokens"].append(len(piece.input_ids))
                encoded["num_supervised_tokens"].append(num_supervised(piece.labels))
                encoded["row_number"].append(number)
        return encoded

    def _conversations(self, turns: list[Any], numbers: list[int]) -> list[Encoded]:
        learn_all = self._options.train_on_prompt
        try:
            return encode_conversations(turns, self._tokenizer, learn_all, self._shapes)
        except DataError:
            # Again one by one: there the faulty row is known.
            encoded = []
            for messages, number in zip(turns, numbers, strict=True):
                try:
                    encoded += encode_conversations([messages], self._tokenizer, learn_all, self._shapes)
                except DataError as error:
                    raise at(f"data set {self._name}, row {number}", error) from error
            return encoded


_CORRECT_ROW = "correct the row, or take it out; `fourfold data` lists all such rows"


def _parsed(row: Row, row_format: RowFormat, name: str, number: int) -> dict[str, Any]:
    try:
        return row_format.parse(row)
    except DataError as error:
        raise at(f"data set {name}, row {number}", error, _CORRECT_ROW) from error


def parse_rows(rows: datasets.Dataset, options: DataOptions, name: str) -> RecognisedRows:
    """Rows of any format in their kind's columns (`KINDS`), checked and not tokenized: what TRL's trainers of
    preferences take.

    Returns:
        `rows` has `prompt`, `chosen`, `rejected` (lists of turns) for preferences; `prompt`, `completion` and `label`
        (true: a good answer) for judged answers; `messages` for conversations; `text` for documents.

    Raises:
        DataError: As `recognise`; or a bad row, naming its number and key.
    """
    recognised = recognise(rows, options, name)
    kind = recognised.row_format.kind
    key = content_key(recognised.rows, None, {"format": recognised.row_format.name})
    parsed = recognised.rows.map(
        _parse_batch,
        batched=True,
        with_indices=True,
        remove_columns=recognised.rows.column_names,
        num_proc=options.workers(len(recognised.rows)),
        fn_kwargs={"format_name": recognised.row_format.name, "name": name},
        features=datasets.Features({column: PARSED[column] for column in KINDS[kind]}),
        new_fingerprint=key,
        cache_file_name=cache_file(key),
        desc=f"reading {name}",
    )
    return RecognisedRows(parsed, recognised.row_format, recognised.told_by)


def _parse_batch(batch: dict[str, list[Any]], indices: list[int], format_name: str, name: str) -> dict[str, list[Any]]:
    row_format = ROW_FORMATS[format_name]
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    parsed = [_parsed(row, row_format, name, index + 1) for row, index in zip(rows, indices, strict=True)]
    return {column: [one[column] for one in parsed] for column in KINDS[row_format.kind]}
