"""From rows to the data set that is trained on, with an account of every row that was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from fourfold.data.encoding import encode, recognise
from fourfold.data.options import DataOptions
from fourfold.data.overlong import OVERLONG
from fourfold.data.packing import numbers_of, pack
from fourfold.data.report import NUM_NAMED_ROWS, DataReport, at
from fourfold.errors import DataError

__all__ = ["PreparedData", "account", "prepare", "select_rows"]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` returns.

    Attributes:
        dataset: Rows with `input_ids`, `labels` (lists of int) and, of conversations, `messages`; packed, with
            `seq_lengths` in place of `messages`.
        report: The account of all rows.
    """

    dataset: datasets.Dataset
    report: DataReport


def prepare(rows: datasets.Dataset, tokenizer: Any, options: DataOptions, name: str) -> PreparedData:
    """Tokenize rows, leave out what cannot be trained on, and pack.

    Tokenization is cached by content; see `fourfold.data.cache`.

    Args:
        rows: The rows as read.
        tokenizer: A tokenizer with a chat template, or for documents any; see `check_tokenizer`.
        options: How rows become tokens.
        name: The data set's name or file, for errors and the report.

    Raises:
        DataError: A tokenizer that does not do, columns of no known format, a bad row (naming its number and
            key), an empty data set, one whose labels are all masked, or, with `overlong="error"`, overlong
            rows.
    """
    recognised = recognise(rows, options, name)
    encoded = encode(recognised, tokenizer, options, name)
    kept, report = select_rows(encoded, options, name, len(rows), recognised.told_by)
    kept = kept.select_columns([key for key in ("input_ids", "labels", "messages") if key in kept.column_names])
    return _packed(PreparedData(kept, report), options)


def _packed(prepared: PreparedData, options: DataOptions) -> PreparedData:
    if not options.packing:
        return prepared
    packed = pack(prepared.dataset, options.max_length)
    return PreparedData(packed, account(prepared.report, rows_packed=len(packed)))


def account(report: DataReport, **changed: Any) -> DataReport:
    """The report with some fields changed."""
    return DataReport(**(vars(report) | changed))


def select_rows(
    encoded: datasets.Dataset, options: DataOptions, name: str, rows_read: int, told_by: str
) -> tuple[datasets.Dataset, DataReport]:
    """Leave out rows that are too long, or in which nothing is learned.

    Args:
        encoded: As `encode` made it.
        options: How rows become tokens.
        name: The data set's name.
        rows_read: Rows there were before encoding.
        told_by: What the rows are, for the report.

    Raises:
        DataError: Nothing is left; or overlong rows, with `overlong="error"`.
    """
    if len(encoded) == 0:
        raise DataError(f"data set {name}: every row is empty", found=f"{rows_read} rows", allowed="rows with text")
    lengths = numbers_of(encoded, "num_tokens")
    numbers = numbers_of(encoded, "row_number")
    overlong = np.flatnonzero(lengths > options.max_length)
    kept = encoded
    if len(overlong):
        try:
            kept = OVERLONG[options.overlong](encoded, overlong, options.max_length)
        except DataError as error:
            raise at(f"data set {name}", error) from None
    if len(kept) == 0:
        raise DataError(
            f"data set {name}: every row is longer than max_length = {options.max_length}",
            found=f"{rows_read} rows, the shortest of {lengths.min()} tokens",
            hint="raise max_length",
        )
    learned = numbers_of(kept, "num_supervised_tokens") > 0
    unlearned_rows = numbers_of(kept, "row_number")[~learned].tolist()
    if not learned.any():
        raise DataError(
            f"data set {name}: all labels are masked, so there is nothing to learn",
            found=f"{len(kept)} rows without one learned token",
            allowed="answers by the assistant within max_length",
            hint="check chat_template, overlong and max_length",
        )
    if unlearned_rows:
        kept = kept.select(np.flatnonzero(learned))
    kept_lengths = numbers_of(kept, "num_tokens")
    report = DataReport(
        name=name,
        max_length=options.max_length,
        overlong=options.overlong,
        rows_read=rows_read,
        rows_kept=len(kept),
        rows_overlong=len(overlong),
        longest=int(lengths.max()),
        first_overlong=numbers[overlong[:NUM_NAMED_ROWS]].tolist(),
        rows_unlearned=len(unlearned_rows),
        first_unlearned=unlearned_rows[:NUM_NAMED_ROWS],
        num_tokens=int(kept_lengths.sum()),
        num_supervised_tokens=int(numbers_of(kept, "num_supervised_tokens").sum()),
        length_percentiles=percentiles(kept_lengths),
        row_format=told_by,
        rows_empty=rows_read - len(np.unique(numbers)),
    )
    return kept, report


def percentiles(lengths: np.ndarray[Any, Any]) -> dict[int, int]:
    """Percentile to length."""
    return {percent: int(np.percentile(lengths, percent, method="higher")) for percent in PERCENTILES}
