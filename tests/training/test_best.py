"""The best checkpoint, and stopping early: what is kept, what is left, and a run that goes on counts on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from fourfold.errors import ConfigError, TrainingError
from fourfold.training.best import BestOptions, best_of, evaluation_is_due
from fourfold.training.checkpoint import list_checkpoints, prune_checkpoints
from fourfold.training.trainer import FourfoldTrainer


class Scripted(TrainerCallback):
    """Weights are copied after each step; evaluations have figures of this list, by their step."""

    def __init__(self, figures: dict[int, float]) -> None:
        self.figures = figures
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = tiny.adapter_weights(model)


def run(
    folder: Path, figures: list[float], resume: str | None = None, model: Any = None, **options: Any
) -> tuple[FourfoldTrainer, Scripted]:
    """Evaluated after every step, with those figures in turn."""
    script = Scripted(dict(enumerate(figures, start=1)))
    chosen = {"max_steps": len(figures), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    chosen |= {"save_steps": 3, "save_total_limit": 1, "best": BestOptions(load_at_end=True)}
    trainer = tiny.trainer(folder, model, eval_dataset=tiny.rows(2), callbacks=(script,), **(chosen | options))
    loop = trainer.evaluation_loop

    def scripted(*args: Any, **kwargs: Any) -> Any:
        output = loop(*args, **kwargs)
        output.metrics["eval_loss"] = script.figures[trainer.state.global_step]
        return output

    trainer.evaluation_loop = scripted  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=resume)
    return trainer, script


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(folder)]


def test_the_best_step_is_saved_kept_and_left_though_no_save_falls_on_it(tmp_path: Path) -> None:
    trainer, script = run(tmp_path, [3.0, 1.0, 2.0, 2.0, 1.5, 1.6, 1.7])
    assert best_of(trainer) == {"best_step": 2, "best_metric": 1.0}
    left = tiny.adapter_weights(trainer.model)
    assert all(torch.equal(left[name], value) for name, value in script.weights[2].items())
    assert not all(torch.equal(left[name], value) for name, value in script.weights[7].items())
    # The newest, from which the run would go on, and the best.
    assert steps(tmp_path) == [2, 7]


def test_without_it_the_last_weights_are_left(tmp_path: Path) -> None:
    trainer, script = run(tmp_path, [3.0, 1.0, 2.0], best=BestOptions())
    assert best_of(trainer) == {}
    left = tiny.adapter_weights(trainer.model)
    assert all(torch.equal(left[name], value) for name, value in script.weights[3].items())
    assert steps(tmp_path) == [3]


def test_a_figure_that_is_better_when_greater(tmp_path: Path) -> None:
    best = BestOptions(load_at_end=True, metric="mean_token_accuracy")
    trainer, _ = run(tmp_path, [3.0, 1.0, 2.0], best=best)
    history = [e["eval_mean_token_accuracy"] for e in trainer.state.log_history if "eval_mean_token_accuracy" in e]
    assert best_of(trainer)["best_metric"] == max(history)
    assert BestOptions(metric="eval_rewards/accuracies", load_at_end=True).trainer_arguments()["greater_is_better"]


def test_all_weights_of_a_model_are_left_as_in_its_best_checkpoint(tmp_path: Path) -> None:
    trainer, script = run(tmp_path, [3.0, 1.0, 2.0], model=tiny.base_model())
    assert best_of(trainer)["best_step"] == 2
    left = tiny.adapter_weights(trainer.model)
    assert len(left) > 10
    assert all(torch.equal(left[name], value) for name, value in script.weights[2].items())


@pytest.mark.parametrize(
    ("figures", "options", "stopped"),
    [
        ([3, 2, 2.5, 2.2, 1, 1], {"patience": 2}, 4),
        ([3, 2, 2.5, 1.9, 1, 1, 1], {"patience": 2}, 7),
        ([3, 2, 1.95, 1.94, 1, 1], {"patience": 2, "threshold": 0.1}, 4),
        ([3, 2, 1, 0.5], {"patience": 1}, 4),
    ],
)
def test_training_stops_after_as_many_evaluations_that_are_not_better(
    tmp_path: Path, figures: list[float], options: dict[str, Any], stopped: int
) -> None:
    trainer, _ = run(tmp_path, figures, best=BestOptions(**options))
    assert trainer.state.global_step == stopped


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_that_goes_on_stops_where_it_would_have(tmp_path: Path, step: int) -> None:
    figures = [3, 1, 2, 1.5, 2, 2, 2]
    best = BestOptions(patience=3, load_at_end=True)
    whole, _ = run(tmp_path / "whole", figures, best=best, save_steps=1, save_total_limit=None)
    again, _ = run(tmp_path / "again", figures, f"{tmp_path}/whole/checkpoint-{step}", best=best)
    assert whole.state.global_step == again.state.global_step == 5
    assert best_of(whole) == best_of(again) == {"best_step": 2, "best_metric": 1}
    left = tiny.adapter_weights(again.model)
    assert all(torch.equal(left[name], value) for name, value in tiny.adapter_weights(whole.model).items())


def test_a_run_that_was_stopped_early_makes_no_step_more(tmp_path: Path) -> None:
    best = BestOptions(patience=1, load_at_end=True)
    run(tmp_path, [1, 2, 3], best=best, save_steps=1)
    again, script = run(tmp_path, [1, 2, 3], "auto", best=best)
    assert again.state.global_step == 2
    assert script.weights == {}
    assert best_of(again)["best_step"] == 1
    _, script = run(tmp_path, [1, 2, 3], "auto", best=BestOptions(patience=2, load_at_end=True))
    assert list(script.weights) == [3]


def test_a_finished_run_makes_no_step_more(tmp_path: Path) -> None:
    run(tmp_path, [1.0, 2.0, 3.0])
    again, script = run(tmp_path, [1.0, 2.0, 3.0], "auto")
    assert again.state.global_step == 3
    assert script.weights == {}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_that_was_due_is_made_up_for(tmp_path: Path, strategy: str) -> None:
    """An interrupted run saves without evaluating; its counts must not miss that evaluation."""
    options: dict[str, Any] = {"dataset": tiny.rows(2), "eval_strategy": strategy}
    best = BestOptions(patience=2, load_at_end=True)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer._interrupt.request(2, None)

    script = [1.0, 2.0, 3.0, 4.0]
    whole, _ = run(tmp_path / "whole", script, best=best, **options)
    assert whole.state.global_step == 3
    trainer = tiny.trainer(tmp_path / "cut", max_steps=4, eval_dataset=tiny.rows(2), eval_steps=1, **options,
                           save_strategy="steps", save_steps=9, callbacks=(Interrupt(),), best=best)  # fmt: skip
    figures = iter(script)
    loop = trainer.evaluation_loop

    def scripted(*args: Any, **kwargs: Any) -> Any:
        output = loop(*args, **kwargs)
        output.metrics["eval_loss"] = next(figures)
        return output

    trainer.evaluation_loop = scripted  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="interrupted after step 3"):
        trainer.train()
    again, made = run(tmp_path / "cut", script, "auto", best=best, **options)
    assert again.state.global_step == 3
    assert made.weights == {}
    assert best_of(again) == best_of(whole)


def test_an_evaluation_of_which_a_set_is_missing_is_due(tmp_path: Path) -> None:
    sets = {"a": tiny.rows(2), "b": tiny.rows(2)}
    trainer = tiny.trainer(tmp_path, eval_dataset=sets, max_steps=1, eval_strategy="steps", eval_steps=1,
                           save_strategy="steps", save_steps=1)  # fmt: skip
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert not evaluation_is_due(checkpoint, trainer.args, sets)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "eval_b_loss" not in entry]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert evaluation_is_due(checkpoint, trainer.args, sets)
    assert not evaluation_is_due(checkpoint, trainer.args, {"a": 0})


def test_evaluating_changes_no_step(tmp_path: Path) -> None:
    def losses(**options: Any) -> list[float]:
        trainer = tiny.trainer(
            tmp_path, tiny.peft_model(dropout=0.1), eval_dataset=tiny.rows(2), max_steps=5, **options
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses() == losses(eval_strategy="steps", eval_steps=2)


def test_the_best_gives_way_to_none_and_the_newest_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune_checkpoints(tmp_path, 3, best=str(tmp_path / "checkpoint-1"))
    assert steps(tmp_path) == [1, 3, 4]
    prune_checkpoints(tmp_path, 1, best=str(tmp_path / "checkpoint-1"))
    assert steps(tmp_path) == [1, 4]
    prune_checkpoints(tmp_path, 1, best=str(tmp_path / "checkpoint-4"))
    assert steps(tmp_path) == [4]


def test_an_unknown_figure_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no figure of the evaluation(.|\n)*eval_nothing(.|\n)*eval_loss"):
        run(tmp_path, [1.0], best=BestOptions(load_at_end=True, metric="nothing"))


def test_what_cannot_be_best_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best of no evaluations"):
        tiny.trainer(tmp_path, best=BestOptions(load_at_end=True))
    with pytest.raises(ConfigError, match="takes checkpoints"):
        run(tmp_path, [1.0], save_strategy="no")
    with pytest.raises(ConfigError, match="early_stopping_patience"):
        BestOptions(patience=0)
