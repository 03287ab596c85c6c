"""The data of a run as the model will see it, and what is wrong with it: what `fourfold data` shows."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.data import DataOptions, DataReport, load_rows
from fourfold.data.doctor import Examination, Finding, examine, leaks
from fourfold.data.mixture import options_of
from fourfold.data.sources import DataSource
from fourfold.data.streamed import first_rows
from fourfold.data.templates import IGNORE_INDEX
from fourfold.errors import ConfigError
from fourfold.inputs import prepare_train, read_held_out, read_tokenizer, split_rows

__all__ = ["DataExamination", "Segment", "ShownRow", "examine_data"]

NUM_BINS = 12
NUM_STREAMED_ROWS = 1_000


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's tokens that are all learned or all masked, and all special or none."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """A row as the model will see it.

    Attributes:
        dataset, row_number: Where it stands.
        fate: "trained on", or why it is not.
        num_tokens, num_learned: Its tokens, and those that have a label.
        segments: Its text.
    """

    dataset: str
    row_number: int
    fate: str
    num_tokens: int
    num_learned: int
    segments: list[Segment]


@dataclass(frozen=True)
class DataExamination:
    """What `examine_data` returns.

    Attributes:
        rows: Some rows.
        histogram: Upper edge of a bin of lengths, in tokens, to the number of rows; rows of all training data sets.
        supervised_share: Share of their tokens that are learned; None: nothing could be tokenized.
        told_by: What the rows of each data set were recognised as.
        reports: What training would get, held-out rows last; empty where errors are in the way.
        packing_waste: Share of packed sequences that is padding; None: nothing is packed.
        findings: What is wrong, errors first.
    """

    rows: list[ShownRow]
    histogram: dict[int, int]
    supervised_share: float | None
    told_by: dict[str, str]
    reports: list[DataReport]
    packing_waste: float | None
    findings: list[Finding]

    @property
    def is_sound(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"is_sound": self.is_sound, **asdict(self)}


def examine_data(config: RunConfig, num_rows: int = 3, seed: int | None = None) -> DataExamination:
    """Look at the data of a run: all rows of it, or the first of what is streamed. No model is loaded.

    Args:
        config: The run.
        num_rows: Rows to show.
        seed: They are drawn at random by it; None: the first ones.

    Raises:
        ConfigError: There is no train_dataset.
        DataError: A file that cannot be read at all, or a tokenizer that does not do.
    """
    if config.train_dataset is None:
        raise ConfigError("train_dataset is not given", hint="name a file, a folder, or a data set on the hub")
    tokenizer = read_tokenizer(config)
    options = choices.data_options(config)
    stop_ids = _stop_ids(config)

    def look(source: DataSource, rows: Dataset, options: DataOptions = options) -> Examination:
        return examine(rows, tokenizer, options_of(source, options), source.path, stop_ids)

    read = partial(first_rows, count=NUM_STREAMED_ROWS) if config.streaming else load_rows
    parts = [(source, read(source), source.path) for source in choices.data_sources(config)]
    train = [look(source, rows) for source, rows, _ in parts]
    held_out: list[Examination] = []
    findings = [finding for one in train for finding in one.findings]
    if config.eval_dataset:
        sources = [DataSource(path) for path in choices.eval_datasets(config).values()]
        looked_at_as = choices.data_options(config, packing=False)
        held_out = [look(source, load_rows(source, "test"), looked_at_as) for source in sources]
        findings += [finding for one in held_out for finding in one.findings] + leaks(train, held_out)
    elif config.eval_split_fraction:
        numbers = {id(one): _held_out_numbers(one, config) for one in train}
        findings += leaks(train, train, lambda one, number: number in numbers[id(one)])
    if config.streaming:
        what = f"streaming: only the first {NUM_STREAMED_ROWS:,} rows of each training data set were looked at"
        findings.append(Finding("warning", what, hint="without streaming, all of them are"))
    findings.sort(key=lambda finding: finding.severity)
    reports: list[DataReport] = []
    if all(finding.severity != "error" for finding in findings):
        prepared = [prepare_train(config, tokenizer, options, parts), *read_held_out(config, tokenizer).values()]
        reports = [data.report for data in prepared]
    lengths = np.concatenate([one.lengths for one in train])
    learned = np.concatenate([one.num_learned for one in train])
    return DataExamination(
        rows=_shown(train, tokenizer, options, num_rows, seed),
        histogram=_histogram(lengths),
        supervised_share=float(learned.sum() / lengths.sum()) if len(lengths) else None,
        told_by={one.name: one.told_by for one in [*train, *held_out]},
        reports=reports,
        packing_waste=reports[0].packing_waste if reports else None,
        findings=findings,
    )


def _stop_ids(config: RunConfig) -> list[int]:
    """Where the base model's generation stops, by its own generation config, if it is a folder here."""
    path = Path(config.model_name_or_path) / "generation_config.json"
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return given if isinstance(given, list) else [] if given is None else [given]


def _held_out_numbers(one: Examination, config: RunConfig) -> set[int]:
    numbers = Dataset.from_dict({"number": range(1, one.rows_read + 1)})
    return set(split_rows(numbers, one.name, config)["held-out"]["number"])


def _shown(
    train: list[Examination], tokenizer: Any, options: DataOptions, num_rows: int, seed: int | None
) -> list[ShownRow]:
    places = [(one, place) for one in train for place in range(len(one.numbers))]
    if seed is not None:
        places = random.Random(seed).sample(places, min(num_rows, len(places)))
    return [_shown_row(one, place, tokenizer, options) for one, place in places[:num_rows]]


def _shown_row(one: Examination, place: int, tokenizer: Any, options: DataOptions) -> ShownRow:
    assert one.encoded is not None
    row = one.encoded[place]
    fate = "trained on"
    if row["num_tokens"] > options.max_length:
        fate = f"above max_length = {options.max_length}: {options.overlong}"
    elif row["num_supervised_tokens"] == 0:
        fate = "nothing to learn: dropped"
    return ShownRow(
        dataset=one.name,
        row_number=int(one.numbers[place]),
        fate=fate,
        num_tokens=row["num_tokens"],
        num_learned=row["num_supervised_tokens"],
        segments=list(_segments(row["input_ids"], row["labels"], tokenizer)),
    )


def _segments(input_ids: list[int], labels: list[int], tokenizer: Any) -> list[Segment]:
    added = frozenset(tokenizer.added_tokens_decoder)
    kinds = [(label != IGNORE_INDEX, token in added) for token, label in zip(input_ids, labels, strict=True)]
    segments = []
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start]:
            segments.append(Segment(tokenizer.decode(input_ids[start:end]), *kinds[start]))
            start = end
    return segments


def _histogram(lengths: np.ndarray[Any, Any]) -> dict[int, int]:
    if len(lengths) == 0:
        return {}
    width = max(1, -(-int(lengths.max()) // NUM_BINS))
    counts = np.bincount((lengths - 1) // width)
    return {(place + 1) * width: int(count) for place, count in enumerate(counts)}
