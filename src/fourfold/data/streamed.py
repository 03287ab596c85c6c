"""A stream that training can begin with: its first rows, looked at, and what is told of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from fourfold.data.options import DataOptions
from fourfold.data.sources import DataSource, stream_rows
from fourfold.data.stream import RowStream
from fourfold.data.templates import num_supervised
from fourfold.errors import DataError

__all__ = ["StreamReport", "StreamedData", "first_rows", "open_stream"]

NUM_FIRST_ROWS = 256


@dataclass(frozen=True)
class StreamReport:
    """What is known of a stream before it is read.

    Attributes:
        name: The data sets' names.
        told_by: What the rows of each were recognised as.
        buffer_size: Rows that are shuffled and packed together.
        first_rows: Rows that were read to look at, after packing.
        num_tokens, num_supervised_tokens: Of those, and how many are learned.
    """

    name: str
    told_by: list[str]
    buffer_size: int
    first_rows: int
    num_tokens: int
    num_supervised_tokens: int

    def lines(self) -> list[str]:
        """The report as lines of text."""
        share = self.num_supervised_tokens / self.num_tokens
        return [
            f"{self.name}: streamed in blocks of {self.buffer_size:,} rows; how many there are is not known",
            *(f"  {told}" for told in self.told_by),
            f"  the first {self.first_rows:,} rows: {self.num_tokens:,} tokens, {self.num_supervised_tokens:,} learned "
            f"({share:.0%})",
        ]


@dataclass(frozen=True)
class StreamedData:
    """What `open_stream` returns.

    Attributes:
        stream: The stream, at its beginning.
        first_rows: Some rows of it, with `input_ids` and `labels` (packed: and `seq_lengths`).
        report: What is told of it.
    """

    stream: RowStream
    first_rows: datasets.Dataset
    report: StreamReport


def open_stream(
    sources: Sequence[DataSource],
    tokenizer: Any,
    options: DataOptions,
    *,
    buffer_size: int,
    seed: int = 42,
    stopping_strategy: str = "all_exhausted",
) -> StreamedData:
    """A stream whose first rows could be read, tokenized and learned from; see `RowStream`.

    Raises:
        ConfigError: A value that is not allowed.
        DataError: A source that is not there, or a bad row among the first; or there is nothing to learn in any.
    """
    stream = RowStream(
        sources, tokenizer, options, buffer_size=buffer_size, seed=seed, stopping_strategy=stopping_strategy
    )
    name = ", ".join(source.path for source in sources)
    few = min(buffer_size, NUM_FIRST_ROWS)
    look = RowStream(sources, tokenizer, options, buffer_size=few, seed=seed, stopping_strategy=stopping_strategy)
    rows = list(itertools.islice(look, few))
    if not rows:
        raise DataError(
            f"data set {name}: nothing is left to learn from",
            found=", ".join(f"{count:,} rows {reason}" for reason, count in sorted(look.dropped.items())),
            allowed=f"answers by the assistant within max_length = {options.max_length}",
            hint="check chat_template, overlong and max_length",
        )
    report = StreamReport(
        name=name,
        told_by=stream.told_by,
        buffer_size=buffer_size,
        first_rows=len(rows),
        num_tokens=sum(len(row["input_ids"]) for row in rows),
        num_supervised_tokens=sum(num_supervised(row["labels"]) for row in rows),
    )
    return StreamedData(stream, datasets.Dataset.from_list(rows), report)


def first_rows(source: DataSource, count: int, split: str = "train") -> datasets.Dataset:
    """The first rows of a data set as they are read, without reading the others.

    Raises:
        DataError: As `stream_rows`; or there is none.
    """
    rows = list(stream_rows(source, split).take(count))
    if not rows:
        raise DataError(f"data set {source.path} is empty", found="0 rows", allowed="at least one row")
    return datasets.Dataset.from_list(rows)
