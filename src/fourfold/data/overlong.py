"""What happens to rows with more tokens than a row may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from fourfold.data.report import named
from fourfold.data.templates import num_supervised
from fourfold.errors import DataError

__all__ = ["OVERLONG", "Indices"]

Indices = np.ndarray[Any, np.dtype[np.int64]]
"""Positions of rows, int64, [rows]."""


def _drop(dataset: datasets.Dataset, overlong: Indices, _max_length: int) -> datasets.Dataset:
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), overlong))


def _refuse(dataset: datasets.Dataset, overlong: Indices, max_length: int) -> datasets.Dataset:
    rows = dataset.select_columns(["row_number", "num_tokens"])[overlong]
    raise DataError(
        f"{len(overlong)} of {len(dataset)} rows are longer than max_length = {max_length}",
        found=f"{named(rows['row_number'], len(overlong))}; the longest has {max(rows['num_tokens'])} tokens",
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
        "num_supervised_tokens": num_supervised(labels),
    }


OVERLONG: dict[str, Callable[[datasets.Dataset, Indices, int], datasets.Dataset]] = {
    "drop": _drop,
    "error": _refuse,
    "truncate": _truncate,
}
