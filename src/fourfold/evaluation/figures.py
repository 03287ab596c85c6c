"""A measured figure with what each row adds to it, and how sure one can be of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import ConfigError

__all__ = ["Difference", "Figure", "IntervalOptions", "difference", "interval", "mean_of", "ratio", "ratio_exp"]

Floats: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]


def ratio(sums: Floats) -> Floats:
    """A weighted mean: the first column over the second."""
    result: Floats = sums[..., 0] / sums[..., 1]
    return result


def ratio_exp(sums: Floats) -> Floats:
    """exp of `ratio`: a perplexity, of nats over tokens."""
    return np.exp(ratio(sums))


@dataclass(frozen=True)
class Figure:
    """A number, and what it is made of.

    Args:
        name: As in the metrics of a run.
        value: The number itself, of all rows.
        parts: float64 [rows, parts]: what each row, or window of a text, adds; None: only the value is known.
        combine: From sums of rows' parts [..., parts] to the figure [...].
        higher_is_better: Which of two values is the better one.
        is_share: Each row counts 0 or 1.
    """

    name: str
    value: float
    parts: Floats | None = None
    combine: Callable[[Floats], Floats] = ratio
    higher_is_better: bool = True
    is_share: bool = False


def mean_of(name: str, scores: Sequence[float], **options: Any) -> Figure:
    """The mean of rows' scores as a figure."""
    values = np.asarray(scores, dtype=np.float64)
    return Figure(name, float(values.mean()), np.stack([values, np.ones_like(values)], axis=1), **options)


@dataclass(frozen=True)
class IntervalOptions:
    """How sure, and by how many samples of the rows.

    Args:
        level: Probability that an interval is made for.
        num_resamples: Samples of the bootstrap.
        seed: Its seed: the same rows are drawn for each model.

    Raises:
        ConfigError: A value that is not allowed.
    """

    level: float = 0.95
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ConfigError("key level", found=self.level, allowed="between 0 and 1")
        if self.num_resamples < 100:
            raise ConfigError("key num_resamples", found=self.num_resamples, allowed="at least 100")


@dataclass(frozen=True)
class Difference:
    """A model's figure against that of another, over the same rows.

    Args:
        value: The figure less the other's.
        interval: Of that, by the paired bootstrap; None where rows are not known.
        relative: `value` over the other's figure; None where that is 0.
        relative_interval: Of that.
    """

    value: float
    interval: Interval | None
    relative: float | None
    relative_interval: Interval | None


def interval(figure: Figure, options: IntervalOptions) -> Interval | None:
    """Where the figure would be for other rows of the same kind.

    Percentiles of the bootstrap over rows (Efron 1979). Of a share it is Wilson's interval (1927), since rows that are
    all right, drawn again, are all right again; and it says what a few rows cannot tell.

    Returns:
        Lower and upper end; None where rows are not known, or where there is but one.
    """
    if figure.parts is None or len(figure.parts) < 2:
        return None
    if figure.is_share:
        return _wilson(figure.value, len(figure.parts), options.level)
    return _percentiles(figure.combine(_resampled(figure.parts, options)), options.level)


def difference(figure: Figure, reference: Figure, options: IntervalOptions) -> Difference:
    """What a figure is above another one of the same rows in the same order.

    In each sample both have the same rows, so that what makes a row hard for both does not widen the interval.

    Raises:
        ValueError: They are not of the same rows.
    """
    change = figure.value - reference.value
    relative = change / reference.value if reference.value else None
    if figure.parts is None or reference.parts is None:
        return Difference(change, None, relative, None)
    if len(figure.parts) != len(reference.parts):
        raise ValueError(f"{figure.name}: {len(figure.parts)} rows cannot be compared with {len(reference.parts)}")
    if len(figure.parts) < 2:
        return Difference(change, None, relative, None)
    ours = figure.combine(_resampled(figure.parts, options))
    theirs = reference.combine(_resampled(reference.parts, options))
    by_ratio = None
    if relative is not None and (theirs != 0).all():
        by_ratio = _percentiles(ours / theirs - 1, options.level)
    return Difference(change, _percentiles(ours - theirs, options.level), relative, by_ratio)


def _resampled(parts: Floats, options: IntervalOptions) -> Floats:
    """Sums over rows that are drawn with replacement, as many as there are: float64 [resamples, parts]."""
    rows = len(parts)
    generator = np.random.default_rng(options.seed)
    # How often each row is drawn; one sample at a time, since a text may have very many windows.
    even = np.full(rows, 1 / rows)
    return np.stack([generator.multinomial(rows, even) @ parts for _ in range(options.num_resamples)])


def _percentiles(values: Floats, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _wilson(share: float, rows: int, level: float) -> Interval:
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
