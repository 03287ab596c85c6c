from __future__ import annotations

from typing import Any

import datasets
import pytest

from fourfold.data import DataOptions
from fourfold.data.mixture import prepare_mixture
from fourfold.data.sources import DataSource
from fourfold.errors import ConfigError, DataError


def part(name: str, count: int, **options: Any) -> tuple[DataSource, datasets.Dataset, str]:
    rows = [{"prompt": name, "completion": str(number)} for number in range(count)]
    return DataSource(name, **options), datasets.Dataset.from_list(rows), name


def names(prepared: Any) -> list[str]:
    return [row[0]["content"] for row in prepared.dataset["messages"]]


def test_without_weights_data_sets_stand_end_to_end(tiny_tokenizer: Any) -> None:
    prepared = prepare_mixture([part("a", 2), part("b", 3)], tiny_tokenizer, DataOptions())
    assert names(prepared) == ["a", "a", "b", "b", "b"]
    report = prepared.report
    assert (report.rows_read, report.rows_kept) == (5, 5)
    assert [one.name for one in report.parts] == ["a", "b"]
    assert report.num_supervised_tokens == sum(one.num_supervised_tokens for one in report.parts)
    assert report.num_tokens == sum(map(len, prepared.dataset["input_ids"]))
    assert any("2 rows from 2 of a, 3 rows from 3 of b" in line for line in report.lines())


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_weighted_data_sets_are_interleaved_as_datasets_does_it(tiny_tokenizer: Any, strategy: str) -> None:
    parts = [part("a", 30, weight=3), part("b", 10, weight=1)]
    prepared = prepare_mixture(parts, tiny_tokenizer, DataOptions(), seed=7, stopping_strategy=strategy)
    expected = datasets.interleave_datasets(
        [rows for _, rows, _ in parts], probabilities=[0.75, 0.25], seed=7, stopping_strategy=strategy
    )
    assert names(prepared) == expected["prompt"][:]
    if strategy == "all_exhausted":
        answers = {(row[0]["content"], row[1]["content"]) for row in prepared.dataset["messages"]}
        assert len(answers) == 40


def test_parts_may_be_of_several_formats_and_names(tiny_tokenizer: Any) -> None:
    text = DataSource("t", columns={"text": "body"}), datasets.Dataset.from_list([{"body": "Paris."}]), "t"
    packed = prepare_mixture([part("a", 2), text], tiny_tokenizer, DataOptions(packing=True, max_length=64))
    assert packed.dataset.column_names == ["input_ids", "labels", "seq_lengths"]
    assert packed.report.rows_packed == len(packed.dataset)
    assert [one.row_format.split()[2] for one in packed.report.parts] == ["prompt_completion,", "text,"]


def test_a_bad_row_is_named_with_its_part(tiny_tokenizer: Any) -> None:
    bad = DataSource("b"), datasets.Dataset.from_list([{"prompt": "b", "completion": ""}]), "b"
    with pytest.raises(DataError, match="data set b, row 1: key 'completion'"):
        prepare_mixture([part("a", 2), bad], tiny_tokenizer, DataOptions())


def test_weights_of_some_and_unknown_strategies_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="have a weight, and others none"):
        prepare_mixture([part("a", 2, weight=1), part("b", 2)], tiny_tokenizer, DataOptions())
    with pytest.raises(ConfigError, match="key stopping_strategy"):
        prepare_mixture([part("a", 2)], tiny_tokenizer, DataOptions(), stopping_strategy="never")
