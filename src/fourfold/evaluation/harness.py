"""Tasks of lm-evaluation-harness, over our models; the harness is imported when it is asked for."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation.figures import Figure, mean_of

__all__ = ["HarnessOptions", "check_harness", "run_harness"]


@dataclass(frozen=True)
class HarnessOptions:
    """Which tasks, and how much of them.

    Args:
        tasks: Names of the harness's own tasks, groups or tags, or YAML files of tasks.
        include_path: A folder of more tasks, as YAML files.
        num_fewshot: Examples before each question; None: as the task has it.
        limit: Rows of each task; None: all.
        seed: Of what it draws.
    """

    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 0


def check_harness(options: HarnessOptions) -> None:
    """Raise ConfigError where the harness is not installed, or a task or the folder of tasks is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "harness_tasks are run by lm-evaluation-harness, which is not installed",
            hint='pip install "fourfold[harness]"',
        )
    if options.include_path is not None and not options.include_path.is_dir():
        raise ConfigError("harness_include_path is no folder", found=options.include_path)
    missing = [name for name in options.tasks if _is_file(name) and not Path(name).is_file()]
    if missing:
        raise ConfigError("harness_tasks names files that are not there", found=", ".join(missing))
    _task_manager(options)


def run_harness(
    model: Any, tokenizer: Any, options: HarnessOptions, *, batch_size: int = 8, apply_chat_template: bool = False
) -> tuple[list[Figure], dict[str, int]]:
    """Measure a model by the harness's tasks.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer.
        options: Which tasks.
        batch_size: Requests at a time.
        apply_chat_template: Ask by the tokenizer's chat template, examples as turns before.

    Returns:
        Figures, named harness/TASK/METRIC, or harness/TASK/METRIC,FILTER where a task has several filters; and rows by
        harness/TASK/rows.

    Raises:
        ConfigError: See `check_harness`.
        DataError: A task whose data cannot be had, or no chat template to apply.
    """
    check_harness(options)
    if apply_chat_template and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", hint="set the key chat_template")
    with _process_left_as_it_was():
        import lm_eval

        from fourfold.evaluation.harness_model import HarnessModel

        try:
            results: Mapping[str, Any] | None = lm_eval.simple_evaluate(
                model=HarnessModel(model, tokenizer, batch_size),
                tasks=list(options.tasks),
                task_manager=_task_manager(options),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                apply_chat_template=apply_chat_template,
                # Errors that the harness's own intervals would take; ours are drawn alike for each model.
                bootstrap_iters=0,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise DataError(
                f"a task of {', '.join(options.tasks)} has no data here: {str(error).splitlines()[0]}",
                hint="the harness's own tasks bring theirs from the hub; a task of your own can name local files",
            ) from error
    assert results is not None
    return _figures(results), {f"harness/{task}/rows": _num_rows(rows) for task, rows in results["samples"].items()}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


@functools.lru_cache(maxsize=1)
def _task_manager(options: HarnessOptions) -> Any:
    """What finds the tasks: in the given folder alone where they are all there, since the harness's own are thousands.

    Raises:
        ConfigError: A task that is nowhere.
    """
    from lm_eval.tasks import TaskManager

    named = [task for task in options.tasks if not _is_file(task)]
    include = None if options.include_path is None else str(options.include_path)
    for with_own in (False, True):
        manager = TaskManager(include_path=include, include_defaults=with_own)
        known = set(manager.all_tasks)
        missing = [name for name in named if name not in known and not manager.match_tasks([name])]
        if not missing:
            return manager
    nearest = difflib.get_close_matches(missing[0], known, n=3)
    raise ConfigError(
        "unknown task of lm-evaluation-harness",
        found=", ".join(missing),
        allowed=f"near it: {', '.join(nearest)}" if nearest else None,
        hint="`lm-eval ls tasks` lists its own; harness_include_path names a folder of others",
    )


def _num_rows(samples: Sequence[Mapping[str, Any]]) -> int:
    """A row stands in the samples once for each filter."""
    return len({row["doc_id"] for row in samples})


def _figures(results: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for task, metrics in results["results"].items():
        keys = [key for key in metrics if "," in key and not key.partition(",")[0].endswith("_stderr")]
        filters = {key.partition(",")[2] for key in keys}
        for key in keys:
            metric, _, by = key.partition(",")
            if not isinstance(metrics[key], int | float):
                continue
            name = f"harness/{task}/{metric if len(filters) == 1 else key}"
            is_better = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
            rows = [row for row in results["samples"].get(task, []) if row.get("filter", by) == by]
            figures.append(
                _figure(name, float(metrics[key]), [row.get(metric) for row in rows], is_better is not False)
            )
    return figures


def _figure(name: str, value: float, scores: Sequence[Any], higher_is_better: bool) -> Figure:
    """With rows where the figure is their mean; perplexities and figures of whole corpora are not."""
    if scores and all(isinstance(score, int | float | np.number) for score in scores):
        found = mean_of(
            name,
            [float(score) for score in scores],
            higher_is_better=higher_is_better,
            is_share=all(score in (0, 1) for score in scores),
        )
        if abs(found.value - value) <= 1e-9 * max(1.0, abs(value)):
            return found
    return Figure(name, value, higher_is_better=higher_is_better)


@contextmanager
def _process_left_as_it_was() -> Iterator[None]:
    """The harness seeds Python's, numpy's and torch's generators, and it and what it imports set variables."""
    of_python, of_numpy, variables = random.getstate(), np.random.get_state(), dict(os.environ)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            for name in os.environ.keys() - variables.keys():
                del os.environ[name]
            os.environ.update(variables)
