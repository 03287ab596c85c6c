"""RunConfig spells its choices out, so that reading one imports no torch. Here they meet the tables."""

from __future__ import annotations

import pytest

from fourfold.config import RunConfig


def choices(key: str) -> set[str]:
    schema = RunConfig.model_json_schema()["properties"][key]
    parts = schema.get("anyOf", [schema])
    return {value for part in parts for value in part.get("enum", part.get("items", {}).get("enum", []))}


@pytest.mark.parametrize(
    ("key", "module", "table", "of_the_configuration"),
    [
        ("optim", "fourfold.training.options", "OPTIMIZERS", set()),
        ("lr_scheduler_type", "fourfold.training.options", "LR_SCHEDULERS", set()),
        ("recompute", "fourfold.models.recomputation", "POLICIES", set()),
        ("method", "fourfold.training.methods", "METHODS", set()),
        ("report_to", "fourfold.training.trackers", "TRACKERS", set()),
        ("stream_base", "fourfold.models.streaming", "SOURCES", set()),
        ("distributed", "fourfold.training.distributed", "DISTRIBUTED", {"auto"}),
        ("row_format", "fourfold.data.row_formats", "ROW_FORMATS", {"auto"}),
        ("overlong", "fourfold.data.overlong", "OVERLONG", set()),
        ("eval_metrics", "fourfold.evaluation.text_metrics", "TEXT_METRICS", set()),
        ("eval_comparison", "fourfold.evaluation.exact_match", "COMPARISONS", set()),
    ],
)
def test_the_choices_are_the_rows_of_the_rooms_table(key, module, table, of_the_configuration):
    rows = getattr(pytest.importorskip(module), table)
    assert choices(key) == set(rows) | of_the_configuration


def test_the_losses_are_those_of_the_methods() -> None:
    from fourfold.training.methods import PREFERENCE_METHODS

    assert choices("loss_type") == set(PREFERENCE_METHODS["dpo"]) | set(PREFERENCE_METHODS["kto"])


def test_the_keys_of_each_task_are_keys_and_all_keys_of_evaluation_are_a_tasks() -> None:
    from fourfold.config.evaluation import EvaluationKeys
    from fourfold.evaluation.tasks import TASKS

    keys = {key for task in TASKS.values() for key in task.keys}
    assert keys <= RunConfig.model_fields.keys()
    assert EvaluationKeys.model_fields.keys() <= keys
