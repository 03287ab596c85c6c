"""Where rows come from: files, folders, globs, or data sets of the hub, through the builders of `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fourfold.data.file_checks import check_files, column_names, name_bad_file
from fourfold.data.row_formats import ROW_FORMATS
from fourfold.errors import ConfigError, DataError

__all__ = ["BUILDERS", "SAMPLE_BY", "UNREADABLE", "DataSource", "load_rows", "local_files", "stream_rows"]

BUILDERS: dict[str, str] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""The builder of `datasets` that reads files of a suffix."""

COMPRESSIONS = (".gz", ".bz2", ".xz")
"""Suffixes that may stand behind those of texts."""

SAMPLE_BY = ("line", "paragraph", "document")
"""What one row of a text file is; the choices of `datasets`."""

_SAVED_DATASET = "state.json"
# Beside data in a folder; no rows stand in them.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", _SAVED_DATASET)
UNREADABLE = (OSError, ValueError, datasets.exceptions.DatasetsError)
"""What the builders raise for files that are not what they should be."""


@dataclass(frozen=True)
class DataSource:
    """One data set, by itself or as a part of a mixture.

    Attributes:
        path: A file, a folder, a glob, or a name on the hub: `owner/name` or `owner/name:configuration`.
        name: Configuration (subset) of a data set on the hub.
        split: The split, with the slices of `datasets`: `train`, `test[:100]`; None: the usual one.
        revision: Branch, tag or commit of a data set on the hub.
        weight: Its share of a mixture's rows, relative to the others'.
        row_format: As in `DataOptions`; None: the run's.
        columns: As in `DataOptions`; None: the run's.
        sample_by: What one row of a text file is, see `SAMPLE_BY`.

    Raises:
        ConfigError: A value that is not allowed.
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: float | None = None
    row_format: str | None = None
    columns: dict[str, str] | None = None
    sample_by: str = "line"

    def __post_init__(self) -> None:
        if self.weight is not None and not self.weight > 0:
            raise ConfigError(f"weight of data set {self.path}", found=self.weight, allowed="a number above 0")
        if self.row_format is not None and self.row_format not in ROW_FORMATS:
            raise ConfigError(f"row_format of data set {self.path}", found=self.row_format, allowed=ROW_FORMATS)
        if self.sample_by not in SAMPLE_BY:
            raise ConfigError(f"sample_by of data set {self.path}", found=self.sample_by, allowed=SAMPLE_BY)


def load_rows(source: str | DataSource, split: str = "train") -> datasets.Dataset:
    """Rows of `source`, as a data set with the source's own columns and order.

    Args:
        source: Files of a suffix in `BUILDERS`, texts among them also compressed (`COMPRESSIONS`); a folder of such,
            or one that `save_to_disk` of `datasets` left; a glob of them; or the name of a data set on the hub.
            Fields of a CSV file are texts as they stand there.
        split: The split, with the slices of `datasets`, where the source names none. In a folder the split picks the
            files by their names, as `datasets` does; files that are named themselves hold one split, whatever their
            names are.

    Raises:
        DataError: A missing file or split, files of several kinds, something that cannot be decoded (naming file and
            line, byte or row group), or no rows.
    """
    one = source if isinstance(source, DataSource) else DataSource(source)
    split = one.split or split
    rows: datasets.Dataset = _load(one, split, streaming=False)
    if len(rows) == 0:
        raise DataError(f"data set {one.path} (split {split!r}) is empty", found="0 rows", allowed="at least one row")
    return rows


def stream_rows(source: str | DataSource, split: str = "train") -> datasets.IterableDataset:
    """Rows of `source` one after another, never all in memory or on the disk; files are not read beforehand.

    Raises:
        DataError: A missing file or split, or files of several kinds. What cannot be decoded raises from the iteration.
    """
    one = source if isinstance(source, DataSource) else DataSource(source)
    split = one.split or split
    if re.search(r"\W", split):
        raise DataError(
            f"data set {one.path}: a stream has no slices", found=f"split {split!r}", allowed="a split's name",
            hint="leave streaming out, or give files that hold the rows",
        )  # fmt: skip
    return _load(one, split, streaming=True)


def _load(source: DataSource, split: str, *, streaming: bool) -> Any:
    path = Path(source.path).expanduser()
    if path.is_file():
        return _load_files([path], source, split, streaming)
    if path.is_dir():
        return _load_folder(path, source, split, streaming)
    is_glob = re.search(r"[*?\[]", source.path) is not None
    if is_glob and (files := _glob(path)):
        return _load_files(files, source, split, streaming)
    if is_glob or builder_of(path) or source.path.startswith((".", "/", "~")):
        raise DataError(
            f"no file fits {source.path}" if is_glob else f"data file {source.path} does not exist",
            allowed="a file, a folder or glob of files, or the name of a data set on the hub",
            hint=f"check the path; it was looked up from {Path.cwd()}",
        )
    return _load_from_hub(source, split, streaming)


def _glob(path: Path) -> list[Path]:
    anchor = Path(path.anchor)
    return sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())


def local_files(source: DataSource, *, check: bool = False) -> list[Path]:
    """The data files of a source on this machine; none of a data set of the hub.

    Args:
        source: The source.
        check: Whether to read them, and raise DataError for the first place that is not what its suffix says.
    """
    path = Path(source.path).expanduser()
    files = _data_files(path) if path.is_dir() else [path] if path.is_file() else _glob(path)
    if check and files and (builder := builder_of(files[0])):
        name_bad_file(files, builder)
        check_files(files, builder)
    return files


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if builder_of(file) and file.name not in _NO_DATA)


def builder_of(path: Path) -> str | None:
    """The builder that reads a file, by its name; None: no builder does."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        builder = BUILDERS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return builder if builder in ("json", "csv", "text") else None
    return BUILDERS.get(path.suffix)


def _load_files(files: list[Path], source: DataSource, split: str, streaming: bool) -> Any:
    builder = _one_builder(files, source.path)
    if not streaming:
        check_files(files, builder)
    elif empty := [file for file in files if file.stat().st_size == 0]:
        raise DataError(f"data file {empty[0]} is empty", found="0 bytes", allowed="at least one row")
    name = re.split(r"\W", split, maxsplit=1)[0]
    arguments = _builder_arguments(builder, files, source)
    try:
        return datasets.load_dataset(
            builder, data_files={name: [str(file) for file in files]}, split=split, streaming=streaming, **arguments
        )
    except UNREADABLE as error:
        name_bad_file(files, builder)
        what = f"data file {files[0]}" if len(files) == 1 else f"data set {source.path}"
        raise DataError(f"{what} cannot be read", found=error.__cause__ or error, allowed="rows of one kind") from error


def _one_builder(files: list[Path], path: str) -> str:
    builders = {builder_of(file): file for file in reversed(files)}
    if None in builders:
        raise DataError(
            f"data file {builders[None]} is of a kind that is not read",
            found=f"suffix {''.join(builders[None].suffixes[-2:])!r}",
            allowed=BUILDERS,
            hint="write the rows as JSON lines, one object a line",
        )
    if len(builders) > 1:
        raise DataError(
            f"data set {path} has files of several kinds",
            found=", ".join(str(file) for file in builders.values()),
            allowed="files of one kind in a data set",
            hint="list each kind in train_dataset as a data set of its own",
        )
    return str(next(iter(builders)))


def _builder_arguments(builder: str, files: list[Path], source: DataSource) -> dict[str, Any]:
    if builder == "text":
        return {"sample_by": source.sample_by}
    if builder == "csv":
        # As texts: 0012, 1.0 and NA are answers too, and not 12, 1 and nothing.
        texts = dict.fromkeys(column_names(files[0]), datasets.Value("string"))
        separator = "\t" if ".tsv" in files[0].suffixes else ","
        return {"features": datasets.Features(texts), "keep_default_na": False, "sep": separator}
    return {}


def _load_folder(path: Path, source: DataSource, split: str, streaming: bool) -> Any:
    if (path / _SAVED_DATASET).is_file():
        return _load_saved(path, split, streaming)
    files = _data_files(path)
    if not files:
        raise DataError(
            f"folder {path} holds no data files",
            found=", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing",
            allowed=[*BUILDERS, *(f".jsonl{suffix}" for suffix in COMPRESSIONS)],
            hint="put train.jsonl and test.jsonl into it",
        )
    builder = _one_builder(files, str(path))
    if not streaming:
        check_files(files, builder)
    arguments = _builder_arguments(builder, files, source)
    try:
        return datasets.load_dataset(str(path), split=split, streaming=streaming, **arguments)
    except UNREADABLE as error:
        name_bad_file(files, builder)
        raise DataError(f"folder {path} (split {split!r}) cannot be read", found=error.__cause__ or error) from error


def _load_saved(path: Path, split: str, streaming: bool) -> Any:
    """What `save_to_disk` left. It is one split."""
    try:
        rows = datasets.load_from_disk(str(path))
    except UNREADABLE as error:
        raise DataError(
            f"folder {path} cannot be read", found=error, allowed="a whole data set of save_to_disk"
        ) from error
    if match := re.fullmatch(r"\w+\[(-?\d*):(-?\d*)\]", split):
        start, stop = (int(number) if number else None for number in match.groups())
        rows = rows.select(range(*slice(start, stop).indices(len(rows))))
    return rows.to_iterable_dataset() if streaming else rows


def _load_from_hub(source: DataSource, split: str, streaming: bool) -> Any:
    name, _, configuration = source.path.partition(":")
    try:
        return datasets.load_dataset(
            name, source.name or configuration or None, split=split, revision=source.revision, streaming=streaming
        )
    except UNREADABLE as error:
        raise DataError(
            f"data set {source.path} (split {split!r}) cannot be loaded",
            found=error,
            allowed="an existing file, folder or glob, or a data set's name on the hub",
            hint="a configuration is written after a colon: owner/name:configuration",
        ) from error
