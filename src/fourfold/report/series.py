"""From the records of a log to what its charts show."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fourfold.report.numbers import GIB

__all__ = ["Chart", "Mark", "Series", "charts_of", "points_of", "smoothed", "thinned"]

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: In the legend.
        points: (step, value), finite, by step.
        colour: Number of its colour, from 1.
        has_markers: A dot at each value: of few, far between.
        is_faint: Drawn behind a smoothed line of the same colour.
    """

    name: str
    points: Sequence[Point]
    colour: int
    has_markers: bool = False
    is_faint: bool = False


@dataclass(frozen=True)
class Mark:
    """An event at a step, as a vertical line."""

    step: int
    text: str


@dataclass(frozen=True)
class Chart:
    """Lines over optimizer steps.

    Attributes:
        title: What is shown; `unit` is that of its values.
        from_zero: Whether the axis of values begins at zero.
        note: What a reader has to know besides.
    """

    title: str
    unit: str
    series: Sequence[Series]
    from_zero: bool = False
    is_wide: bool = False
    marks: Sequence[Mark] = ()
    note: str = ""


@dataclass(frozen=True)
class _Row:
    """A chart of known figures: key of the log to name in the legend."""

    title: str
    unit: str
    keys: Mapping[str, str]
    from_zero: bool = False
    scale: float = 1.0
    is_noisy: bool = False


_ROWS = (
    _Row("Learning rate", "", {"learning_rate": "learning rate"}, from_zero=True),
    _Row("Gradient norm", "before clipping", {"grad_norm": "each log"}, from_zero=True, is_noisy=True),
    _Row("Speed", "tokens/s", {"tokens_per_second": "tokens a second"}, from_zero=True),
    _Row(
        "Memory",
        "GiB",
        {"memory_peak_bytes": "peak so far", "memory_current_bytes": "at the log"},
        from_zero=True,
        scale=1 / GIB,
    ),
    _Row(
        "Token accuracy",
        "share of supervised tokens",
        {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "validation"},
    ),
    _Row(
        "Preferred answers",
        "share of pairs",
        {
            "rewards/accuracies": "training",
            "eval_rewards/accuracies": "validation",
            "accuracy": "training",
            "eval_accuracy": "validation",
        },
        from_zero=True,
    ),
    _Row(
        "Reward margin",
        "chosen − rejected",
        {
            "rewards/margins": "training",
            "eval_rewards/margins": "validation",
            "margin": "training",
            "eval_margin": "validation",
        },
    ),
    _Row("Rewards", "training", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    _Row("Log-probabilities", "training, nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    _Row("Loss scale", "fp16", {"loss_scale": "loss scale"}, from_zero=True),
    _Row("Steps left out", "fp16, in all", {"skipped_steps": "steps left out"}, from_zero=True),
)
_LOSS = re.compile(r"eval_(?:(?P<name>.+)_)?loss")
# Figures that are told elsewhere, or say nothing by step.
_NOT_DRAWN = re.compile(
    r"step|epoch|num_tokens|total_flos|train_loss|train_.*|(eval_)?(.+_)?(runtime|per_second)|.*_bytes|.*num_tokens|"
    r"(eval_.+_)?(exact_match|rouge|bleu|chrf).*|perplexity.*|multiple_choice_.*|harness/.*|"
    r"eval_rewards/(chosen|rejected)|eval_logps/.*"
)
_SMOOTHED_FROM, _WIDEST = 80, 501
_LARGEST = 1e100  # beyond, differences are no numbers any more
_HARDLY_VARIES = 1e-12
_NUM_COLOURS = 6


def points_of(records: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of a key; what is no finite number is left out, and of one step written twice the later stays."""
    found: dict[float, float] = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST:
            found[record["step"]] = value
    return sorted(found.items())


def smoothed(points: Sequence[Point], window: int, most: int = 600) -> list[Point]:
    """The median of `window` values around each of at most `most` points; of fewer values at both ends.

    One value far off, such as the gradient norm of a single odd batch, does not move it.
    """
    values = [value for _, value in points]
    last = len(points) - 1
    result = []
    for place in sorted({round(index * last / (most - 1)) for index in range(most)}):
        reach = min(window // 2, place, last - place)
        result.append((points[place][0], statistics.median(values[place - reach : place + reach + 1])))
    return result


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points that look alike when drawn: of each stretch the least and the highest stay."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    num_stretches = max((most - 2) // 2, 1)
    kept = [points[0]]
    for index in range(num_stretches):
        stretch = inner[len(inner) * index // num_stretches : len(inner) * (index + 1) // num_stretches]
        if stretch:
            kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*kept, points[-1]]


def charts_of(records: Sequence[Mapping[str, Any]], marks: Sequence[Mark] = ()) -> list[Chart]:
    """The charts of a log: the loss first, then what is known, then each other figure that varies."""
    keys = dict.fromkeys(itertools.chain.from_iterable(records))
    charts = [_loss_chart(records, keys, marks)]
    drawn = {"loss"} | {key for key in keys if _LOSS.fullmatch(key)}
    for row in _ROWS:
        drawn |= row.keys.keys()
        lines: dict[str, list[Point]] = {}
        for key, name in row.keys.items():
            points = points_of(records, key) if key in keys else []
            if points:
                lines.setdefault(name, [(step, value * row.scale) for step, value in points])
        series = _in_colours(lines)
        if row.is_noisy:
            series = [part for line in series for part in _with_median(line)]
        charts.append(Chart(row.title, row.unit, series, row.from_zero))
    for key in keys:
        twin = key.removeprefix("eval_")
        if key in drawn or _NOT_DRAWN.fullmatch(key) or (twin in keys and twin != key):
            continue
        lines = {"training" if twin == key else "validation": points_of(records, key)}
        if f"eval_{key}" in keys:
            lines["validation"] = points_of(records, f"eval_{key}")
        if any(_varies(points) for points in lines.values()):
            charts.append(Chart(_title(key), "", _in_colours(lines)))
    return [chart for chart in charts if any(line.points for line in chart.series)]


def _title(key: str) -> str:
    words = key.replace("_", " ")
    return words[:1].upper() + words[1:]


def _varies(points: Sequence[Point]) -> bool:
    values = [value for _, value in points]
    return len(values) > 1 and max(values) - min(values) > _HARDLY_VARIES


def _in_colours(lines: Mapping[str, list[Point]]) -> list[Series]:
    return [
        Series(name, points, index % _NUM_COLOURS + 1, has_markers=name.startswith("validation"))
        for index, (name, points) in enumerate(lines.items())
        if points
    ]


def _with_median(line: Series) -> list[Series]:
    """A line of many values faintly, and before it the median of some around each; one of few as it is."""
    if len(line.points) < _SMOOTHED_FROM:
        return [line]
    window = min(len(line.points) // 60 * 2 + 1, _WIDEST)
    name = f"{line.name}, median of {window:,}" if line.name == "training" else f"median of {window:,}"
    return [replace(line, is_faint=True), Series(name, smoothed(line.points, window), line.colour)]


def _loss_chart(records: Sequence[Mapping[str, Any]], keys: Iterable[str], marks: Sequence[Mark]) -> Chart:
    training = points_of(records, "loss")
    series = _with_median(Series("training", training, 1)) if training else []
    colour = 1
    for key in keys:
        match = _LOSS.fullmatch(key)
        if match and (points := points_of(records, key)):
            colour += 1
            name = f"validation: {match['name']}" if match["name"] else "validation"
            series.append(Series(name, points, (colour - 1) % _NUM_COLOURS + 1, has_markers=True))
    lost = sum(1 for record in records for key in ("loss", "eval_loss") if key in record and record[key] is None)
    note = f"{lost:,} logged losses were not finite and are left out." if lost else ""
    return Chart("Loss", "nats a token", series, is_wide=True, marks=marks, note=note)
