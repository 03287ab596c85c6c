"""The trackers for real, each into a folder of the test: nothing is sent anywhere.

Those that are not installed are left out; that they are asked for by name is tested without them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import ConfigError
from fourfold.training import trackers
from fourfold.training.trackers import TRACKERS, tracking

pytestmark = pytest.mark.usefixtures("one_quiet_thread")
KEYS: dict[str, Any] = {
    "max_steps": 2,
    "logging_steps": 1,
    "eval_steps": 1,
    "run_name": "a run",
    "project": "a project",
    "sample_prompts": ["Anna paid 3 euros."],
    "sample_max_new_tokens": 2,
    "eval_generate_rows": 1,
    "eval_max_new_tokens": 2,
    "loraplus_lr_ratio": 4.0,
}


@pytest.fixture
def tracked_run(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], pipeline.Run]:
    """Trains with a tracker whose files lie in `tmp_path / "tracked"`."""
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"file:{folder}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)

    def train(tracker: str, **keys: Any) -> pipeline.Run:
        pytest.importorskip(tracker)
        return pipeline.train(tiny_run(tmp_path, **(KEYS | keys), report_to=[tracker]), progress="silent")

    return train


def wandb_records(log: bytes) -> Iterator[Any]:
    """The records of an offline run: 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    at, whole = 7, b""
    while at + 7 <= len(log):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def logged(run: pipeline.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_metrics_the_samples_and_what_was_measured(tracked_run) -> None:
    run = tracked_run("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run.output_dir / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/tokens_per_second", "train/memory_peak_bytes", "eval/loss"} <= scalars
    assert {"train/learning_rate/lora_B", "final/exact_match", "final/eval_loss"} <= scalars
    losses = [(one.step, one.value) for one in events.Scalars("train/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in logged(run) if "loss" in r]
    assert events.Scalars("final/exact_match")[0].step == 2
    texts = [one.tensor_proto.string_val[0].decode() for one in events.Tensors("samples/1/text_summary")]
    assert len(texts) == 2
    assert "Anna paid 3 euros." in texts[0]


def test_wandb_has_the_run_by_name_and_project(tracked_run, tmp_path: Path) -> None:
    run = tracked_run("wandb")
    import wandb

    assert wandb.run is None
    wandb.teardown()  # its own process writes the last of the file
    assert "WANDB_PROJECT" not in os.environ
    (file,) = (tmp_path / "tracked").glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(file.read_bytes()))
    (about,) = [record.run for record in records if record.HasField("run")]
    assert (about.display_name, about.project) == ("a run", "a project")
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records if record.HasField("history")]  # fmt: skip
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [r["loss"] for r in logged(run) if "loss" in r]
    assert sum("samples" in row for row in rows) == 2
    final = {update.key or update.nested_key[0]: json.loads(update.value_json) for record in records
             if record.HasField("summary") for update in record.summary.update}  # fmt: skip
    assert final["final/eval_loss"] == run.metrics["eval_loss"]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_mlflow_has_the_run_by_name_and_experiment(tracked_run) -> None:
    run = tracked_run("mlflow")
    import mlflow

    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("a project")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("a run", "FINISHED")
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(r["step"], r["loss"]) for r in logged(run) if "loss" in r]
    assert found.data.metrics["final/eval_loss"] == run.metrics["eval_loss"]
    text = Path(mlflow.artifacts.download_artifacts(run_id=found.info.run_id, artifact_path="samples/step-2.md"))
    assert "Anna paid 3 euros." in text.read_text()


def test_trackio_has_the_run_by_name_and_project(tracked_run) -> None:
    run = tracked_run("trackio")
    import trackio

    found = trackio.Api().runs("a project")
    assert [one.name for one in found] == ["a run"]
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("a project", "a run")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [r["loss"] for r in logged(run) if "loss" in r]
    assert sum("samples" in row for row in rows) == 2
    assert [row["final/eval_loss"] for row in rows if "final/eval_loss" in row] == [run.metrics["eval_loss"]]


def test_what_a_method_measures_after_training_begins_no_other_run(tracked_run, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pair = {
        "prompt": [{"role": "user", "content": "Anna paid."}],
        "chosen": [{"role": "assistant", "content": "1"}],
        "rejected": [{"role": "assistant", "content": "items?"}],
    }
    rows = str(tmp_path / "pairs.jsonl")
    Path(rows).write_text((json.dumps(pair) + "\n") * 8)
    keys = {"method": "dpo", "train_dataset": rows, "eval_dataset": rows, "eval_generate_rows": 0, "eval_steps": None}
    run = tracked_run("mlflow", **keys, max_steps=1)
    import mlflow

    client = mlflow.MlflowClient()
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert [one.info.run_name for one in runs] == ["a run"]
    assert runs[0].data.metrics["final/eval_rewards/margins"] == run.metrics["eval_rewards/margins"]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_asked_for_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    config = RunConfig(
        model_name_or_path="absent", train_dataset="absent", output_dir=str(tmp_path / "run"), report_to=[name]
    )
    with pytest.raises(ConfigError, match=rf"not installed(.|\n)*found: +{name}(.|\n)*pip install {name},"):
        pipeline.train(config, progress="silent")
    assert not (tmp_path / "run").exists()


def test_the_project_is_in_the_environment_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "before")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with tracking(["wandb", "mlflow"], "mine"):
        assert os.environ["WANDB_PROJECT"] == os.environ["MLFLOW_EXPERIMENT_NAME"] == "mine"
    assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "before"
    assert "WANDB_PROJECT" not in os.environ
    with tracking(["wandb", "mlflow"], None):
        assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "before"
        assert "WANDB_PROJECT" not in os.environ
