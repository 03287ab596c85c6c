from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader

from fourfold.data import DataOptions, prepare
from fourfold.data.sources import DataSource
from fourfold.data.stream import RowStream
from fourfold.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 40 and 30 rows in a folder, and one of 20 documents."""
    folder = tmp_path_factory.mktemp("streamed")
    (folder / "rows").mkdir()
    for name, first, last in (("a", 0, 40), ("b", 40, 70)):
        rows = [{"prompt": f"Say {number}", "completion": "x" * (number % 9 + 1)} for number in range(first, last)]
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"body": f"Document {number}. " * (number % 5)} for number in range(20)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "documents.parquet")
    return folder


def conversations(files: Path) -> list[DataSource]:
    return [DataSource(str(files / "rows"), weight=3)]


def mixture(files: Path) -> list[DataSource]:
    documents = DataSource(str(files / "documents.parquet"), weight=1, columns={"text": "body"})
    return [*conversations(files), documents]


def end_to_end(files: Path) -> list[DataSource]:
    return [DataSource(one.path, columns=one.columns) for one in mixture(files)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_gives_the_tokens_that_reading_gives_in_another_order(
    tiny_tokenizer: Any, files: Path, packing: bool
) -> None:
    options = DataOptions(max_length=96, packing=packing)
    stream = RowStream(conversations(files), tiny_tokenizer, options, buffer_size=16)
    rows = list(stream)
    plain = datasets.load_dataset("json", data_dir=str(files / "rows"), split="train")
    expected = prepare(plain, tiny_tokenizer, DataOptions(max_length=96), "rows").dataset
    parts = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) <= 96
        start = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            parts.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    wanted = [(row["input_ids"], row["labels"]) for row in expected]
    assert parts != wanted
    assert sorted(parts) == sorted(wanted)
    assert list(stream) != rows
    assert stream.epoch == 2


@pytest.mark.parametrize("sources", [conversations, mixture, end_to_end])
@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_stream_gives_the_rows_that_an_unbroken_one_gives(
    tiny_tokenizer: Any, files: Path, sources: Any, packing: bool
) -> None:
    def stream() -> RowStream:
        options = DataOptions(max_length=96, packing=packing)
        return RowStream(sources(files), tiny_tokenizer, options, buffer_size=12, seed=5)

    unbroken = stream()
    rows, states = [], []
    for epoch in range(2):
        for row in unbroken:
            rows.append((epoch, row))
            states.append(json.dumps(unbroken.state_dict()))
    for place in range(0, len(rows), max(1, len(rows) // 3)):
        resumed = stream()
        resumed.load_state_dict(json.loads(states[place]))
        epoch = rows[place][0]
        assert resumed.epoch == epoch
        assert list(resumed) == [row for its_epoch, row in rows[place + 1 :] if its_epoch == epoch]
        if epoch == 0:
            assert list(resumed) == [row for its_epoch, row in rows if its_epoch == 1]


def test_a_resumed_stream_can_be_broken_off_again(tiny_tokenizer: Any, files: Path) -> None:
    def stream(state: Any = None) -> RowStream:
        made = RowStream(conversations(files), tiny_tokenizer, DataOptions(), buffer_size=12)
        if state is not None:
            made.load_state_dict(state)
        return made

    expected = list(stream())
    found: list[Any] = []
    state = None
    while len(found) < len(expected):
        one = stream(state)
        for row, _ in zip(one, range(5), strict=False):
            found.append(row)
            state = one.state_dict()
    assert found == expected


def test_batches_read_ahead_are_given_again(tiny_tokenizer: Any, files: Path) -> None:
    def stream() -> RowStream:
        return RowStream(conversations(files), tiny_tokenizer, DataOptions(), buffer_size=12)

    first = stream()
    batches = iter(DataLoader(first, batch_size=4, collate_fn=list))
    used = [next(batches) for _ in range(5)][:4]
    second = stream()
    second.load_state_dict(first.state_dict(after=16))
    rest = list(DataLoader(second, batch_size=4, collate_fn=list))
    assert used + rest == list(DataLoader(stream(), batch_size=4, collate_fn=list))
    with pytest.raises(ValueError, match="lies outside"):
        first.state_dict(after=21)


def test_what_is_left_out_is_counted(tiny_tokenizer: Any, files: Path) -> None:
    stream = RowStream(mixture(files)[1:], tiny_tokenizer, DataOptions(max_length=8))
    list(stream)
    assert stream.dropped["empty"] == 4
    lengths = sorted(len(row["input_ids"]) for row in RowStream(conversations(files), tiny_tokenizer, DataOptions()))
    stream = RowStream(conversations(files), tiny_tokenizer, DataOptions(max_length=lengths[34]))
    kept = len(list(stream))
    assert 0 < stream.dropped["overlong"] == 70 - kept
    options = DataOptions(max_length=lengths[34], overlong="error")
    with pytest.raises(DataError, match=r"row \d+ is longer than max_length"):
        list(RowStream(conversations(files), tiny_tokenizer, options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n', r"row 2: key 'completion'"),
        ('{"prompt": "a", "completion": "b"}\n' * 3 + '{"prompt": \n', r"bad\.jsonl, line 4: not JSON"),
        ('{"a": "b"}\n', "fit no row format"),
        ('{"chosen": "a", "rejected": "b", "prompt": "c"}\n', "cannot be streamed"),
        ("", "is empty|cannot be read"),
    ],
)
def test_bad_rows_are_named(tiny_tokenizer: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(RowStream([DataSource(str(path))], tiny_tokenizer, DataOptions()))


def test_a_stream_is_not_read_by_workers(tiny_tokenizer: Any, files: Path) -> None:
    stream = RowStream(conversations(files), tiny_tokenizer, DataOptions())
    with pytest.raises(ConfigError, match="dataloader_num_workers"):
        next(iter(DataLoader(stream, num_workers=1, collate_fn=list)))
    with pytest.raises(ConfigError, match="streaming_buffer_size"):
        RowStream(conversations(files), tiny_tokenizer, DataOptions(), buffer_size=0)
