"""The account of every row: what was read, what was kept, and why the rest was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fourfold.errors import DataError

__all__ = ["NUM_NAMED_ROWS", "DataReport", "at", "named"]

NUM_NAMED_ROWS = 5


@dataclass(frozen=True)
class DataReport:
    """What was read, what was kept, and why the rest was not.

    Attributes:
        name: The data set's name.
        rows_read, rows_kept: Rows before and after (before packing). A document that is cut counts each piece as kept.
        rows_overlong: Rows above `max_length`, which were dropped or truncated as `overlong` says.
        longest: Tokens of the longest row read.
        first_overlong: Numbers of the first overlong rows, counted from 1.
        rows_unlearned: Rows dropped because no token of theirs is learned.
        first_unlearned: Numbers of the first of them.
        num_tokens, num_supervised_tokens: Tokens kept, and how many of them are learned.
        length_percentiles: Percentile to tokens of a kept row.
        rows_packed: Sequences after packing; None where nothing was packed.
        row_format: What the rows are, and by what that was told.
        rows_empty: Documents without text.
        rows_trained_on: Of held-out rows, those that stand in the training rows, too.
        parts: The accounts of a mixture's data sets; its own figures are those of what is trained on.
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
    row_format: str = ""
    rows_empty: int = 0
    rows_trained_on: int = 0
    parts: list[DataReport] = field(default_factory=list)

    @property
    def packing_waste(self) -> float | None:
        """Share of the packed sequences' tokens that are padding; None where nothing was packed."""
        return None if self.rows_packed is None else 1 - self.num_tokens / (self.rows_packed * self.max_length)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        share = self.num_supervised_tokens / self.num_tokens
        percentiles = ", ".join(f"p{percent} {length}" for percent, length in self.length_percentiles.items())
        lines = [line for part in self.parts for line in part.lines()]
        lines += [
            f"{self.name}: {self.rows_kept:,} of {self.rows_read:,} rows, {self.num_tokens:,} tokens, "
            f"{self.num_supervised_tokens:,} learned ({share:.0%})",
            f"  tokens a row: {percentiles}, longest read {self.longest}",
        ]
        if self.row_format:
            lines.insert(-1, f"  {self.row_format}")
        if self.rows_packed is not None:
            filled = self.num_tokens / (self.rows_packed * self.max_length)
            lines.append(f"  packed into {self.rows_packed:,} sequences of {self.max_length}, {filled:.0%} filled")
        if self.rows_trained_on:
            lines.append(
                f"  warning: {self.rows_trained_on:,} of {self.rows_kept:,} held-out rows are trained on, too, so they "
                "measure what was learned by heart; `fourfold data` names them"
            )
        if self.parts:
            # What was left out stands with each part.
            return lines
        if self.rows_overlong:
            done = {"drop": "dropped", "truncate": "truncated"}[self.overlong]
            rows = named(self.first_overlong, self.rows_overlong)
            lines.append(f"  {self.rows_overlong:,} rows above {self.max_length} tokens were {done}: {rows}")
        if self.rows_unlearned:
            rows = named(self.first_unlearned, self.rows_unlearned)
            lines.append(f"  {self.rows_unlearned:,} rows with nothing to learn were dropped: {rows}")
        if self.rows_empty:
            lines.append(f"  {self.rows_empty:,} empty rows were left out")
        return lines


def named(rows: Sequence[int], count: int | None = None) -> str:
    """The first of some rows by number; `count`: how many there are in all."""
    first = rows[:NUM_NAMED_ROWS]
    more = (len(rows) if count is None else count) > len(first)
    return f"rows {', '.join(map(str, first))}{', ...' if more else ''}"


def at(where: str, error: DataError, hint: str | None = None) -> DataError:
    """The error with the place at which it was found; `hint`: what to do, if it does not say so itself."""
    return DataError(f"{where}: {error.what}", found=error.found, allowed=error.allowed, hint=error.hint or hint)
