from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourfold.data import load_rows
from fourfold.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_json_lines_and_json_lists_hold_the_same_rows_in_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "ü"} for i in range(5)]
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    whole = write(tmp_path / "b.json", json.dumps(rows))
    assert load_rows(lines).to_list() == rows
    assert load_rows(whole, "test").to_list() == rows
    assert load_rows(lines, "train[1:3]").to_list() == rows[1:3]


def test_a_folder_gives_the_files_of_the_split_alone(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", '{"a": "train"}\n')
    write(folder / "test.jsonl", '{"a": "test"}\n')
    assert load_rows(str(folder), "train")["a"][:] == ["train"]
    assert load_rows(str(folder), "test")["a"][:] == ["test"]
    with pytest.raises(DataError, match=r"rows \(split 'validation'\)"):
        load_rows(str(folder), "validation")


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("broken.jsonl", '{"a": "1"}\n{"a": \n', r"broken\.jsonl, line 2: not JSON"),
        ("broken.json", '[{"a": 1},\n {"a": }]', r"broken\.json, line 2: not JSON"),
        ("list.jsonl", '{"a": 1}\n\n[1, 2]\n', r"list\.jsonl, line 3: not an object"),
        ("number.json", '[{"a": 1}, 3]', r"number\.json, row 2: not an object"),
        ("empty.jsonl", "", r"empty\.jsonl is empty"),
        ("blank.jsonl", "\n \n", r"blank\.jsonl is empty"),
        ("none.json", "[]", r"none\.json"),
        ("rows.xml", "hello", r"rows\.xml is of a kind that is not read"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, where: str) -> None:
    with pytest.raises(DataError, match=where):
        load_rows(write(tmp_path / name, text))


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"a": "ok"}\n{"a": "\xe4"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: not UTF-8"):
        load_rows(str(path))


def test_a_bad_line_in_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train-1.jsonl", '{"a": "1"}\n')
    write(folder / "train-2.jsonl", '{"a": "1"}\n{"a"\n')
    with pytest.raises(DataError, match=r"train-2\.jsonl, line 2"):
        load_rows(str(folder))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/nowhere/rows"])
def test_a_missing_file_is_named_and_not_sought_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=f"{source} does not exist"):
        load_rows(source)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        load_rows(str(folder))


def test_a_hub_name_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"openai/gsm8k:main \(split 'train'\) cannot be loaded"):
        load_rows("openai/gsm8k:main")
