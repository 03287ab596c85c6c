from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.config import load_config
from fourfold.config.options import data_sources
from fourfold.errors import ConfigError


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: m\n{text}\n")
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("datasets: [{path: a, type: alpaca}]", ("a", "alpaca", {})),
        (
            "datasets: [{path: a, type: chat_template, field_messages: talk,"
            " message_property_mappings: {role: from, content: value}}]",
            ("a", "sharegpt", {"conversations": "talk"}),
        ),
        ("datasets: [{path: a, type: completion, field: body}]", ("a", "text", {"text": "body"})),
    ],
)
def test_one_data_set_of_axolotl_is_written_with_the_runs_own_keys(tmp_path: Path, text: str, expected: Any) -> None:
    config = read(tmp_path, text)
    assert (config.train_dataset, config.row_format, config.columns) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "datasets: [{path: a, name: main, split: 'train[:9]', weight: 2, type: sharegpt}, {path: b, weight: 1}]",
            [("a", "main", "train[:9]", 2.0, "sharegpt"), ("b", None, None, 1.0, None)],
        ),
        ("dataset: a, b", [("a", None, None, None, None), ("b", None, None, None, None)]),
        ("pretraining_dataset: [{path: a, split: x, text_column: t}]", [("a", None, "x", None, "text")]),
        ("train_dataset: [{path: a, row_format: auto}]", [("a", None, None, None, None)]),
    ],
)
def test_lists_of_data_sets_are_mixtures(tmp_path: Path, text: str, expected: Any) -> None:
    config = read(tmp_path, text)
    assert config.method == ("pretrain" if text.startswith("pretraining") else "sft")
    sources = data_sources(config)
    assert [(one.path, one.name, one.split, one.weight, one.row_format) for one in sources] == expected
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_dataset: [{path: a, weigth: 2}]", "path and, if wanted, name"),
        ("train_dataset: [{path: a, weight: 0}]", "weight \\(above 0\\)"),
        ("train_dataset: []", "a list of mappings"),
        ("datasets: [{path: a, type: alpaca, field_messages: x}]", "no meaning for type alpaca"),
        ("datasets: [{path: a, type: chat_template, roles_to_train: [user]}]", "roles_to_train inside train_dataset"),
        ("pretraining_dataset: [{path: a}, {path: b}]", "a list of one mapping"),
    ],
)
def test_what_a_list_cannot_hold_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_weights_are_given_to_all_data_sets_or_to_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="some data sets of train_dataset have a weight"):
        data_sources(read(tmp_path, "train_dataset: [{path: a, weight: 1}, {path: b}]"))
