"""What a model's quality is measured by, and what a run's log comes to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.data import Collator, PreparedData
from fourfold.errors import DataError
from fourfold.evaluation import Sample, exact_match, perplexity, validation_loss
from fourfold.memory.planner import Plan
from fourfold.training.out_of_memory import by_kind, compare_parts, part_key
from fourfold.training.run_folder import mean_loss

__all__ = ["account_memory", "measure", "planned_memory", "summary"]


def measure(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: PreparedData | None,
    say: Callable[[str], None],
    *,
    with_loss: bool,
) -> tuple[dict[str, Any], list[Sample]]:
    """What the configuration asks to be measured: loss and exact match on held-out rows, perplexity of a text.

    Args:
        config: Which measures, and how.
        model: A model, with its adapter or without.
        tokenizer: The model's.
        eval_data: Held-out rows, or None.
        say: Is given a line for people before what takes long.
        with_loss: False where the loss is known already. That of methods that compare answers is their trainer's.

    Returns:
        Figures by name, and the rows that were compared by generation.

    Raises:
        DataError: There is no text where the configuration names one.
    """
    metrics: dict[str, Any] = {}
    samples: list[Sample] = []
    if eval_data is not None and with_loss and config.method not in PREFERENCE_METHODS:
        collator = Collator(tokenizer.pad_token_id)
        loss = validation_loss(model, eval_data.dataset, collator, config.per_device_eval_batch_size)
        metrics |= {"eval_loss": loss.loss, "eval_num_tokens": loss.num_tokens}
    if eval_data is not None and config.eval_generate_rows > 0:
        conversations = [row["messages"] for row in eval_data.dataset.select_columns("messages")]
        chosen = conversations[: config.eval_generate_rows]
        say(f"answering {len(chosen)} held-out rows")
        matched = exact_match(
            model, tokenizer, chosen, choices.generation_options(config), normalise=config.eval_comparison
        )
        metrics |= {"exact_match": matched.score, "exact_match_rows": matched.num_rows}
        samples = matched.samples
    if config.perplexity_text is not None:
        text = Path(config.perplexity_text)
        if not text.is_file():
            raise DataError(f"no such file: {text}", hint="key perplexity_text names a text file")
        measured = perplexity(
            model,
            tokenizer,
            text.read_text(encoding="utf-8"),
            max_length=config.perplexity_max_length,
            stride=config.perplexity_stride,
            max_tokens=config.perplexity_max_tokens,
        )
        metrics |= {"perplexity": measured.value, "perplexity_num_tokens": measured.num_tokens}
    return metrics, samples


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


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's log: mean loss over all steps, last evaluation loss, highest memory and median speed."""
    result: dict[str, Any] = {}
    train_loss = mean_loss(records)
    if train_loss is not None:
        result["train_loss"] = train_loss
    for key, choose in (
        ("eval_loss", lambda values: values[-1]),
        ("eval_accuracy", lambda values: values[-1]),
        ("eval_rewards/accuracies", lambda values: values[-1]),
        ("eval_rewards/margins", lambda values: values[-1]),
        ("memory_peak_bytes", max),
        ("tokens_per_second", statistics.median),
    ):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            result[key] = choose(values)
    return result
