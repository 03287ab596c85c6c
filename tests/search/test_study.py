from __future__ import annotations

import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from fourfold.config.search import SearchConfig
from fourfold.errors import CheckpointError, ConfigError, DataError, SaveError
from fourfold.search import workers
from fourfold.search.space import Choices, Range, SearchSpace
from fourfold.search.study import (
    PRUNERS,
    SAMPLERS,
    Handle,
    Pruned,
    Refused,
    best_trials,
    open_study,
    records,
    run_trials,
)

SPACE = SearchSpace({"learning_rate": Range(1e-5, 1e-1, log=True), "lora_r": Choices((4, 8, 16))})


def bowl(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
    """Least at a learning rate of 1e-3 and rank 8."""
    return {
        "loss": abs(math.log10(values["learning_rate"]) + 3) + abs(values["lora_r"] - 8) / 8,
        "seconds": values["lora_r"],
    }


def run(options, objective=bowl, space=SPACE, first=None):
    study = open_study(options, space, first)
    run_trials(study, options, space, objective)
    return study


def outcomes(study, options, space=SPACE) -> list[str]:
    return [record.outcome for record in records(study, options, space)]


def test_the_choices_of_the_configuration_are_the_tables_of_the_room() -> None:
    schema = SearchConfig.model_json_schema()["properties"]
    assert set(schema["sampler"]["enum"]) == set(SAMPLERS)
    assert set(schema["pruner"]["enum"]) == set(PRUNERS)


def test_a_study_gets_better_than_where_it_began(options) -> None:
    asked = options(n_trials=30)
    study = run(asked, first={"learning_rate": 1e-5, "lora_r": 16})
    first, *rest = records(study, asked, SPACE)
    assert first.params == {"learning_rate": 1e-5, "lora_r": 16}
    assert first.values["loss"] == pytest.approx(3)
    (best,) = best_trials(study)
    assert min(record.values["loss"] for record in rest) == study.best_value < 0.5
    assert rest[best - 1].params["lora_r"] == 8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_draws_the_same_and_a_new_start_goes_on_alike(options, tmp_path, sampler) -> None:
    def drawn(storage: str, *counts: int, seed: int = 0) -> list[dict[str, Any]]:
        for count in counts:
            asked = options(storage=str(tmp_path / storage), n_trials=count, sampler=sampler, seed=seed)
            study = run(asked)
        return [record.params for record in records(study, asked, SPACE)]

    whole = drawn("whole", 4)
    assert drawn("in parts", 1, 3, 4) == whole
    assert len({str(params) for params in whole}) == 4
    assert drawn("other", 4, seed=1) != whole


def test_hopeless_trials_are_pruned_by_what_they_report(options) -> None:
    def objective(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        loss = bowl(handle, values)["loss"]
        for step in range(3):
            if handle.is_hopeless(step, loss):
                raise Pruned(f"after step {step}")
        return {"loss": loss}

    asked = options(n_trials=20)
    study = run(asked, objective)
    ended = records(study, asked, SPACE)
    pruned = [record for record in ended if record.outcome == "pruned"]
    assert pruned
    assert all(record.reason == "after step 0" for record in pruned)
    # None of the first ones, with which the others are compared.
    assert {record.outcome for record in ended[: asked.num_startup]} == {"finished"}
    assert outcomes(run(options(n_trials=20, pruner="none", name="none"), objective), asked) == ["finished"] * 20


def test_refused_trials_count_and_say_why(options) -> None:
    def objective(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        if values["lora_r"] == 16:
            raise Refused("does not fit")
        return bowl(handle, values)

    asked = options(n_trials=12)
    study = run(asked, objective)
    ended = records(study, asked, SPACE)
    assert len(ended) == 12
    refused = [record for record in ended if record.outcome == "refused"]
    assert refused
    assert {record.reason for record in refused} == {"does not fit"}
    assert all(record.params["lora_r"] == 16 for record in refused)


def test_several_objectives_leave_the_pareto_front_though_some_are_refused(options) -> None:
    def objective(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        if values["learning_rate"] > 1e-2:
            raise Refused("too high")
        return bowl(handle, values)

    for sampler in SAMPLERS:
        asked = options(
            name=sampler, directions={"loss": "minimize", "seconds": "minimize"}, n_trials=15, sampler=sampler
        )
        study = run(asked, objective)
        ended = [record for record in records(study, asked, SPACE) if record.values]
        beaten = {
            one.number
            for one in ended
            for other in ended
            if all(other.values[name] <= one.values[name] for name in one.values) and other.values != one.values
        }
        assert set(best_trials(study)) == {record.number for record in ended} - beaten
        assert len(best_trials(study)) >= 2 or sampler == "random"


def test_a_figure_that_is_not_finite_prunes_and_one_that_is_missing_ends_the_search(options) -> None:
    asked = options(n_trials=2)
    assert outcomes(run(asked, lambda handle, values: {"loss": math.nan}), asked) == ["pruned"] * 2
    with pytest.raises(ConfigError, match="no figure loss") as caught:
        run(options(name="other"), lambda handle, values: {"los": 1.0})
    assert caught.value.allowed == ["los"]


def test_an_error_ends_the_worker_and_the_parameters_are_tried_again(options) -> None:
    def broken(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        if handle.number == 1:
            raise DataError("row 3 is broken")
        return bowl(handle, values)

    asked = options(n_trials=4)
    with pytest.raises(DataError):
        run(asked, broken)
    study = run(asked)
    ended = records(study, asked, SPACE)
    assert [record.outcome for record in ended] == ["finished", "failed", "finished", "finished", "finished"]
    assert ended[1].reason == "DataError: row 3 is broken"
    assert (ended[2].retry_of, ended[2].params) == (1, ended[1].params)


WORKER = """
import os, signal, sys, time
from pathlib import Path
from fourfold.search.space import Choices, Range, SearchSpace
from fourfold.search.study import StudyOptions, open_study, run_trials
space = SearchSpace({"learning_rate": Range(1e-5, 1e-1, log=True), "lora_r": Choices((4, 8, 16))})
folder, count, sleep = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
options = StudyOptions(
    name="study", storage=str(folder / "study.journal"), directions={"loss": "minimize"}, n_trials=count
)
study = open_study(options, space)
def objective(handle, values):
    (folder / f"begun-{handle.number}").touch()
    time.sleep(sleep if handle.number else 0)
    return {"loss": values["learning_rate"]}
run_trials(study, options, space, objective)
"""


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_kill_loses_no_finished_trial_and_the_one_that_ran_is_tried_again(options, tmp_path) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), "3", "60"]) as process:
        wait_for(tmp_path / "begun-1", process)
        process.send_signal(signal.SIGKILL)
    asked = options(n_trials=3)
    study = run(asked)
    ended = records(study, asked, SPACE)
    assert [record.outcome for record in ended] == ["finished", "failed", "finished", "finished"]
    assert ended[0].values == {"loss": ended[0].params["learning_rate"]}
    assert (ended[2].retry_of, ended[2].params) == (1, ended[1].params)


def test_workers_join_one_study_and_share_its_trials(options, tmp_path) -> None:
    words = [sys.executable, "-c", WORKER, str(tmp_path), "8", "0.2"]
    with subprocess.Popen(words) as first:
        wait_for(tmp_path / "begun-1", first)
        with subprocess.Popen(words) as second:
            assert (first.wait(60), second.wait(60)) == (0, 0)
    asked = options(n_trials=8)
    study = open_study(asked, SPACE)
    assert set(outcomes(study, asked)) == {"finished"}
    # Two may begin the last one at once.
    assert 8 <= len(study.trials) <= 9


def test_a_worker_elsewhere_is_dead_when_it_is_silent_for_long(options, monkeypatch) -> None:
    asked = options()
    study = open_study(asked, SPACE)
    trial = study.ask()
    SPACE.suggest(trial)
    monkeypatch.setattr(workers.socket, "gethostname", lambda: "elsewhere")
    with workers.beating(trial):
        pass
    monkeypatch.undo()
    assert workers.retire_abandoned(study) == []
    trial.set_user_attr(workers.BEAT, time.time() - workers.GRACE_SECONDS - 1)
    assert workers.retire_abandoned(study) == [0]
    assert outcomes(study, asked) == ["failed", "waiting"]


def test_a_trial_that_takes_its_worker_down_each_time_is_given_up(options) -> None:
    def deadly(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    asked = options()
    for _ in range(workers.MOST_RETRIES + 1):
        with pytest.raises(KeyboardInterrupt):
            run(asked, deadly)
    assert outcomes(open_study(asked, SPACE), asked) == ["failed"] * (workers.MOST_RETRIES + 1)


def test_another_space_direction_or_configuration_is_refused(options) -> None:
    run(options(n_trials=1, settings={"max_steps": 4}))
    other = SearchSpace({"learning_rate": Range(1e-5, 1e-2, log=True), "lora_r": Choices((4, 8, 16))})
    for words, asked, space in (
        ("another search space", options(settings={"max_steps": 4}), other),
        ("other objectives", options(directions={"loss": "maximize"}, settings={"max_steps": 4}), SPACE),
        ("another configuration", options(settings={"max_steps": 8}), SPACE),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            open_study(asked, space)
        assert caught.value.found
        assert caught.value.allowed
        assert "study_name" in caught.value.hint
    # How trials are drawn and how many there are may change.
    run(options(n_trials=2, settings={"max_steps": 4}, sampler="random", seed=3))


@pytest.mark.parametrize("text", ["no journal at all", "no journal\n", '{"a": 1}\n', '{"op_code": 0\n{"op_code": 1}\n'])
def test_a_corrupt_journal_is_named_and_left_as_it_is(options, text) -> None:
    asked = options()
    Path(asked.storage).write_text(text)
    with pytest.raises(CheckpointError, match="corrupt") as caught:
        open_study(asked, SPACE)
    assert asked.storage in str(caught.value)
    assert Path(asked.storage).read_text() == text


def test_a_line_that_a_crash_left_unfinished_is_cut_off(options) -> None:
    asked = options(n_trials=2)
    run(asked)
    with Path(asked.storage).open("a") as file:
        file.write('{"op_code":4,"worker_id":"9')
    asked = options(n_trials=4)
    assert outcomes(run(asked), asked) == ["finished"] * 4
    assert outcomes(open_study(asked, SPACE), asked) == ["finished"] * 4


def test_a_database_serves_and_says_when_it_is_locked_or_corrupt(options, tmp_path) -> None:
    path = tmp_path / "study.db"
    asked = options(storage=f"sqlite:///{path}?timeout=0.2", n_trials=2)
    study = run(asked)
    assert outcomes(study, asked) == ["finished"] * 2
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SaveError, match="locked") as caught:
            run(options(storage=asked.storage, n_trials=3))
        assert str(path) in str(caught.value)
        assert caught.value.hint
        other.rollback()
    assert outcomes(run(options(storage=asked.storage, n_trials=3)), asked) == ["finished"] * 3
    path.write_bytes(b"no database, but long enough to be looked at" * 100)
    with pytest.raises(CheckpointError, match="corrupt"):
        open_study(asked, SPACE)


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(options, tmp_path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(SaveError, match="cannot be used"):
        open_study(options(storage=str(folder / "study.journal")), SPACE)


def test_a_storage_that_cannot_be_there_is_named_and_a_trials_own_fault_is_not_its(options, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="cannot be used"):
        open_study(options(storage=str(tmp_path / "file" / "study.journal")), SPACE)

    def broken(handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        return {"loss": len((tmp_path / "no rows").read_text())}

    with pytest.raises(FileNotFoundError, match="no rows"):
        run(options(), broken)


def test_a_study_of_optunas_own_is_not_taken_over(options) -> None:
    asked = options()
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(asked.storage))
    optuna.create_study(storage=storage, study_name=asked.name).optimize(lambda trial: 0.0, n_trials=1)
    with pytest.raises(ConfigError, match="another program"):
        open_study(asked, SPACE)
