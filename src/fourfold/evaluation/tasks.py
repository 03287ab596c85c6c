"""What a model can be measured by. A task is a row of `TASKS`, whose options are keys of the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.data.sources import load_rows
from fourfold.errors import DataError
from fourfold.evaluation.exact_match import Sample, exact_match
from fourfold.evaluation.figures import Figure, mean_of, ratio, ratio_exp
from fourfold.evaluation.harness import HarnessOptions, check_harness, run_harness
from fourfold.evaluation.multiple_choice import Choice, multiple_choice, parse_choices
from fourfold.evaluation.perplexity import perplexity
from fourfold.evaluation.text_metrics import require_text_metrics, text_figures
from fourfold.evaluation.validation import validation_loss
from fourfold.inference import GenerationOptions

__all__ = ["TASKS", "EvaluationOptions", "HeldOutRows", "Measured", "Task", "asked", "check_tasks", "run_tasks"]


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and how. The defaults measure the loss on held-out rows alone.

    Args:
        batch_size: Rows scored at a time.
        generate_rows: Held-out rows of each set to answer by generation; 0: none.
        generation: How they are answered.
        comparison, pattern: When an answer is right, see `exact_match`.
        text_metrics: Names in `TEXT_METRICS`, of the same answers.
        perplexity_text: A text file.
        perplexity_max_length, perplexity_stride, perplexity_max_tokens: See `perplexity`.
        choices_source: Rows of multiple choice, as `load_rows` takes them.
        choices_rows: How many of them; None: all.
        apply_chat_template: Ask those, and the harness's questions, by the chat template.
        harness: Tasks of lm-evaluation-harness.
    """

    batch_size: int = 8
    generate_rows: int = 0
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    comparison: str = "strip"
    pattern: str | None = None
    text_metrics: tuple[str, ...] = ()
    perplexity_text: Path | None = None
    perplexity_max_length: int = 1024
    perplexity_stride: int = 512
    perplexity_max_tokens: int | None = None
    choices_source: str | None = None
    choices_rows: int | None = None
    apply_chat_template: bool = False
    harness: HarnessOptions = field(default_factory=HarnessOptions)


@dataclass(frozen=True)
class HeldOutRows:
    """A set of held-out rows.

    Args:
        dataset: Rows that the collator takes, with `messages` where they are to be answered.
        collator: Makes a batch with `input_ids` and `labels` of rows.
        prefix: What the names of its figures begin with: eval, or eval_NAME.
    """

    dataset: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    prefix: str = "eval"

    def named(self, figure: str) -> str:
        """The name of a figure of answers: of a set that needs no name it has no prefix."""
        return figure if self.prefix == "eval" else f"{self.prefix}_{figure}"


@dataclass(frozen=True)
class Measured:
    """What a task gave.

    Args:
        figures: Its numbers.
        counts: How many rows or tokens each is of, by name.
        samples: The rows that were answered.
        num_tokens: Tokens that were scored, or generated; 0: not known.
        seconds: What it took.
    """

    figures: tuple[Figure, ...]
    counts: Mapping[str, int]
    samples: tuple[Sample, ...] = ()
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, Any]:
        """All numbers by name."""
        return {figure.name: figure.value for figure in self.figures} | dict(self.counts)


@dataclass(frozen=True)
class Subject:
    """What is measured on what."""

    model: Any
    tokenizer: Any
    options: EvaluationOptions
    held_out: Sequence[HeldOutRows]
    say: Callable[[str], None]


def _nothing_to_check(options: EvaluationOptions) -> None:
    pass


@dataclass(frozen=True)
class Task:
    """One way to measure.

    Args:
        description: What it is.
        keys: The configuration's keys that ask for it and that it reads.
        is_asked: Whether options, and the number of sets of held-out rows, ask for it.
        measure: Does it.
        check: Raises ConfigError or DataError for what would make it fail, before a model is loaded.
        is_by_token: Its figures belong to one tokenizer, and do not compare with those of another.
        generates: It writes answers, token by token.
    """

    description: str
    keys: tuple[str, ...]
    is_asked: Callable[[EvaluationOptions, int], bool]
    measure: Callable[[Subject], Measured]
    check: Callable[[EvaluationOptions], None] = _nothing_to_check
    is_by_token: bool = False
    generates: bool = False


def _loss(subject: Subject) -> Measured:
    figures, counts = [], {}
    for rows in subject.held_out:
        found = validation_loss(subject.model, rows.dataset, rows.collator, subject.options.batch_size)
        parts = np.array([found.row_losses, found.row_tokens], dtype=np.float64).T
        figures.append(Figure(f"{rows.prefix}_loss", found.loss, parts, ratio, higher_is_better=False))
        counts[f"{rows.prefix}_num_tokens"] = found.num_tokens
    return Measured(tuple(figures), counts, num_tokens=sum(counts.values()))


def _answers(subject: Subject) -> Measured:
    options = subject.options
    figures: list[Figure] = []
    samples: list[Sample] = []
    counts = {}
    for rows in subject.held_out:
        conversations = [row["messages"] for row in rows.dataset.select_columns("messages")]
        chosen = conversations[: options.generate_rows]
        of_set = rows.prefix.removeprefix("eval").removeprefix("_")
        subject.say(f"answering {len(chosen)} held-out rows" + (f" of {of_set}" if of_set else ""))
        matched = exact_match(
            subject.model, subject.tokenizer, chosen, options.generation, options.comparison, options.pattern
        )
        name = rows.named("exact_match")
        figures.append(mean_of(name, [sample.correct for sample in matched.samples], is_share=True))
        counts[f"{name}_rows"] = matched.num_rows
        references, answers = zip(*((one.expected, one.answer) for one in matched.samples), strict=True)
        texts = text_figures(options.text_metrics, references, answers)
        figures += [replace(figure, name=rows.named(figure.name)) for figure in texts]
        samples += matched.samples
    written = subject.tokenizer([sample.answer for sample in samples], add_special_tokens=False)["input_ids"]
    # An answer of fewer tokens than it may have was ended by a token of its own.
    longest = options.generation.max_new_tokens
    num_tokens = sum(min(len(ids) + 1, longest) for ids in written)
    return Measured(tuple(figures), counts, tuple(samples), num_tokens)


def _check_answers(options: EvaluationOptions) -> None:
    require_text_metrics(options.text_metrics)


def _perplexity(subject: Subject) -> Measured:
    options = subject.options
    assert options.perplexity_text is not None
    found = perplexity(
        subject.model,
        subject.tokenizer,
        _read_text(options.perplexity_text),
        max_length=options.perplexity_max_length,
        stride=options.perplexity_stride,
        max_tokens=options.perplexity_max_tokens,
    )
    parts = np.array([found.window_losses, found.window_tokens], dtype=np.float64).T
    figure = Figure("perplexity", found.value, parts, ratio_exp, higher_is_better=False)
    return Measured((figure,), {"perplexity_num_tokens": found.num_tokens}, num_tokens=found.num_tokens)


def _check_text(options: EvaluationOptions) -> None:
    assert options.perplexity_text is not None
    if not _read_text(options.perplexity_text).strip():
        raise DataError(f"{options.perplexity_text} is empty", hint="key perplexity_text names a text file")


def _read_text(text: Path) -> str:
    if not text.is_file():
        raise DataError(f"no such file: {text}", hint="key perplexity_text names a text file")
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is not UTF-8 text", found=f"byte {error.object[error.start]:#04x}") from error


def _multiple_choice(subject: Subject) -> Measured:
    options = subject.options
    rows = _read_choices(options)
    subject.say(f"{len(rows)} questions of multiple choice")
    found = multiple_choice(
        subject.model,
        subject.tokenizer,
        rows,
        batch_size=options.batch_size,
        apply_chat_template=options.apply_chat_template,
    )
    scores = (
        [float(picked[which] == row.answer) for picked, row in zip(found.picked, rows, strict=True)] for which in (0, 1)
    )
    names = ("multiple_choice_acc", "multiple_choice_acc_norm")
    figures = tuple(mean_of(name, score, is_share=True) for name, score in zip(names, scores, strict=True))
    return Measured(figures, {"multiple_choice_rows": len(rows)}, num_tokens=found.num_tokens)


def _read_choices(options: EvaluationOptions) -> list[Choice]:
    assert options.choices_source is not None
    rows = load_rows(options.choices_source, "test")
    chosen = rows if options.choices_rows is None else rows.select(range(min(options.choices_rows, len(rows))))
    return parse_choices(list(chosen), options.choices_source)


def _check_choices(options: EvaluationOptions) -> None:
    _read_choices(options)


def _harness(subject: Subject) -> Measured:
    options = subject.options
    subject.say(f"lm-evaluation-harness: {', '.join(options.harness.tasks)}")
    figures, counts = run_harness(
        subject.model,
        subject.tokenizer,
        options.harness,
        batch_size=options.batch_size,
        apply_chat_template=options.apply_chat_template,
    )
    return Measured(tuple(figures), counts)


def _check_harness(options: EvaluationOptions) -> None:
    check_harness(options.harness)


TASKS: dict[str, Task] = {
    "loss": Task(
        "validation loss on held-out rows",
        ("eval_dataset", "eval_split_fraction", "per_device_eval_batch_size"),
        lambda options, num_sets: num_sets > 0,
        _loss,
        is_by_token=True,
    ),
    "answers": Task(
        "held-out rows answered by generation: exact match, ROUGE, BLEU, chrF",
        (
            *("eval_generate_rows", "eval_max_new_tokens", "eval_generate_batch_size", "eval_comparison"),
            *("eval_pattern", "eval_metrics"),
        ),
        lambda options, num_sets: num_sets > 0 and options.generate_rows > 0,
        _answers,
        _check_answers,
        generates=True,
    ),
    "perplexity": Task(
        "perplexity of a text",
        ("perplexity_text", "perplexity_max_length", "perplexity_stride", "perplexity_max_tokens"),
        lambda options, _: options.perplexity_text is not None,
        _perplexity,
        _check_text,
        is_by_token=True,
    ),
    "multiple_choice": Task(
        "multiple choice by likelihood",
        (
            *("multiple_choice_dataset", "multiple_choice_rows", "eval_apply_chat_template"),
            "per_device_eval_batch_size",
        ),
        lambda options, _: options.choices_source is not None,
        _multiple_choice,
        _check_choices,
    ),
    "harness": Task(
        "tasks of lm-evaluation-harness",
        (
            *("harness_tasks", "harness_include_path", "harness_num_fewshot", "harness_limit"),
            *("eval_apply_chat_template", "per_device_eval_batch_size"),
        ),
        lambda options, _: bool(options.harness.tasks),
        _harness,
        _check_harness,
    ),
}


def asked(options: EvaluationOptions, num_sets: int, without: Collection[str] = ()) -> list[str]:
    """The tasks that are asked for.

    Args:
        num_sets: How many sets of held-out rows there are.
        without: Tasks to leave out.
    """
    return [name for name, task in TASKS.items() if name not in without and task.is_asked(options, num_sets)]


def check_tasks(options: EvaluationOptions, num_sets: int) -> None:
    """Raise ConfigError or DataError for what would fail once a model is loaded."""
    for name in asked(options, num_sets):
        TASKS[name].check(options)


def run_tasks(
    model: Any,
    tokenizer: Any,
    options: EvaluationOptions,
    held_out: Sequence[HeldOutRows],
    say: Callable[[str], None],
    without: Collection[str] = (),
) -> dict[str, Measured]:
    """Measure a model by all tasks that are asked for, in the order of `TASKS`.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer.
        options: What is asked for.
        held_out: Sets of held-out rows.
        say: Is given a line for people before what takes long.
        without: Tasks to leave out.

    Raises:
        FourfoldError: As the tasks do.
    """
    subject = Subject(model, tokenizer, options, held_out, say)
    result = {}
    for name in asked(options, len(held_out), without):
        begun = time.perf_counter()
        measured = TASKS[name].measure(subject)
        result[name] = replace(measured, seconds=time.perf_counter() - begun)
    return result
