"""Runs whose rows are streamed: exact to the bit where they go on, and refused where something does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.data import DataOptions
from fourfold.data.sources import DataSource
from fourfold.data.stream import RowStream
from fourfold.errors import CheckpointError, ConfigError, DataError
from fourfold.examining import examine_data
from fourfold.training.run_folder import METRICS_FILE
from fourfold.training.streamed import StreamedBatches

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

# 24 rows are six batches: a run of 9 steps comes into the second epoch, and a checkpoint lies in the middle of each.
STREAMED: dict[str, Any] = {
    "streaming": True,
    "streaming_buffer_size": 7,
    "max_steps": 9,
    "save_steps": 4,
    "logging_steps": 1,
    "save_total_limit": None,
    "lora_dropout": 0.1,
    "eval_dataset": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "packed": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "mixture, read ahead": {"dataloader_num_workers": 1},
}


def write_rows(path: Path, count: int) -> Path:
    rows = [
        [
            {"role": "user", "content": f"What is {index}?"},
            {"role": "assistant", "content": "a number " * (index % 4 + 1)},
        ]
        for index in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def made(tiny_run: Any, folder: Path, kind: str, **keys: Any) -> RunConfig:
    config: RunConfig = tiny_run(folder, **(STREAMED | KINDS[kind] | keys))
    if "mixture" not in kind:
        return config
    for name, count in (("a", 7), ("b", 5)):
        write_rows(folder / f"more-{name}.jsonl", count)
    parts = [
        {"path": str(folder / "train.jsonl"), "weight": 1.0},
        {"path": str(folder / "more-*.jsonl"), "weight": 2.0},
    ]
    return RunConfig(**(config.model_dump() | {"train_dataset": parts, "target_modules": None}))


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over unpacked rows that nothing stopped."""
    return pipeline.train(made(tiny_run, tmp_path_factory.mktemp("whole"), "rows"), progress="silent").output_dir


@pytest.mark.parametrize(("kind", "step"), [("rows", 8), ("packed", 4), ("mixture, read ahead", 4)])
def test_a_stopped_run_that_goes_on_is_the_one_that_was_not_to_the_last_bit(
    tiny_run: Any, tmp_path: Path, whole: Path, kind: str, step: int
) -> None:
    folder = whole.parent if kind == "rows" else tmp_path
    if kind != "rows":
        whole = pipeline.train(made(tiny_run, folder, kind), progress="silent").output_dir
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(whole / f"checkpoint-{step}")}
    resumed = pipeline.train(made(tiny_run, folder, kind, **again), progress="silent").output_dir
    expected = losses(whole)
    # No two of them, so no rows come again and again.
    assert len(set(expected)) == 9
    # The log of the steps before came with the checkpoint.
    assert losses(resumed) == expected
    found = weights(resumed)
    assert all(torch.equal(found[name], value) for name, value in weights(whole).items())


def test_reading_ahead_changes_no_loss(tiny_run: Any, tmp_path: Path, whole: Path) -> None:
    keys = {"output_dir": str(tmp_path / "ahead"), "dataloader_num_workers": 1}
    ahead = pipeline.train(made(tiny_run, whole.parent, "rows", **keys), progress="silent").output_dir
    assert losses(ahead) == losses(whole)


def test_a_streamed_run_tells_its_epochs_and_its_report(tiny_run: Any, tmp_path: Path, capsys: Any) -> None:
    run = pipeline.train(made(tiny_run, tmp_path, "rows"))
    said = capsys.readouterr().out
    assert "train.jsonl: streamed in blocks of 7 rows; how many there are is not known" in said
    records = [json.loads(line) for line in (run.output_dir / METRICS_FILE).read_text().splitlines()]
    assert [record["epoch"] for record in records if "loss" in record] == [0.0] * 6 + [1.0] * 3
    assert "| streamed in blocks of | 7 |" in (run.output_dir / "README.md").read_text()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_steps": None}, "streaming(.|\n)*give max_steps"),
        ({"eval_dataset": None, "eval_split_fraction": 0.2}, "eval_split_fraction holds out"),
        ({"group_by_length": True}, "group_by_length sorts rows"),
        ({"method": "dpo"}, "dpo compares rows"),
        ({"dataset_num_proc": 2}, "dataset_num_proc tokenizes rows before"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers above 1"),
        ({"streaming": False, "streaming_buffer_size": 7}, "nothing is streamed"),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused_by_name(tiny_run: Any, tmp_path: Path, keys: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run(tmp_path, **({"streaming": True, "max_steps": 2} | keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"streaming_buffer_size": 100}, r"train\.jsonl, row 25(.|\n)*robot(.|\n)*assistant"),
        ({"max_length": 4}, r"nothing is left to learn from(.|\n)*24 rows overlong(.|\n)*max_length"),
        ({"train_dataset": "absent.jsonl"}, r"absent\.jsonl does not exist"),
    ],
)
def test_bad_rows_are_named_before_a_model_is_loaded(tiny_run: Any, tmp_path: Path, keys: Any, said: str) -> None:
    config = made(tiny_run, tmp_path, "rows", **keys)
    if "streaming_buffer_size" in keys:
        bad = {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write(json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=said):
        pipeline.train(config, progress="silent")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_stream_that_it_began_with(tiny_run: Any, tmp_path: Path, whole: Path) -> None:
    again = {"resume_from_checkpoint": str(whole / "checkpoint-4")}
    with pytest.raises(CheckpointError, match=r"another streaming_buffer_size(.|\n)*_size: 9(.|\n)*_size: 7"):
        pipeline.train(made(tiny_run, whole.parent, "rows", streaming_buffer_size=9, **again), progress="silent")
    plain = {"streaming": False, "streaming_buffer_size": 10_000}
    with pytest.raises(CheckpointError, match="were streamed"):
        pipeline.train(made(tiny_run, whole.parent, "rows", **plain, **again), progress="silent")
    unstreamed = made(tiny_run, tmp_path, "rows", max_steps=1, save_steps=1, **plain)
    again = {"resume_from_checkpoint": "auto", "output_dir": str(pipeline.train(unstreamed, "silent").output_dir)}
    with pytest.raises(CheckpointError, match="were not streamed"):
        pipeline.train(made(tiny_run, tmp_path, "rows", **again), progress="silent")


def test_a_stream_is_looked_at_by_its_first_rows(tiny_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fourfold.examining.NUM_STREAMED_ROWS", 5)
    seen = examine_data(made(tiny_run, tmp_path, "rows"))
    assert seen.is_sound
    assert seen.reports[0].rows_read == 5
    assert "only the first 5 rows" in seen.findings[0].what


def test_batches_of_all_processes_are_those_of_one(tiny_tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 21)

    def batches(size: int, index: int = 0, processes: int = 1, begin: Any = None) -> Any:
        stream = RowStream([DataSource(str(tmp_path / "rows.jsonl"))], tiny_tokenizer, DataOptions(), buffer_size=8)
        made = StreamedBatches(stream, lambda rows: {"rows": rows}, size, index, processes)
        made.begin = begin
        return iter(made)

    alone, both = batches(4), [batches(2, 0, 2), batches(2, 1, 2)]
    for number in range(12):
        expected = next(alone)
        shares = [next(one) for one in both]
        assert [row for pair in zip(*(one["rows"] for one in shares), strict=True) for row in pair] == expected["rows"]
        # A checkpoint is the main process's, and good for all; for another number of them, too.
        assert shares[0]["place_in_stream"] == shares[1]["place_in_stream"] == expected["place_in_stream"]
        if number in (4, 5):
            place = json.loads(json.dumps(expected["place_in_stream"]))
            both = [batches(2, index, 2, place) for index in range(2)]
            alone = batches(4, begin=place)


def test_a_stream_of_nothing_to_learn_from_ends(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataSource(str(write_rows(tmp_path / "rows.jsonl", 5)))
    batches = StreamedBatches(RowStream([source], tiny_tokenizer, DataOptions(max_length=3)), lambda rows: {}, 2)
    with pytest.raises(DataError, match="no row that can be learned from"):
        next(iter(batches))
    monkeypatch.setattr("fourfold.training.streamed.get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ConfigError, match="dataloader_num_workers: 2"):
        next(iter(batches))
