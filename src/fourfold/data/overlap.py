"""Rows of one data set that stand in another one, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

__all__ = ["count_rows_in"]

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_ROWS_AT_A_TIME = 1_000
# The constants of SplitMix64 (Steele, Lea, Flood 2014).
_GAMMA, _FIRST, _SECOND = (np.uint64(each) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def count_rows_in(rows: datasets.Dataset, others: datasets.Dataset) -> int:
    """How many of `rows` have exactly the tokens of one of `others`, by a hash of 64 bits.

    Args:
        rows, others: With `input_ids`, or of pairs with a column of them for each answer. Of packed rows, those with
            `seq_lengths`, each document counts.
    """
    known = np.concatenate([*_hashes(others), np.zeros(0, np.uint64)])
    return sum(int(np.isin(hashes, known).sum()) for hashes in _hashes(rows))


def _hashes(rows: datasets.Dataset) -> Iterator[Hashes]:
    columns = [name for name in rows.column_names if name.endswith("input_ids")]
    lengths_in = [name for name in rows.column_names if name == "seq_lengths"]
    for table in rows.select_columns([*columns, *lengths_in]).with_format("arrow").iter(_ROWS_AT_A_TIME):
        total: Any = np.zeros(1, np.uint64)
        for name in columns:
            column = table[name].combine_chunks()
            lengths = table["seq_lengths"].combine_chunks().flatten() if lengths_in else pc.list_value_length(column)
            each = _hashes_of_runs(column.flatten().to_numpy(), lengths.to_numpy(zero_copy_only=False))
            total = _mixed(total + _GAMMA) ^ each
        yield total


def _hashes_of_runs(tokens: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> Hashes:
    """Of each run of tokens, one behind the other: a sum over tokens mixed with their places."""
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    mixed = _mixed(_mixed(tokens.astype(np.uint64)) + places.astype(np.uint64) * _GAMMA)
    # reduceat takes one element of an empty run.
    sums = np.zeros(len(lengths), np.uint64)
    filled = lengths > 0
    sums[filled] = np.add.reduceat(mixed, starts[filled]) if filled.any() else 0
    hashes: Hashes = _mixed(sums + lengths.astype(np.uint64))
    return hashes


def _mixed(values: Any) -> Any:
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _FIRST
        values = (values ^ (values >> np.uint64(27))) * _SECOND
        return values ^ (values >> np.uint64(31))
