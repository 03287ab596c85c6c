from __future__ import annotations

import csv
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fourfold import pipeline
from fourfold.cli import app
from fourfold.config import RunConfig, load_config
from fourfold.config.search import SearchConfig
from fourfold.errors import ConfigError
from fourfold.inputs import find_run
from fourfold.memory.gpus import gpu_by_name
from fourfold.recording import read_run
from fourfold.report.glance import status_of
from fourfold.search.study import Refused
from fourfold.tuning import TrialRun, tune

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

SPACE = {"learning_rate": {"low": 1e-6, "high": 5e-2, "log": True}, "lora_r": [2, 4, 8]}


def study(tiny_run, folder: Path, **keys) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return tiny_run(folder, **({"output_dir": str(folder / "study"), "max_steps": 2, "eval_steps": 1} | keys))


@pytest.fixture(scope="module")
def tuned(tiny_run, tmp_path_factory):
    config = study(tiny_run, tmp_path_factory.mktemp("tuned"), learning_rate=1e-6)
    return config, tune(config, SearchConfig(space=SPACE, n_trials=4))


def test_the_best_configuration_trains_to_the_loss_that_the_search_found(tuned) -> None:
    _, result = tuned
    first, *_ = result.trials
    assert first.params == {"learning_rate": 1e-6, "lora_r": 4}
    (best,) = result.best
    loss = result.trials[best].values["eval_loss"]
    assert loss == min(trial.values["eval_loss"] for trial in result.trials if trial.values) < first.values["eval_loss"]
    chosen = load_config(result.configs[best])
    assert {key: getattr(chosen, key) for key in SPACE} == result.trials[best].params
    assert pipeline.train(chosen, "silent").metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_each_trial_is_a_run_without_its_checkpoints(tuned) -> None:
    _, result = tuned
    for trial in result.trials:
        folder = result.output_dir / f"trial-{trial.number:04d}"
        assert find_run(str(folder)).config.learning_rate == trial.params["learning_rate"]
        assert not list(folder.glob("checkpoint-*"))
        assert (folder / "report.html").is_file()


def test_tables_say_what_the_result_says(tuned) -> None:
    _, result = tuned
    rows = list(csv.DictReader((result.output_dir / "trials.csv").open()))
    assert [float(row["eval_loss"]) for row in rows] == [trial.values["eval_loss"] for trial in result.trials]
    written = json.loads((result.output_dir / "trials.json").read_text())
    assert [row["params"] for row in written] == [trial.params for trial in result.trials]


def test_the_page_holds_optunas_plots_and_needs_no_other_file(tuned) -> None:
    _, result = tuned
    page = result.page.read_text()
    titles = set(re.findall(r"<h2>(.*?)</h2>", page))
    assert {"Course of the search", "What matters", "Each key by itself", "While the trials trained"} <= titles
    assert page.count("<svg") >= 5
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert len(re.findall(r'id="([^"]+)"', page)) == len(set(re.findall(r'id="([^"]+)"', page)))


def test_started_again_it_runs_what_is_missing_alone(tuned) -> None:
    config, result = tuned
    again = tune(config, SearchConfig(space=SPACE, n_trials=4))
    assert again.trials == result.trials
    longer = tune(config, SearchConfig(space=SPACE, n_trials=5))
    assert longer.trials[:4] == result.trials
    assert len(longer.trials) == 5


def test_a_pruned_run_says_so_on_its_page_and_leaves_no_result(tiny_run, tmp_path) -> None:
    # After a first step without any warm-up, a rate of nothing is behind the others.
    space = {"learning_rate": [3e-2, 2e-2, 1e-2, 1e-9]}
    config = study(tiny_run, tmp_path, learning_rate=3e-2, warmup_steps=0)
    result = tune(config, SearchConfig(space=space, n_trials=6, sampler="random", seed=1))
    pruned = [trial for trial in result.trials if trial.outcome == "pruned"]
    assert pruned
    folder = result.output_dir / f"trial-{pruned[0].number:04d}"
    assert status_of(read_run(folder)).text == "Pruned"
    assert "Pruned" in (folder / "report.html").read_text()
    assert not (folder / "adapter").exists()
    assert "worse" in pruned[0].reason


def test_contradictions_and_targets_that_are_not_there_are_refused_and_counted(tiny_run, tmp_path) -> None:
    config = study(tiny_run, tmp_path, eval_steps=None)
    space = {"packing": [False, True], "group_by_length": [True], "target_modules": ["all-linear", ["no_proj"]]}
    result = tune(config, SearchConfig(space=space, n_trials=6, sampler="random", seed=2))
    assert len(result.trials) == 6
    for trial in result.trials:
        sound = not trial.params["packing"] and trial.params["target_modules"] == "all-linear"
        assert trial.outcome == ("finished" if sound else "refused"), trial
    reasons = " ".join(trial.reason or "" for trial in result.trials)
    assert "packing" in reasons or "group_by_length" in reasons
    assert "no_proj" in reasons


def test_several_objectives_leave_a_configuration_for_each_point_of_the_front(tiny_run, tmp_path) -> None:
    config = study(tiny_run, tmp_path, eval_steps=None)
    search = SearchConfig(space=SPACE, n_trials=2, objectives=["eval_loss", "train_seconds", "memory_peak_bytes"])
    result = tune(config, search)
    assert result.best
    assert set(result.configs) == set(result.best)
    for number, path in result.configs.items():
        assert path == result.output_dir / "pareto" / f"trial-{number:04d}.yaml"
        assert load_config(path).lora_r == result.trials[number].params["lora_r"]
    assert "Pareto front" in result.page.read_text()


def test_a_search_of_which_nothing_is_possible_says_why(tiny_run, tmp_path) -> None:
    config = study(tiny_run, tmp_path)
    with pytest.raises(ConfigError, match="none of 2 trials") as caught:
        tune(config, SearchConfig(space={"target_modules": [["no_proj"]]}, n_trials=2))
    assert "no_proj" in caught.value.found


def test_what_does_not_fit_the_gpu_is_refused_before_anything_is_loaded(llama, tmp_path) -> None:
    # There are neither weights nor rows: whatever is loaded would fail.
    config = RunConfig(model_name_or_path=str(llama), output_dir=str(tmp_path / "study"), train_dataset="no rows")
    objective = TrialRun(config, ("eval_loss",), gpu=gpu_by_name("4GB"))

    class Handle:
        number = 0

    with pytest.raises(Refused, match="GiB"):
        objective(Handle(), {"lora_r": 64})


MAIN = "from fourfold.cli import main; main()"


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "tune", str(path), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_loses_no_trial_and_an_interrupt_leaves_in_order(tiny_run, tmp_path) -> None:
    config = study(tiny_run, tmp_path, eval_steps=None)
    path = tmp_path / "run.yaml"
    search = {"space": {"lora_r": [2, 4, 8]}, "n_trials": 50}
    keys = {key: getattr(config, key) for key in config.model_fields_set}
    path.write_text(yaml.safe_dump(keys | {"search": search}))
    finished: list[list[dict]] = []
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(path)
        # Other lines may be of libraries that greet.
        told = (line for line in process.stdout if re.match(r"trial \d+ finished", line))
        assert len(list(itertools.islice(told, 2))) == 2, process.communicate()
        time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        written = json.loads((tmp_path / "study" / "trials.json").read_text())
        finished.append([trial for trial in written if trial["outcome"] == "finished"])
    killed, interrupted = finished
    assert len(killed) >= 2
    assert interrupted[: len(killed)] == killed
    assert not any(trial["outcome"] == "running" for trial in written)
    count = len(interrupted) + 1
    done = CliRunner().invoke(app, ["tune", str(path), "--trials", str(count), "--json"])
    assert done.exit_code == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events] == ["trial", "result"]
    ended = [trial for trial in events[-1]["trials"] if trial["outcome"] == "finished"]
    assert len(ended) == count
    assert ended[: len(interrupted)] == interrupted
    # What ran when the first worker was killed, and the second interrupted, was tried again.
    assert sum(trial["retry_of"] is not None for trial in events[-1]["trials"]) >= 1
    said = CliRunner().invoke(app, ["tune", str(path), "--trials", str(count)])
    assert said.exit_code == 0
    assert "> " in said.stdout
    assert "fourfold train" in said.stdout


def test_a_corrupt_study_leaves_with_an_error_that_names_the_file(tiny_run, tmp_path) -> None:
    path = tmp_path / "run.yaml"
    config = study(tiny_run, tmp_path)
    keys = {key: getattr(config, key) for key in config.model_fields_set}
    path.write_text(yaml.safe_dump(keys | {"search": {"space": {"lora_r": [2, 4]}}}))
    journal = tmp_path / "study" / "study.journal"
    journal.parent.mkdir()
    journal.write_text("nonsense\n")
    done = CliRunner().invoke(app, ["tune", str(path)])
    assert done.exit_code == 1
    assert "corrupt" in done.stderr
    assert str(journal) in done.stderr
    assert journal.read_text() == "nonsense\n"
