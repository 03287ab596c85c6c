"""Several models measured on the same rows, beside the first of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourfold.errors import DataError
from fourfold.evaluation.figures import Difference, Figure, Interval, IntervalOptions, difference, interval
from fourfold.evaluation.tasks import TASKS, Measured

__all__ = ["Cell", "Comparison", "Cost", "MeasuredModel", "compare_measured"]


@dataclass(frozen=True)
class Cost:
    """What measuring a model took.

    Args:
        device: Where it computed.
        weights_bytes: Its weights, as they lie in memory.
        peak_bytes: Most memory in use meanwhile: of tensors on a GPU, of the whole process on a CPU.
        scored_per_second: Tokens scored a second, together with those before them; None: none were.
        generated_per_second: Tokens written a second, of all rows of a batch together; None: none were.
        joules: Energy of the GPU; None: not told.
    """

    device: str
    weights_bytes: int
    peak_bytes: int
    scored_per_second: float | None
    generated_per_second: float | None
    joules: float | None


@dataclass(frozen=True)
class MeasuredModel:
    """A model with its figures.

    Args:
        name: As it was asked for.
        what: What that is, in words.
        measured: Task by task.
        cost: What it took.
        left_out: Tasks whose figures would not compare, and why.
    """

    name: str
    what: str
    measured: Mapping[str, Measured]
    cost: Cost
    left_out: Mapping[str, str]

    @property
    def figures(self) -> dict[str, Figure]:
        return {figure.name: figure for one in self.measured.values() for figure in one.figures}


@dataclass(frozen=True)
class Cell:
    """One figure of one model.

    Args:
        value: The figure.
        interval: Where it would be for other rows of the same kind; None: not known.
        difference: Against the first model; None for that one, and where it has no such figure.
    """

    value: float
    interval: Interval | None
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Args:
        models: In their order; the first is what the others are compared with.
        cells: By figure, then by model.
        higher_is_better: By figure.
        counts: Rows and tokens that the figures are of.
        options: How the intervals were made.
    """

    models: list[MeasuredModel]
    cells: dict[str, dict[str, Cell]]
    higher_is_better: dict[str, bool]
    counts: dict[str, int]
    options: IntervalOptions

    def to_dict(self) -> dict[str, Any]:
        """Plain data: figures by model with intervals and differences, costs, and how the intervals were made."""
        return {
            "reference": self.models[0].name,
            "models": {
                model.name: {
                    "what": model.what,
                    "figures": {
                        name: asdict(cells[model.name]) for name, cells in self.cells.items() if model.name in cells
                    },
                    "cost": asdict(model.cost),
                    "seconds": {task: one.seconds for task, one in model.measured.items()},
                    "left_out": dict(model.left_out),
                }
                for model in self.models
            },
            "higher_is_better": self.higher_is_better,
            "counts": self.counts,
            "intervals": asdict(self.options),
        }


def compare_measured(models: Sequence[MeasuredModel], options: IntervalOptions) -> Comparison:
    """Intervals of each model's figures, and paired differences to the first model's.

    Raises:
        DataError: Models that were not measured on the same rows.
    """
    first = models[0]
    counts: dict[str, int] = {}
    for model in models:
        for name, count in ((name, count) for one in model.measured.values() for name, count in one.counts.items()):
            if counts.setdefault(name, count) != count:
                raise DataError(
                    f"{model.name} was not measured on what {first.name} was",
                    found=f"{name} {count}, not {counts[name]}",
                )
    figures = {name: figure for model in models for name, figure in model.figures.items()}
    order = sorted(figures, key=lambda name: _place(name, models))
    cells: dict[str, dict[str, Cell]] = {}
    for name in order:
        reference = first.figures.get(name)
        cells[name] = {
            model.name: Cell(
                own.value,
                interval(own, options),
                None if model is first or reference is None else difference(own, reference, options),
            )
            for model in models
            if (own := model.figures.get(name)) is not None
        }
    better = {name: figures[name].higher_is_better for name in order}
    return Comparison(list(models), cells, better, counts, options)


def _place(name: str, models: Sequence[MeasuredModel]) -> int:
    """The place of a figure's task in the table of tasks."""
    tasks = (task for model in models for task, one in model.measured.items() if name in one.metrics)
    return list(TASKS).index(next(tasks))
