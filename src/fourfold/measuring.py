"""What a model's quality is measured by, and what a run's log comes to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.data import Collator, PreparedData
from fourfold.errors import ConfigError
from fourfold.evaluation import Sample
from fourfold.evaluation.tasks import HeldOutRows, asked, check_tasks, run_tasks
from fourfold.memory.planner import Plan
from fourfold.training.evaluation_sets import prefix_of
from fourfold.training.out_of_memory import by_kind, compare_parts, part_key
from fourfold.training.run_folder import mean_loss

__all__ = [
    "account_memory",
    "check_measures",
    "held_out_rows",
    "measure",
    "planned_memory",
    "require_measures",
    "summary",
]


# Figures of an evaluation that sum a run up.
_EVALUATED = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")


def measure(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Mapping[str, PreparedData],
    say: Callable[[str], None],
    *,
    with_loss: bool,
) -> tuple[dict[str, Any], list[Sample]]:
    """What the configuration asks to be measured, see `fourfold.evaluation.tasks`.

    Args:
        config: Which measures, and how.
        model: A model, with its adapter or without.
        tokenizer: The model's.
        eval_data: Sets of held-out rows by name; one that needs none has "".
        say: Is given a line for people before what takes long.
        with_loss: False where the loss is known already. That of methods that compare answers is their trainer's.

    Returns:
        Figures by name, and the rows that were compared by generation.

    Raises:
        FourfoldError: As the tasks do.
    """
    without = () if with_loss and config.method not in PREFERENCE_METHODS else ("loss",)
    measured = run_tasks(
        model, tokenizer, choices.evaluation_options(config), held_out_rows(tokenizer, eval_data), say, without
    )
    metrics = {name: value for one in measured.values() for name, value in one.metrics.items()}
    return metrics, [sample for one in measured.values() for sample in one.samples]


def held_out_rows(tokenizer: PreTrainedTokenizerBase, eval_data: Mapping[str, PreparedData]) -> list[HeldOutRows]:
    """Sets of held-out rows, as tasks of evaluation take them."""
    collator = Collator(tokenizer.pad_token_id)
    return [HeldOutRows(data.dataset, collator, prefix_of(name)) for name, data in eval_data.items()]


def check_measures(config: RunConfig) -> list[str]:
    """Find what would make a task of evaluation fail, before a model is loaded.

    Returns:
        The tasks that are asked for.

    Raises:
        ConfigError: What a task needs is not installed.
        DataError: A file that is missing, empty or not of its form.
    """
    options = choices.evaluation_options(config)
    num_sets = len(choices.eval_datasets(config)) or int(config.eval_split_fraction > 0)
    check_tasks(options, num_sets)
    return asked(options, num_sets)


def require_measures(config: RunConfig) -> None:
    """`check_measures`, and ConfigError where nothing is asked for."""
    if not check_measures(config):
        keys = ("eval_dataset", "eval_split_fraction", "perplexity_text", "multiple_choice_dataset", "harness_tasks")
        raise ConfigError("there is nothing to evaluate on", allowed=keys)


def account_memory(
    planned: Plan | None, parts: Mapping[str, int], say: Callable[[str], None], *, is_sum: bool
) -> dict[str, int]:
    """The peak of training by part, beside what was planned.

    Args:
        planned: What the run kept to; None: nothing.
        parts: What was in use, see `training.out_of_memory.parts_in_use`.
        say: Is given the comparison, line by line.
        is_sum: Whether the parts add up to what was measured, as they do on GPUs: elsewhere the process is measured.

    Returns:
        Bytes, by the names of the log: memory_peak_bytes, memory_weights_bytes, ... and planned_peak_bytes,
        planned_memory_weights_bytes, ...
    """
    figures: dict[str, int] = {}
    peak = sum(parts.values())
    if is_sum:
        figures = {"memory_peak_bytes": peak} | {part_key(part): size for part, size in parts.items()}
    if planned is not None and planned.chosen is not None:
        expected = planned.chosen.footprint
        figures |= planned_memory(planned)
        say(f"peak of memory {peak / 2**30:.2f} GiB, planned {expected.peak_bytes / 2**30:.2f} GiB")
        for line in compare_parts(expected.parts, parts):
            say(line)
    return figures


def planned_memory(planned: Plan | None) -> dict[str, int]:
    """Bytes of a plan, if there is one, by the names of the log: planned_peak_bytes, ...; see `account_memory`."""
    if planned is None or planned.chosen is None:
        return {}
    expected = planned.chosen.footprint
    parts = {f"planned_{part_key(part)}": size for part, size in by_kind(expected.parts).items()}
    return {"planned_peak_bytes": expected.peak_bytes} | parts


def summary(records: list[dict[str, Any]], sets: Iterable[str] = ("",), step: int | None = None) -> dict[str, Any]:
    """Of a run's log: mean loss over all steps, last evaluation of each set, highest memory and median speed.

    Args:
        records: The log.
        sets: Names of the sets of held-out rows.
        step: That of the evaluation which counts; None: the last one.
    """
    result: dict[str, Any] = {}
    train_loss = mean_loss(records)
    if train_loss is not None:
        result["train_loss"] = train_loss
    for name in sets:
        for key in (f"{prefix_of(name)}_{figure}" for figure in _EVALUATED):
            for record in records:
                if record.get(key) is not None and step in (None, record["step"]):
                    result[key] = record[key]
    choices_of: tuple[tuple[str, Callable[[list[Any]], Any]], ...] = (
        ("memory_peak_bytes", max),
        ("tokens_per_second", statistics.median),
    )
    for key, choose in choices_of:
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            result[key] = choose(values)
    return result
