"""Several data sets as one: end to end, or interleaved by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from fourfold.data.dataset import PreparedData, account, percentiles, prepare
from fourfold.data.options import DataOptions
from fourfold.data.packing import pack, row_lengths
from fourfold.data.report import DataReport
from fourfold.data.sources import DataSource
from fourfold.errors import ConfigError

__all__ = ["STOPPING_STRATEGIES", "check_weights", "options_of", "prepare_mixture"]

STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
"""When an interleaved mixture ends; the names, and what they do, are those of `datasets.interleave_datasets`."""


def options_of(source: DataSource, options: DataOptions) -> DataOptions:
    """The run's options with what a data set says of itself."""
    own = {"row_format": source.row_format or options.row_format, "columns": source.columns or options.columns}
    return DataOptions(**(vars(options) | own))


def check_weights(sources: Sequence[DataSource]) -> list[float] | None:
    """The sources' shares, which add up to 1; None where none has a weight. Raises ConfigError where only some have."""
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return None
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(weights):
        raise ConfigError(
            "some data sets of train_dataset have a weight, and others none",
            found=", ".join(f"{source.path}: {source.weight}" for source in sources),
            allowed="a weight for each, or for none",
        )
    return [weight / sum(given) for weight in given]


def prepare_mixture(
    parts: Sequence[tuple[DataSource, datasets.Dataset, str]],
    tokenizer: Any,
    options: DataOptions,
    *,
    seed: int = 42,
    stopping_strategy: str = "all_exhausted",
    prepare_part: Callable[..., PreparedData] = prepare,
) -> PreparedData:
    """Tokenize the parts, mix their rows, and pack.

    Without weights the parts stand end to end. With weights, each row is drawn from one of them with that probability
    (`datasets.interleave_datasets`).

    Args:
        parts: Each data set's description, rows and name. One alone is `prepare`d as it is.
        tokenizer: As in `prepare`.
        options: As in `prepare`; a part's own row_format and columns win.
        seed: Of the order in which parts are drawn from.
        stopping_strategy: A name in `STOPPING_STRATEGIES`.
        prepare_part: Called as `prepare` for each part.

    Raises:
        ConfigError: Weights of some parts and not of others, or an unknown strategy.
        DataError: As `prepare`, naming the part.
    """
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ConfigError("key stopping_strategy", found=stopping_strategy, allowed=STOPPING_STRATEGIES)
    if len(parts) == 1:
        source, rows, name = parts[0]
        return prepare_part(rows, tokenizer, options_of(source, options), name)
    shares = check_weights([source for source, _, _ in parts])
    unpacked = DataOptions(**(vars(options) | {"packing": False}))
    prepared = [prepare_part(rows, tokenizer, options_of(source, unpacked), name) for source, rows, name in parts]
    columns = [one.dataset.column_names for one in prepared]
    shared = [column for column in columns[0] if all(column in names for names in columns)]
    each = [one.dataset.select_columns(shared) for one in prepared]
    numbered = [part.add_column("part", np.full(len(part), place)) for place, part in enumerate(each)]
    if shares is None:
        mixed = datasets.concatenate_datasets(numbered)
        how = "end to end"
    else:
        mixed = datasets.interleave_datasets(
            numbered, probabilities=shares, seed=seed, stopping_strategy=stopping_strategy
        )
        how = "interleaved"
    drawn = np.bincount(np.asarray(mixed["part"]), minlength=len(parts))
    mixed = mixed.remove_columns("part")
    report = _account(
        [one.report for one in prepared],
        mixed,
        options,
        f"{how}: " + ", ".join(_share(*one) for one in zip(drawn, prepared, strict=True)),
    )
    if not options.packing:
        return PreparedData(mixed, report)
    packed = pack(mixed, options.max_length)
    return PreparedData(packed, account(report, rows_packed=len(packed)))


def _share(drawn: int, prepared: PreparedData) -> str:
    return f"{drawn:,} rows from {prepared.report.rows_kept:,} of {prepared.report.name}"


def _account(parts: list[DataReport], mixed: datasets.Dataset, options: DataOptions, how: str) -> DataReport:
    # Of pairs there are two of each, and the longer answer's length is the pair's.
    tokens, labels = (
        [column for column in mixed.column_names if column.endswith(end)] for end in ("input_ids", "labels")
    )
    lengths = np.stack([row_lengths(mixed, column) for column in tokens])
    learned = sum(
        int((np.concatenate([row[1:] for row in batch[column]]) >= 0).sum())
        for column in labels
        for batch in mixed.select_columns([column]).with_format("numpy").iter(1_000)
    )
    return DataReport(
        name="the mixture",
        max_length=options.max_length,
        overlong=options.overlong,
        rows_read=sum(part.rows_read for part in parts),
        rows_kept=len(mixed),
        rows_overlong=sum(part.rows_overlong for part in parts),
        longest=max(part.longest for part in parts),
        first_overlong=[],
        rows_unlearned=sum(part.rows_unlearned for part in parts),
        first_unlearned=[],
        num_tokens=int(lengths.sum()),
        num_supervised_tokens=learned,
        length_percentiles=percentiles(lengths.max(axis=0)),
        row_format=how,
        rows_empty=sum(part.rows_empty for part in parts),
        parts=parts,
    )
