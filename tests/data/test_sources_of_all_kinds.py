"""Files of every kind, whole and broken."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fourfold.data.sources import DataSource, load_rows, stream_rows
from fourfold.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{number}", "completion": "ü, 0012" if number else "NA"} for number in range(5)]
JSON_LINES = datasets.Dataset.from_list(ROWS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_json(path: Path) -> None:
    JSON_LINES.to_json(path, force_ascii=False)


def write_tsv(path: Path) -> None:
    JSON_LINES.to_csv(path, sep="\t")


def write_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))


def compressed(open_file: Callable[..., Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        plain = path.with_name("plain.jsonl")
        write_json(plain)
        with open_file(path, "wb") as file:
            file.write(plain.read_bytes())

    return write


@pytest.mark.parametrize("streams", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_json),
        ("rows.jsonl.gz", compressed(gzip.open)),
        ("rows.ndjson.bz2", compressed(bz2.open)),
        ("rows.jsonl.xz", compressed(lzma.open)),
        ("rows.csv", JSON_LINES.to_csv),
        ("rows.tsv", write_tsv),
        ("rows.parquet", JSON_LINES.to_parquet),
        ("rows.arrow", write_arrow),
    ],
)
def test_every_kind_of_file_gives_the_rows_that_datasets_wrote(
    tmp_path: Path, name: str, write: Callable[[Path], None], streams: bool
) -> None:
    write(tmp_path / name)
    read = stream_rows if streams else load_rows
    assert list(read(str(tmp_path / name))) == ROWS


def test_folders_globs_and_saved_data_sets_give_all_their_rows(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    for name in ("a.parquet", "more/b.parquet"):
        JSON_LINES.to_parquet(folder / name)
    (folder / "notes.pdf").write_text("no data")
    assert len(load_rows(str(folder))) == 10
    assert len(load_rows(str(folder / "*.parquet"))) == 5
    assert len(load_rows(str(folder / "**" / "*.parquet"), "test")) == 10
    assert len(load_rows(DataSource(str(folder), split="train[:3]"))) == 3
    JSON_LINES.save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), "train[1:3]").to_list() == ROWS[1:3]
    assert list(stream_rows(str(tmp_path / "saved"))) == ROWS


def test_text_files_are_lines_or_documents(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert load_rows(str(path))["text"][:] == ["one", "", "two"]
    assert load_rows(DataSource(str(path), sample_by="document"))["text"][:] == ["one\n\ntwo\n"]


def test_a_folder_with_files_of_several_kinds_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    JSON_LINES.to_parquet(folder / "a.parquet")
    JSON_LINES.to_csv(folder / "b.csv")
    with pytest.raises(DataError, match=r"files of several kinds(.|\n)*a\.parquet.*b\.csv|b\.csv.*a\.parquet"):
        load_rows(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("latin.csv", "prompt,completion\nok,ok\nb\xe4h,x\n".encode("latin1"), r"line 3: not UTF-8(.|\n)*0xe4 at 25"),
        ("latin.txt", b"\xff\xfeh\x00", r"latin\.txt, line 1: not UTF-8(.|\n)*0xff at 0"),
        ("wide.csv", b"prompt,completion\na,b\na,b,c\n", r"wide\.csv, line 3: 3 fields, and 2 names"),
        ("narrow.csv", b"prompt,completion\na,b,c\n", r"narrow\.csv, line 2: 3 fields, and 2 names"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": "1"}\n' * 9, mtime=0)[:-12], r"cut\.jsonl\.gz is cut short"),
        ("bad.jsonl.gz", gzip.compress(b'{"a": "1"}\n{"a": \n', mtime=0), r"bad\.jsonl\.gz, line 2: not JSON"),
        ("no.parquet", b"PAR1 none", r"no\.parquet is no whole parquet file"),
        ("no.arrow", b"none at all", r"no\.arrow is no whole Arrow stream"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=where):
        load_rows(str(tmp_path / name))


def test_a_corrupt_page_of_parquet_is_named_with_its_row_group_and_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": f"prompt {number} " * 20, "completion": str(number) * 50} for number in range(200)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=100, use_dictionary=False, compression="snappy")
    place = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = place.data_page_offset + place.total_compressed_size // 2
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet, row group 2, column 'completion': corrupt"):
        load_rows(str(path))


def test_a_page_of_parquet_that_can_be_decoded_is_held_against_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([{"prompt": "p" * 50, "completion": "c" * 50} for _ in range(200)])
    kind = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=100, **kind)
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    # Behind the page's own statistics.
    place = content.index(b"c" * 50, column.data_page_offset + column.total_compressed_size // 2)
    path.write_bytes(content[:place] + b"x" + content[place + 1 :])
    with pytest.raises(DataError, match=r"row group 2, column 'completion': corrupt\n.*page(.|\n)*to do: .*anew"):
        load_rows(str(path))


@pytest.mark.parametrize("source", ["data/*.jsonl", "missing.parquet", "missing.jsonl.gz"])
def test_what_is_not_there_is_not_sought_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"no file fits|does not exist"):
        load_rows(source)


def test_a_hub_name_takes_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((*args, kwargs["split"], kwargs["revision"]))
        return JSON_LINES

    monkeypatch.setattr("datasets.load_dataset", load)
    load_rows("openai/gsm8k:main", "test")
    load_rows(DataSource("openai/gsm8k", name="socratic", split="train[:10%]", revision="v1"), "test")
    assert calls == [("openai/gsm8k", "main", "test", None), ("openai/gsm8k", "socratic", "train[:10%]", "v1")]


def test_a_stream_has_no_slices() -> None:
    with pytest.raises(DataError, match="a stream has no slices"):
        stream_rows("rows.jsonl", "train[:10]")


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"row_format": "sharegtp"}, {"sample_by": "word"}])
def test_a_data_sets_own_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} of data set rows"):
        DataSource("rows", **wrong)
