"""The keys that say what a model is measured by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field

from fourfold.config.types import Count, CountOrZero, as_list

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["EvaluationKeys", "evaluation_contradictions"]

TextMetric = Literal["rouge", "bleu", "chrf"]


class EvaluationKeys(BaseModel):
    """The part of RunConfig that says how a model is measured, beside the loss on held-out rows."""

    eval_generate_rows: CountOrZero = Field(
        0, description="Held-out rows to answer by generation and compare exactly; 0: none."
    )
    eval_max_new_tokens: Count = Field(256, description="Longest answer in that comparison, in tokens.")
    eval_generate_batch_size: Count = Field(16, description="Conversations answered at a time.")
    eval_comparison: Literal["strip", "json", "number"] = Field(
        "strip",
        description="When an answer is right: equal text, equal JSON value, or equal number after ####.",
    )
    eval_pattern: str | None = Field(
        None,
        min_length=1,
        description="Regular expression whose last match in an answer, or first group of it, is compared; null: all "
        "of the answer.",
    )
    eval_metrics: Annotated[list[TextMetric], BeforeValidator(as_list)] = Field(
        [], description="Measures of those answers' texts against the rows', besides."
    )
    perplexity_text: str | None = Field(None, min_length=1, description="Text file on which perplexity is measured.")
    perplexity_max_length: int = Field(1024, ge=2, description="Window of that measure, in tokens.")
    perplexity_stride: Count = Field(512, description="Tokens by which the window moves on.")
    perplexity_max_tokens: Count | None = Field(None, description="Tokens of the text to use; null: all.")
    multiple_choice_dataset: str | None = Field(
        None, min_length=1, description="Rows of question, choices and answer, of which the likeliest choice is taken."
    )
    multiple_choice_rows: Count | None = Field(None, description="How many of those rows; null: all.")
    harness_tasks: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(as_list)] = Field(
        [], description="Tasks of lm-evaluation-harness, by name or by YAML file."
    )
    harness_include_path: str | None = Field(None, min_length=1, description="Folder of more such tasks.")
    harness_num_fewshot: CountOrZero | None = Field(
        None, description="Examples before each of their questions; null: as the task has it."
    )
    harness_limit: Count | None = Field(None, description="Rows of each of those tasks; null: all.")
    eval_apply_chat_template: bool = Field(
        False, description="Ask the questions of multiple choice and of the harness by the chat template, not as texts."
    )


def evaluation_contradictions(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Keys of evaluation that do not fit together: the keys, what is wrong, what to do."""
    has_held_out = config.eval_dataset is not None or config.eval_split_fraction > 0
    if config.eval_generate_rows and not has_held_out:
        yield (
            ("eval_generate_rows", "eval_dataset", "eval_split_fraction"),
            "eval_generate_rows is given, but no rows are held out",
            "give eval_dataset or eval_split_fraction",
        )
    for key in ("eval_pattern", "eval_metrics"):
        if getattr(config, key) and not config.eval_generate_rows:
            yield (
                (key, "eval_generate_rows"),
                f"{key} is given, but no rows are answered",
                "give eval_generate_rows",
            )
    if config.eval_pattern is not None:
        try:
            re.compile(config.eval_pattern)
        except re.error as error:
            yield ("eval_pattern",), f"eval_pattern is no regular expression: {error}", "mend it, or escape its signs"
    if config.perplexity_stride >= config.perplexity_max_length:
        yield (
            ("perplexity_stride", "perplexity_max_length"),
            "perplexity_stride is not below perplexity_max_length: tokens between windows would be skipped",
            "lower perplexity_stride",
        )
    if config.multiple_choice_rows is not None and config.multiple_choice_dataset is None:
        yield (
            ("multiple_choice_rows", "multiple_choice_dataset"),
            "multiple_choice_rows is given, but no rows to take them of",
            "give multiple_choice_dataset",
        )
    for key in ("harness_include_path", "harness_num_fewshot", "harness_limit"):
        if getattr(config, key) is not None and not config.harness_tasks:
            yield (key, "harness_tasks"), f"{key} is given, but no task of the harness", "give harness_tasks"
