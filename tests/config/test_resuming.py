from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.config import RunConfig, resuming
from fourfold.config.resuming import Resumption, changes
from fourfold.errors import ConfigError

BEGUN = RunConfig(
    model_name_or_path="m", train_dataset="rows.jsonl", eval_dataset="held.jsonl", max_steps=4, optim="adamw"
)


def changed(begun: RunConfig = BEGUN, **keys: Any):
    return changes(begun, begun.model_copy(update=keys), Path("run/config.yaml"))


def test_nothing_is_told_of_a_run_that_goes_on_as_it_was() -> None:
    started = {"resume_from_checkpoint": "auto", "overwrite_output_dir": True, "output_dir": "other"}
    assert changed(**started, train_dataset="./rows.jsonl") == []
    assert Resumption("run/checkpoint-2", []).lines() == ["going on from run/checkpoint-2"]


def test_changes_are_told_with_both_values_and_those_that_matter_first() -> None:
    found = changed(logging_steps=3, max_steps=8, max_grad_norm=0.5, report_to=["wandb"])
    assert {change.key: change.matters for change in found} == {
        "logging_steps": False,
        "max_steps": True,
        "max_grad_norm": True,
        "report_to": False,
    }
    assert Resumption("c", found).lines() == [
        "going on from c",
        "  changed, and with it the run from here on: max_steps 4 -> 8, max_grad_norm 1.0 -> 0.5",
        "  changed: logging_steps 10 -> 3, report_to [] -> ['wandb']",
    ]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"lora_r": 8}, r"lora_r 16 -> 8(.|\n)*it holds that adapter"),
        ({"target_modules": ["q_proj"]}, r"target_modules null -> \['q_proj'\]"),
        ({"method": "dpo", "model_name_or_path": "n"}, r"another method, model_name_or_path(.|\n)*method sft -> dpo"),
        ({"bnb_4bit_quant_type": "fp4"}, "belongs to that base"),
        ({"seed": 1}, r"seed 42 -> 1(.|\n)*a place in those rows"),
        ({"train_dataset": "others.jsonl"}, r"rows.jsonl -> others.jsonl(.|\n)*change its place in run/config.yaml"),
        ({"learning_rate": 1e-3}, "its optimizer has them"),
        ({"gradient_accumulation_steps": 8}, "steps of so many rows"),
        ({"optim": "adamw_8bit"}, "that optimizer's state"),
    ],
)
def test_what_the_checkpoint_belongs_to_cannot_change(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        changed(**keys)


def test_what_leaves_steps_and_state_as_they_are_may_change() -> None:
    found = changed(per_device_train_batch_size=2, gradient_accumulation_steps=8, optim="paged_adamw_32bit")
    assert {change.key: change.matters for change in found} == {
        "per_device_train_batch_size": True,
        "gradient_accumulation_steps": True,
        "optim": False,
    }


def test_the_figure_of_the_best_cannot_change_once_there_is_one() -> None:
    best = BEGUN.model_copy(update={"load_best_model_at_end": True})
    assert [change.key for change in changed(best, metric_for_best_model="eval_loss")] == ["metric_for_best_model"]
    with pytest.raises(ConfigError, match="best figure so far"):
        changed(best, metric_for_best_model="mean_token_accuracy")
    new = {"load_best_model_at_end": True, "metric_for_best_model": "mean_token_accuracy"}
    assert len(changed(**new)) == 2
    assert [change.matters for change in changed(eval_steps=3)] == [False]
    assert [change.matters for change in changed(best, eval_steps=3)] == [True]


def test_every_key_that_is_named_is_one_of_the_configuration() -> None:
    named = {*resuming._FIXED, *resuming._STARTED, *resuming._OF_NO_ACCOUNT, *resuming._OF_EVALUATIONS}
    assert named <= RunConfig.model_fields.keys()
    assert not resuming._FIXED.keys() & resuming._OF_NO_ACCOUNT
