"""Runs whose rows are streamed: exact to the bit where they go on, and refused where something does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_rows
from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import CheckpointError, ConfigError, DataError
from fourfold.examining import examine_data
from fourfold.training.run_folder import METRICS_FILE

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
}
KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "packed": {"packing": True, "per_device_train_batch_size": 1},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "read ahead": {"dataloader_num_workers": 1},
    "mixture": {},
}


def made(tiny_run: Any, folder: Path, kind: str, **keys: Any) -> RunConfig:
    config: RunConfig = tiny_run(folder, **(STREAMED | KINDS[kind] | keys))
    if kind != "mixture":
        return config
    second = write_rows(folder / "more.jsonl", 10)
    parts = [{"path": str(folder / "train.jsonl"), "weight": 1.0}, {"path": str(second), "weight": 2.0}]
    return RunConfig(**(config.model_dump() | {"train_dataset": parts, "target_modules": None}))


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_that_goes_on_is_the_one_that_was_not_to_the_last_bit(
    tiny_run: Any, tmp_path: Path, kind: str
) -> None:
    whole = pipeline.train(made(tiny_run, tmp_path, kind), progress="silent").output_dir
    expected, last = losses(whole), weights(whole)
    assert len(expected) == 9
    for step in (4, 8):
        config = made(
            tiny_run,
            tmp_path,
            kind,
            output_dir=str(tmp_path / f"from-{step}"),
            resume_from_checkpoint=str(whole / f"checkpoint-{step}"),
        )
        resumed = pipeline.train(config, progress="silent").output_dir
        assert losses(resumed)[-(9 - step) :] == expected[step:]
        found = weights(resumed)
        assert all(torch.equal(found[name], value) for name, value in last.items())
    # And the rows are not those of the same batches again and again.
    assert len(set(expected)) == 9


def test_reading_ahead_changes_no_loss(tiny_run: Any, tmp_path: Path) -> None:
    here = pipeline.train(made(tiny_run, tmp_path, "rows"), progress="silent").output_dir
    ahead = made(tiny_run, tmp_path, "read ahead", output_dir=str(tmp_path / "ahead"))
    assert losses(pipeline.train(ahead, progress="silent").output_dir) == losses(here)


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


def test_bad_rows_are_named_before_a_model_is_loaded(tiny_run: Any, tmp_path: Path) -> None:
    config = made(tiny_run, tmp_path, "rows", model_name_or_path=tiny_run(tmp_path).model_name_or_path)
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl, row 25(.|\n)*robot(.|\n)*assistant"):
        pipeline.train(config.model_copy(update={"streaming_buffer_size": 100}), progress="silent")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"nothing is left to learn from(.|\n)*24 rows overlong(.|\n)*max_length"):
        write_rows(tmp_path / "train.jsonl", 24)
        pipeline.train(config.model_copy(update={"max_length": 4}), progress="silent")


def test_a_run_goes_on_with_the_stream_that_it_began_with(tiny_run: Any, tmp_path: Path) -> None:
    whole = pipeline.train(made(tiny_run, tmp_path, "rows", max_steps=4), progress="silent").output_dir
    again = {"resume_from_checkpoint": "auto", "output_dir": str(whole)}
    with pytest.raises(CheckpointError, match=r"another streaming_buffer_size(.|\n)*streaming_buffer_size: 9(.|\n)*: 7"):
        pipeline.train(made(tiny_run, tmp_path, "rows", streaming_buffer_size=9, **again), progress="silent")
    plain = {"streaming": False, "streaming_buffer_size": 10_000}
    with pytest.raises(CheckpointError, match="were streamed"):
        pipeline.train(made(tiny_run, tmp_path, "rows", **plain, **again), progress="silent")
    unstreamed = pipeline.train(tiny_run(tmp_path, output_dir=str(tmp_path / "plain")), progress="silent").output_dir
    again = {"resume_from_checkpoint": "auto", "output_dir": str(unstreamed)}
    with pytest.raises(CheckpointError, match="were not streamed"):
        pipeline.train(made(tiny_run, tmp_path, "rows", **again), progress="silent")


def test_a_stream_is_looked_at_by_its_first_rows(tiny_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fourfold.examining.NUM_STREAMED_ROWS", 5)
    seen = examine_data(made(tiny_run, tmp_path, "rows"))
    assert seen.is_sound
    assert seen.reports[0].rows_read == 5
    assert "only the first 5 rows" in seen.findings[0].what


def test_batches_of_all_processes_are_those_of_one(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from fourfold.data import DataOptions
    from fourfold.data.sources import DataSource
    from fourfold.data.stream import RowStream
    from fourfold.training.streamed import StreamedBatches

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


def test_a_stream_of_nothing_to_learn_from_ends(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from fourfold.data import DataOptions
    from fourfold.data.sources import DataSource
    from fourfold.data.stream import RowStream
    from fourfold.training.streamed import StreamedBatches

    source = DataSource(str(write_rows(tmp_path / "rows.jsonl", 5)))
    stream = RowStream([source], tiny_tokenizer, DataOptions(max_length=3))
    with pytest.raises(DataError, match="no row that can be learned from"):
        next(iter(StreamedBatches(stream, lambda rows: {"rows": rows}, 2)))
    with pytest.raises(ConfigError, match="dataloader_num_workers: 2"):
        next(iter(torch.utils.data.DataLoader(StreamedBatches(stream, dict, 2), batch_size=None, num_workers=2)))
