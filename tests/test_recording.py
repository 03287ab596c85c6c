from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fourfold.config import RunConfig, load_config
from fourfold.errors import CheckpointError, TrainingError
from fourfold.evaluation import Sample
from fourfold.pipeline import train
from fourfold.recording import Recorder, read_run, write_page
from fourfold.training.interrupt import TrainingInterrupted
from fourfold.training.journal import Journal, read_lines

TinyRun = Callable[..., RunConfig]


def write_lines(path: Path, *lines: object) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended."""
    config = tiny_run(tmp_path_factory.mktemp("recorded"), eval_generate_rows=2, eval_max_new_tokens=2, eval_steps=2)
    return train(config, progress="silent").output_dir


def test_a_run_leaves_a_page_of_all_that_was_asked(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    for words in ("Loss", "Learning rate", "Speed", "Memory", "Held-out answers", "Data", "Configuration", "Versions"):
        assert words in text
    record = read_run(run)
    assert record.events[0].name == "begin"
    assert record.events[-1].name == "end"
    assert len(record.answers) == 2
    assert [title for title, _ in record.data_reports] == ["Training rows", "Held-out rows"]
    assert record.data_reports[0][1]["rows_kept"] == 24
    assert record.versions["torch"]
    assert record.faults == []
    assert record.figures["train_seconds"] > 0


def test_the_page_is_written_anew_from_the_folder_alone(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "answers.jsonl"):
        (moved / name).write_bytes((run / name).read_bytes())
    page = write_page(moved)
    assert page.read_text(encoding="utf-8").count("<svg") == (run / "report.html").read_text(encoding="utf-8").count(
        "<svg"
    )
    assert [path.name for path in moved.glob(".*")] == []


def test_settings_are_every_key_and_those_given_are_marked(run: Path) -> None:
    record = read_run(run)
    config = load_config(run)
    assert [setting.key for setting in record.settings] == list(RunConfig.model_fields)
    changed = {setting.key for setting in record.settings if setting.is_changed}
    assert {"model_name_or_path", "train_dataset", "lora_r", "max_steps", "learning_rate", "device"} <= changed
    assert not {"seed", "lora_dropout", "bnb_4bit_quant_type", "packing"} & changed
    assert next(s for s in record.settings if s.key == "learning_rate").value == str(config.learning_rate)


def test_samples_of_texts_and_of_messages_are_read(run: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0})
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    write_lines(
        tmp_path / "samples.jsonl",
        {"step": 0, "prompt": "P", "answer": "A", "reference": None},
        {"step": 5, "prompt": messages, "answer": "B", "reference": "R"},
    )
    first, second = read_run(tmp_path).samples
    assert (first.prompt[0]["content"], first.reference) == ("P", None)
    assert ([turn["role"] for turn in second.prompt], second.reference) == (["system", "user"], "R")


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model_name_or_path: some/model\nno_such_key: 3\n")
    write_lines(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0}, "{", [1], {"loss": 1}, {"step": "x"}, {"step": 2})
    write_lines(tmp_path / "events.jsonl", {"event": "begin", "time": "yesterday", "planned": {"a": "b"}, "data": 3})
    write_lines(tmp_path / "samples.jsonl", {"step": None}, "nonsense")
    write_lines(tmp_path / "answers.jsonl", {"answer": 3})
    record = read_run(tmp_path)
    assert [fault.split(":")[0] for fault in record.faults] == ["metrics.jsonl", "samples.jsonl", "config.yaml"]
    assert record.faults[0] == "metrics.jsonl: 2 lines could not be read"
    assert [item["step"] for item in record.metrics] == [1, 2]
    assert {setting.key for setting in record.settings} == {"model_name_or_path", "no_such_key"}
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "2 lines could not be read" in page
    assert "some/model" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run at"):
        write_page(tmp_path)


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Recorder(tmp_path / "nowhere").refresh()
    assert "report.html was not written" in caplog.text


def test_why_a_run_stopped_is_noted_and_shown(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 3, "loss": 1.0})
    recorder = Recorder(tmp_path)
    with pytest.raises(TrainingInterrupted), recorder.watching():
        raise TrainingInterrupted(15, 3, tmp_path / "checkpoint-3")
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    with pytest.raises(TrainingError), recorder.watching():
        raise TrainingError("the loss is not finite")
    assert "the loss is not finite" in (tmp_path / "report.html").read_text()
    events, _ = read_lines(tmp_path / "events.jsonl")
    assert [(event["event"], event.get("step")) for event in events] == [("interrupted", 3), ("failed", None)]
    assert datetime.fromisoformat(events[0]["time"]).tzinfo == UTC


def test_a_resumed_run_keeps_its_events_and_a_new_one_does_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.open(0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "cut by a cra')
    journal.open(7)
    assert [event["event"] for event in read_lines(tmp_path / "events.jsonl")[0]] == ["begin", "resume"]
    assert read_lines(tmp_path / "events.jsonl")[1] == 0
    journal.open(0)
    assert [event["event"] for event in read_lines(tmp_path / "events.jsonl")[0]] == ["begin"]


def test_no_second_process_writes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, is_main=False)
    with recorder.watching():
        recorder.step_down(None, {})
        recorder.end(1, {}, [Sample([], "", "", True)])
    assert list(tmp_path.iterdir()) == []
