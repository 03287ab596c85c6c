"""From rows of preferences to the data set that is trained on, with an account of every row that was left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from fourfold.data.dataset import PreparedData, percentiles
from fourfold.data.encoding import parse_rows
from fourfold.data.options import DataOptions
from fourfold.data.preference import PREFERENCE_ROWS, encode_preferences, truncated
from fourfold.data.report import NUM_NAMED_ROWS, DataReport
from fourfold.data.templates import check_tokenizer
from fourfold.errors import DataError

__all__ = ["prepare_preferences"]


def prepare_preferences(
    rows: datasets.Dataset, tokenizer: Any, options: DataOptions, name: str, method: str
) -> PreparedData:
    """Tokenize rows of preferences and leave out what cannot be compared.

    Args:
        rows: The rows as read.
        tokenizer: A tokenizer with a chat template.
        options: How rows become tokens; `packing` and `train_on_prompt` mean nothing here. A pair is as long as the
            longer of its two conversations.
        name: The data set's name or file, for errors and the report.
        method: A key of `fourfold.data.preference.PREFERENCE_ROWS`.

    Returns:
        The columns of `encode_preferences` that are tokens and labels, and the report; tokens are counted over both
        answers of a pair.

    Raises:
        DataError: A tokenizer that does not do, rows of another kind, a bad row (naming its number and key), none at
            all or none short enough, or, with `overlong="error"`, overlong rows.
    """
    parsed = parse_rows(rows, replace(options, kinds=(PREFERENCE_ROWS[method].kind,)), name)
    check_tokenizer(tokenizer, kind=parsed.row_format.kind)
    encoded = encode_preferences(parsed.rows, tokenizer, method, name, options.workers(len(rows)))
    lengths = np.asarray(encoded["num_tokens"])
    overlong = np.flatnonzero(lengths > options.max_length)
    kept = encoded
    if len(overlong) and options.overlong == "error":
        raise DataError(
            f"data set {name}: {len(overlong)} of {len(rows)} rows are longer than max_length = {options.max_length}",
            found=f"the first is row {overlong[0] + 1}, the longest has {lengths.max()} tokens",
            allowed=f"at most {options.max_length} tokens a row",
            hint="raise max_length, or set overlong to drop or truncate",
        )
    if len(overlong) and options.overlong == "drop":
        kept = encoded.select(np.flatnonzero(lengths <= options.max_length))
    elif len(overlong):
        kept = encoded.map(truncated, fn_kwargs={"max_length": options.max_length}, desc="truncating")
    if len(kept) == 0:
        raise DataError(
            f"data set {name}: every row is longer than max_length = {options.max_length}",
            found=f"{len(rows)} rows, the shortest of {lengths.min()} tokens",
            hint="raise max_length",
        )
    learned = np.asarray(kept["num_supervised_tokens"]) > 0
    unlearned = np.asarray(kept["row_number"])[~learned].tolist()
    if not learned.any():
        raise DataError(
            f"data set {name}: no row has an answer within max_length = {options.max_length}",
            found=f"{len(kept)} rows",
            hint="raise max_length, or set overlong: drop",
        )
    kept = kept.select(np.flatnonzero(learned)) if unlearned else kept
    kept_lengths = np.asarray(kept["num_tokens"])
    ids = [column for column in kept.column_names if column.endswith("input_ids")]
    labels = [column for column in kept.column_names if column.endswith("labels")]
    report = DataReport(
        name=name,
        max_length=options.max_length,
        overlong=options.overlong,
        rows_read=len(rows),
        rows_kept=len(kept),
        rows_overlong=len(overlong),
        longest=int(lengths.max()),
        first_overlong=(overlong[:NUM_NAMED_ROWS] + 1).tolist(),
        rows_unlearned=len(unlearned),
        first_unlearned=unlearned[:NUM_NAMED_ROWS],
        num_tokens=sum(len(row) for column in ids for row in kept[column]),
        num_supervised_tokens=sum(label != -100 for column in labels for row in kept[column] for label in row),
        length_percentiles=percentiles(kept_lengths),
        row_format=parsed.told_by,
    )
    return PreparedData(kept.remove_columns(["num_tokens", "num_supervised_tokens", "row_number"]), report)
