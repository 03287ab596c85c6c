"""What is wrong with a data file, and where: the line, the byte, the row group.

Builders of `datasets` name neither, and take some faults for data: bytes that are no UTF-8, fields too many in a line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourfold.errors import DataError

__all__ = ["check_files", "column_names", "name_bad_file"]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXTS = ("json", "csv", "text")
_CORRECT_LINE = "correct the line, or take it out"


def check_files(files: list[Path], builder: str) -> None:
    """Raise DataError for what the builder would take for data: text that is not UTF-8, lines of a table that have more
    or fewer fields than its first, an empty file, a page of parquet that is not what its checksum says."""
    if builder == "parquet":
        name_bad_file(files, builder)
    if builder not in _TEXTS:
        return
    for file in files:
        lines = _decoded(file)
        has_rows = _check_table(file, lines) if builder == "csv" else sum(line.strip() != "" for line in lines) > 0
        if not has_rows:
            raise DataError(f"data file {file} is empty", found="no rows", allowed="at least one row")


def column_names(file: Path) -> list[str]:
    """The names in a table's first line."""
    return next(csv.reader(_decoded(file), delimiter=_delimiter(file)), [])


def _delimiter(file: Path) -> str:
    return "\t" if ".tsv" in file.suffixes else ","


def name_bad_file(files: list[Path], builder: str) -> None:
    """Raise for the first place in which a file is not what its builder reads; return where there is none."""
    for file in files:
        if builder == "json":
            _name_bad_line(file)
        elif builder in ("parquet", "arrow"):
            _name_bad_group(file, builder)


def _open(file: Path) -> IO[bytes]:
    stream: IO[bytes] = _OPENERS[file.suffix](file, "rb") if file.suffix in _OPENERS else file.open("rb")
    return stream


def _decoded(file: Path) -> Iterator[str]:
    """The file's lines. Raises for bytes that are no UTF-8, which `datasets` would read as other characters."""
    start = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise DataError(
                        f"data file {file}, line {number}: not UTF-8",
                        found=f"byte {byte:#04x} at {start + error.start} ({error.reason})",
                        allowed="text in UTF-8",
                        hint="write it anew in UTF-8, as by `iconv -f latin1 -t utf-8`, with the encoding it has",
                    ) from error
                start += len(line)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"data file {file} is cut short or no archive", found=error, allowed="a whole file") from error


def _check_table(file: Path, lines: Iterable[str]) -> bool:
    """Whether a table has rows, each with a field for each name."""
    num_rows = 0
    reader = csv.reader(lines, delimiter=_delimiter(file))
    try:
        header = next(reader, [])
        for fields in reader:
            num_rows += bool(fields)
            if fields and len(fields) != len(header):
                raise DataError(
                    f"data file {file}, line {reader.line_num}: {len(fields)} fields, and {len(header)} names",
                    found=", ".join(fields)[:120],
                    allowed=f"a field for each of {', '.join(header)}",
                    hint="put fields with commas or line breaks into double quotes",
                )
    except csv.Error as error:
        raise DataError(f"data file {file}, line {reader.line_num}: not CSV", found=error) from error
    return num_rows > 0


def _name_bad_line(file: Path) -> None:
    """Raise for the first line that is no JSON object, or whose values are of another kind than those before."""
    lines = _decoded(file)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        text = "".join(_decoded(file))
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"data file {file}, line {error.lineno}: not JSON",
                found=error.msg,
                allowed="one list of JSON objects, or one object a line",
                hint=_CORRECT_LINE,
            ) from error
        _check_objects((f"data file {file}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    _check_objects(_json_lines(file))


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_decoded(file), start=1):
        if not line.strip():
            continue
        where = f"data file {file}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg})",
                found=line.rstrip()[:120],
                allowed="one JSON object a line",
                hint=_CORRECT_LINE,
            ) from error


def _check_objects(rows: Iterable[tuple[str, Any]]) -> None:
    kinds: dict[str, tuple[type, str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: not an object",
                found=json.dumps(row)[:120],
                allowed='{"key": value, ...}',
                hint=_CORRECT_LINE,
            )
        for key, value in row.items():
            if value is None:
                continue
            kind = float if type(value) is int else type(value)
            known, first = kinds.setdefault(key, (kind, where))
            if kind is not known:
                raise DataError(
                    f"{where}: key {key!r} is of another kind than before",
                    found=f"{type(value).__name__} {json.dumps(value)[:80]}",
                    allowed=f"{known.__name__}, as in {first}",
                    hint="make a data set of each kind, and list them in train_dataset",
                )


def _name_bad_group(file: Path, builder: str) -> None:
    if builder == "arrow":
        try:
            with pa.memory_map(str(file)) as stream:
                for _ in pa.ipc.open_stream(stream):
                    pass
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"data file {file} is no whole Arrow stream", found=error, allowed="a whole file"
            ) from error
        return
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data file {file} is no whole parquet file", found=error, allowed="a whole file") from error
    for group in range(table.num_row_groups):
        for column in table.schema_arrow.names:
            try:
                table.read_row_group(group, columns=[column]).validate(full=True)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"data file {file}, row group {group + 1}, column {column!r}: corrupt",
                    found=str(error).splitlines()[0],
                    allowed="a whole file",
                    hint="write or fetch the file anew",
                ) from error
