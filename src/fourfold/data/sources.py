"""Where rows come from: a JSON or JSON-lines file, a folder of data files, or a data set of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets

from fourfold.errors import DataError

__all__ = ["load_rows"]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def load_rows(source: str, split: str = "train") -> datasets.Dataset:
    """Rows of `source`, as a data set with the source's own columns and order.

    Args:
        source: A JSON file (a list of objects), a JSON-lines file (an object a line), a folder of data files,
            or the name of a data set on the hub, `owner/name` or `owner/name:configuration`.
        split: The split, with the slices of `datasets`: `train`, `test[:100]`, `train[:10%]`. In a folder the
            split picks the files by their names, as `datasets` does; a single file holds one split, whatever
            its name is.

    Raises:
        DataError: A missing file or split, a line that cannot be decoded (naming file and line), or no rows.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _load_file(path, split)
    elif path.is_dir():
        rows = _load_folder(path, split)
    elif path.suffix in JSON_SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(
            f"data file {source} does not exist",
            allowed="a JSON or JSON-lines file, a folder of them, or the name of a data set on the hub",
            hint=f"check the path; it was looked up from {Path.cwd()}",
        )
    else:
        rows = _load_from_hub(source, split)
    if len(rows) == 0:
        raise DataError(f"data set {source} (split {split!r}) is empty", found="0 rows", allowed="at least one row")
    return rows


def _load_file(path: Path, split: str) -> datasets.Dataset:
    if path.suffix not in JSON_SUFFIXES:
        raise DataError(
            f"data file {path} is of a kind that is not read",
            found=f"suffix {path.suffix!r}",
            allowed=JSON_SUFFIXES,
            hint="write the rows as JSON lines, one object a line",
        )
    if not path.read_bytes()[:4096].strip():
        raise DataError(f"data file {path} is empty", found="no JSON value", allowed="at least one row")
    _check_utf8(path)
    split_name = re.split(r"\W", split, maxsplit=1)[0]
    try:
        return datasets.load_dataset("json", data_files={split_name: str(path)}, split=split)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        _name_undecodable_line(path)
        raise DataError(
            f"data file {path} cannot be read", found=error.__cause__ or error, allowed="rows of one kind"
        ) from error


def _load_folder(path: Path, split: str) -> datasets.Dataset:
    json_files = sorted(file for file in path.rglob("*") if file.suffix in JSON_SUFFIXES)
    for file in json_files:
        _check_utf8(file)
    try:
        return datasets.load_dataset(str(path), split=split)
    except FileNotFoundError as error:
        raise DataError(
            f"folder {path} holds no data files", found=error, hint="put train.jsonl and test.jsonl into it"
        ) from error
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        for file in json_files:
            _name_undecodable_line(file)
        raise DataError(f"folder {path} (split {split!r}) cannot be read", found=error.__cause__ or error) from error


def _load_from_hub(source: str, split: str) -> datasets.Dataset:
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data set {source} (split {split!r}) cannot be loaded",
            found=error,
            allowed="an existing file, an existing folder, or a data set's name on the hub",
            hint="a configuration is written after a colon: owner/name:configuration",
        ) from error


def _check_utf8(path: Path) -> None:
    """Raise for the first line that is not UTF-8: `datasets` would read it as other characters."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"data file {path}, line {number}: not UTF-8", found=error.reason) from error


def _name_undecodable_line(path: Path) -> None:
    """Raise for the first line of `path` that is no JSON object; return when there is none."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"data file {path}, line {error.lineno}: not JSON", found=error.msg) from error
        for number, row in enumerate(rows, start=1):
            _check_is_object(row, f"data file {path}, row {number}")
        return
    for number, line_text in enumerate(text.split("\n"), start=1):
        if not line_text.strip():
            continue
        try:
            row = json.loads(line_text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"data file {path}, line {number}: not JSON ({error.msg})",
                found=line_text[:120],
                allowed="one JSON object a line",
            ) from error
        _check_is_object(row, f"data file {path}, line {number}")


def _check_is_object(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object", found=json.dumps(row)[:120], allowed='{"key": value, ...}')
