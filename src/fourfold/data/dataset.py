"""From rows to the data set that is trained on, with an account of every row that was left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from fourfold.data.packing import pack
from fourfold.data.row_formats import ROW_FORMATS, Row, RowFormat, detect_row_format, map_columns
from fourfold.data.templates import IGNORE_INDEX, check_tokenizer, encode_conversation
from fourfold.errors import ConfigError, DataError

__all__ = ["OVERLONG", "DataOptions", "DataReport", "PreparedData", "prepare"]

PERCENTILES = (50, 90, 99)
NUM_NAMED_ROWS = 5

Indices = np.ndarray[Any, np.dtype[np.int64]]
"""Positions of rows, int64, [rows]."""


@dataclass(frozen=True)
class DataOptions:
    """How rows become tokens.

    Attributes:
        max_length: Tokens a row may have.
        train_on_prompt: Whether prompts are learned too.
        overlong: What happens to rows above `max_length`; a name in `OVERLONG`.
        row_format: A name in `ROW_FORMATS`; found from the columns where None.
        columns: Column of the data set for each key of the row format: `{"prompt": "question"}`.
        packing: Whether several rows share one sequence of `max_length` tokens.
        num_proc: Processes that tokenize; one, in this process, where None.

    Raises:
        ConfigError: A value that is not allowed.
    """

    max_length: int = 1024
    train_on_prompt: bool = False
    overlong: str = "drop"
    row_format: str | None = None
    columns: dict[str, str] | None = None
    packing: bool = False
    num_proc: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError("key max_length", found=self.max_length, allowed="at least 2")
        if self.num_proc is not None and self.num_proc < 1:
            raise ConfigError("key num_proc", found=self.num_proc, allowed="at least 1")
        if self.overlong not in OVERLONG:
            raise ConfigError("key overlong", found=self.overlong, allowed=OVERLONG)
        if self.row_format is not None and self.row_format not in ROW_FORMATS:
            raise ConfigError("key row_format", found=self.row_format, allowed=ROW_FORMATS)


@dataclass(frozen=True)
class DataReport:
    """What was read, what was kept, and why the rest was not.

    Attributes:
        name: The data set's name.
        rows_read, rows_kept: Rows before and after (before packing).
        rows_overlong: Rows above `max_length`, which were dropped or truncated as `overlong` says.
        longest: Tokens of the longest row read.
        first_overlong: Numbers of the first overlong rows, counted from 1.
        rows_unlearned: Rows dropped because no token of theirs is learned.
        first_unlearned: Numbers of the first of them.
        num_tokens, num_supervised_tokens: Tokens kept, and how many of them are learned.
        length_percentiles: Percentile to tokens of a kept row.
        rows_packed: Sequences after packing; None where nothing was packed.
    """

    name: str
    max_length: int
    overlong: str
    rows_read: int
    rows_kept: int
    rows_overlong: int
    longest: int
    first_overlong: list[int]
    rows_unlearned: int
    first_unlearned: list[int]
    num_tokens: int
    num_supervised_tokens: int
    length_percentiles: dict[int, int] = field(default_factory=dict)
    rows_packed: int | None = None

    def lines(self) -> list[str]:
        """The report as lines of text."""
        share = self.num_supervised_tokens / self.num_tokens
        percentiles = ", ".join(f"p{percent} {length}" for percent, length in self.length_percentiles.items())
        lines = [
            f"{self.name}: {self.rows_kept:,} of {self.rows_read:,} rows, {self.num_tokens:,} tokens, "
            f"{self.num_supervised_tokens:,} learned ({share:.0%})",
            f"  tokens a row: {percentiles}, longest read {self.longest}",
        ]
        if self.rows_packed is not None:
            filled = self.num_tokens / (self.rows_packed * self.max_length)
            lines.append(f"  packed into {self.rows_packed:,} sequences of {self.max_length}, {filled:.0%} filled")
        if self.rows_overlong:
            done = {"drop": "dropped", "truncate": "truncated"}[self.overlong]
            rows = _named(self.first_overlong, self.rows_overlong)
            lines.append(f"  {self.rows_overlong:,} rows above {self.max_length} tokens were {done}: {rows}")
        if self.rows_unlearned:
            rows = _named(self.first_unlearned, self.rows_unlearned)
            lines.append(f"  {self.rows_unlearned:,} rows with nothing to learn were dropped: {rows}")
        return lines


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` returns.

    Attributes:
        dataset: Rows with `input_ids`, `labels` (lists of int) and `messages`; packed, with `seq_lengths` in
            place of `messages`.
        report: The account of all rows.
    """

    dataset: datasets.Dataset
    report: DataReport


def prepare(rows: datasets.Dataset, tokenizer: Any, options: DataOptions, name: str) -> PreparedData:
    """Tokenize rows, leave out what cannot be trained on, and pack.

    Tokenization is cached by content, as `datasets` does it.

    Args:
        rows: The rows as read.
        tokenizer: A tokenizer with a chat template; see `check_tokenizer`.
        options: How rows become tokens.
        name: The data set's name or file, for errors and the report.

    Raises:
        DataError: A tokenizer that does not do, columns of no known format, a bad row (naming its number and
            key), an empty data set, one whose labels are all masked, or, with `overlong="error"`, overlong
            rows.
    """
    check_tokenizer(tokenizer)
    if len(rows) == 0:
        raise DataError(f"data set {name} is empty", found="0 rows", allowed="at least one row")
    if options.columns:
        renamed = map_columns(rows.column_names, options.columns)
        # A column that has the key's name already is not the one that was asked for.
        shadowed = [key for key in renamed.values() if key in rows.column_names and key not in renamed]
        rows = rows.remove_columns(shadowed)
        rows = rows.rename_columns({column: key for column, key in renamed.items() if column != key})
    row_format = _row_format(rows, options, name)
    encoded = rows.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=options.num_proc,
        fn_kwargs={
            "tokenizer": tokenizer,
            "format_name": row_format.name,
            "train_on_prompt": options.train_on_prompt,
            "name": name,
        },
        features=_FEATURES,
        desc=f"tokenizing {name}",
    )
    lengths = np.asarray(encoded["num_tokens"])
    overlong = np.flatnonzero(lengths > options.max_length)
    kept = encoded
    if len(overlong):
        try:
            kept = OVERLONG[options.overlong](encoded, overlong, options.max_length)
        except DataError as error:
            raise _at(f"data set {name}", error) from None
    if len(kept) == 0:
        raise DataError(
            f"data set {name}: every row is longer than max_length = {options.max_length}",
            found=f"{len(rows)} rows, the shortest of {lengths.min()} tokens",
            hint="raise max_length",
        )
    learned = np.asarray(kept["num_supervised_tokens"]) > 0
    unlearned_rows = np.asarray(kept["row_number"])[~learned].tolist()
    if not learned.any():
        raise DataError(
            f"data set {name}: all labels are masked, so there is nothing to learn",
            found=f"{len(kept)} rows without one learned token",
            allowed="answers by the assistant within max_length",
            hint="check chat_template, overlong and max_length",
        )
    if unlearned_rows:
        kept = kept.select(np.flatnonzero(learned))
    kept_lengths = np.asarray(kept["num_tokens"])
    num_supervised = sum(kept["num_supervised_tokens"])
    rows_kept = len(kept)
    kept = kept.select_columns(["input_ids", "labels", "messages"])
    if options.packing:
        kept = pack(kept, options.max_length)
    report = DataReport(
        name=name,
        max_length=options.max_length,
        overlong=options.overlong,
        rows_read=len(rows),
        rows_kept=rows_kept,
        rows_overlong=len(overlong),
        longest=int(lengths.max()),
        first_overlong=(overlong[:NUM_NAMED_ROWS] + 1).tolist(),
        rows_unlearned=len(unlearned_rows),
        first_unlearned=unlearned_rows[:NUM_NAMED_ROWS],
        num_tokens=int(kept_lengths.sum()),
        num_supervised_tokens=num_supervised,
        length_percentiles={
            percent: int(np.percentile(kept_lengths, percent, method="higher")) for percent in PERCENTILES
        },
        rows_packed=len(kept) if options.packing else None,
    )
    return PreparedData(kept, report)


_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int64")),
        "labels": datasets.List(datasets.Value("int64")),
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "num_tokens": datasets.Value("int64"),
        "num_supervised_tokens": datasets.Value("int64"),
        "row_number": datasets.Value("int64"),
    }
)


def _row_format(rows: datasets.Dataset, options: DataOptions, name: str) -> RowFormat:
    if options.row_format is None:
        try:
            return detect_row_format(rows.column_names)
        except DataError as error:
            raise _at(f"data set {name}", error) from None
    row_format = ROW_FORMATS[options.row_format]
    missing = [column for column in row_format.required if column not in rows.column_names]
    if missing:
        raise DataError(
            f"data set {name}: row format {row_format.name!r} needs column {', '.join(missing)}",
            found=", ".join(rows.column_names),
            allowed=row_format.required,
            hint="map other names with columns, as in columns: {prompt: question, completion: answer}",
        )
    return row_format


def _encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: Any,
    format_name: str,
    train_on_prompt: bool,
    name: str,
) -> dict[str, list[Any]]:
    row_format = ROW_FORMATS[format_name]
    encoded: dict[str, list[Any]] = {key: [] for key in _FEATURES}
    for position, index in enumerate(indices):
        row: Row = {key: values[position] for key, values in batch.items()}
        try:
            messages = row_format.to_messages(row)
            tokens = encode_conversation(messages, tokenizer, train_on_prompt)
        except DataError as error:
            raise _at(f"data set {name}, row {index + 1}", error) from error
        encoded["input_ids"].append(tokens.input_ids)
        encoded["labels"].append(tokens.labels)
        encoded["messages"].append(messages)
        encoded["num_tokens"].append(len(tokens.input_ids))
        encoded["num_supervised_tokens"].append(_num_supervised(tokens.labels))
        encoded["row_number"].append(index + 1)
    return encoded


def _num_supervised(labels: list[int]) -> int:
    """Labels that the shifted loss sees: the first token has nothing before it to be predicted from."""
    return sum(label != IGNORE_INDEX for label in labels[1:])


def _drop(dataset: datasets.Dataset, overlong: Indices, _max_length: int) -> datasets.Dataset:
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), overlong))


def _refuse(dataset: datasets.Dataset, overlong: Indices, max_length: int) -> datasets.Dataset:
    first = (overlong[:NUM_NAMED_ROWS] + 1).tolist()
    raise DataError(
        f"{len(overlong)} of {len(dataset)} rows are longer than max_length = {max_length}",
        found=f"{_named(first, len(overlong))}; the longest has {max(dataset['num_tokens'])} tokens",
        allowed=f"at most {max_length} tokens a row",
        hint="raise max_length, or set overlong to drop or truncate",
    )


def _truncate(dataset: datasets.Dataset, _overlong: Indices, max_length: int) -> datasets.Dataset:
    return dataset.map(_truncate_row, fn_kwargs={"max_length": max_length}, desc="truncating")


def _truncate_row(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    labels = row["labels"][:max_length]
    return {
        "input_ids": row["input_ids"][:max_length],
        "labels": labels,
        "num_tokens": len(labels),
        "num_supervised_tokens": _num_supervised(labels),
    }


OVERLONG: dict[str, Callable[[datasets.Dataset, Indices, int], datasets.Dataset]] = {
    "drop": _drop,
    "error": _refuse,
    "truncate": _truncate,
}


def _named(first: list[int], count: int) -> str:
    return f"rows {', '.join(map(str, first))}{', ...' if count > len(first) else ''}"


def _at(where: str, error: DataError) -> DataError:
    return DataError(f"{where}: {error.what}", found=error.found, allowed=error.allowed, hint=error.hint)
