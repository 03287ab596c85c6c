"""Data sets in a configuration: one by its name, or a list of them with their own options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DatasetEntry", "Datasets", "EvalDatasets", "RowFormat", "name_of"]

RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "kto"]


class DatasetEntry(BaseModel):
    """One data set of a list; keys that are left out are the run's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    path: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1)
    split: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, min_length=1)
    weight: float | None = Field(None, gt=0)
    row_format: RowFormat | None = None
    columns: dict[str, str] | None = None
    sample_by: Literal["line", "paragraph", "document"] = "line"


Datasets = Annotated[
    list[DatasetEntry],
    Field(
        min_length=1,
        description="a list of mappings with path and, if wanted, name, split, revision, weight (above 0), row_format, "
        "columns, sample_by (line, paragraph, document)",
    ),
]


EvalDatasets = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")], Annotated[str, Field(min_length=1)]],
    Field(min_length=1, description="a mapping of names (letters, digits, _ . -) to such paths"),
]


def name_of(given: str | Sequence[DatasetEntry]) -> str:
    """What a data set, or a list of them, is called in reports and errors."""
    if isinstance(given, str):
        return given
    return ", ".join(entry.path + (f" ({entry.split})" if entry.split else "") for entry in given)
