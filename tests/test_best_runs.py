"""The best checkpoint and early stopping in whole runs, over a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourfold import pipeline
from fourfold.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_quiet_thread")
# It learns in each step, so that the first one has the greatest loss.
UNLEARNT = {"greater_is_better": True, "eval_steps": 1, "save_steps": 2, "load_best_model_at_end": True}


def test_the_result_is_the_best_step_and_what_is_measured_is_it(tiny_run, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, **UNLEARNT, eval_generate_rows=1, eval_max_new_tokens=2)
    run = pipeline.train(config, progress="silent")
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    best = max(losses, key=losses.__getitem__)
    assert run.metrics["best_step"] == best < 4
    assert run.metrics["best_metric"] == run.metrics["eval_loss"] == losses[best]
    left = load_file(run.output_dir / "adapter" / "adapter_model.safetensors")
    saved = load_file(run.output_dir / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(left[name], value) for name, value in saved.items())
    assert [record["step"] for record in records if "exact_match" in record] == [best]
    assert f"| best_step | {best} |" in (run.output_dir / "README.md").read_text()
    measured = pipeline.evaluate(config, progress="silent")
    assert measured["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_a_run_stops_early_by_one_of_several_sets(tiny_run, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    sets = {"a": config.eval_dataset, "b": config.train_dataset}
    update = UNLEARNT | {"max_steps": 9, "eval_dataset": sets, "early_stopping_patience": 2}
    config = config.model_copy(update=update | {"metric_for_best_model": "a_loss"})
    run = pipeline.train(config, progress="silent")
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_a_loss"] for record in records if "eval_a_loss" in record}
    best = max(losses, key=losses.__getitem__)
    assert run.metrics["best_step"] == best
    of_best = {key: value for record in records if record["step"] == best for key, value in record.items()}
    assert run.metrics["eval_b_loss"] == of_best["eval_b_loss"]
    assert max(losses) == best + 2 < 9


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"eval_dataset": None, "early_stopping_patience": 1}, "no rows are held out"),
        ({"metric_for_best_model": "eval_loss"}, "nothing asks which evaluation is the best"),
        ({"early_stopping_threshold": 0.1}, "without early_stopping_patience"),
        ({"load_best_model_at_end": True, "requantize_every": 2}, "another base"),
        ({"load_best_model_at_end": True, "eval_dataset": {"a": "x", "b": "y"}}, "eval_a_loss, eval_b_loss"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tiny_run, tmp_path: Path, keys, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run(tmp_path, **keys)


def test_a_figure_that_evaluations_do_not_have_is_refused_before_anything_is_loaded(tiny_run, tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="rewards/margins", model_name_or_path="absent"
    )
    with pytest.raises(ConfigError, match=r"no figure of the evaluations(.|\n)*eval_loss"):
        pipeline.train(config, progress="silent")


def test_a_run_that_goes_on_tells_what_changed_and_refuses_what_cannot(tiny_run, tmp_path: Path, capsys) -> None:
    config = tiny_run(tmp_path, max_steps=2)
    pipeline.train(config, progress="silent")
    again = config.model_copy(update={"resume_from_checkpoint": "auto", "max_steps": 3})
    config_file = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"cannot go on with another lora_r, seed(.|\n)*lora_r 4 -> 8"):
        pipeline.train(again.model_copy(update={"lora_r": 8, "seed": 1}), progress="silent")
    assert (tmp_path / "run" / "config.yaml").read_text() == config_file
    pipeline.train(again, progress="json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (told,) = [event for event in events if event["event"] == "resume"]
    assert told["checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    assert told["changed"] == [{"key": "max_steps", "before": 2, "now": 3, "matters": True}]
