"""Intervals against scipy's and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fourfold.errors import ConfigError
from fourfold.evaluation.figures import Figure, IntervalOptions, difference, interval, mean_of, ratio_exp

OPTIONS = IntervalOptions(num_resamples=4000, seed=1)


def scores(rows: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 1.5, rows)


def test_the_interval_of_a_mean_is_scipys_bootstrap_and_near_the_normal_one() -> None:
    rows = scores()
    low, high = interval(mean_of("x", rows), OPTIONS)
    theirs = stats.bootstrap((rows,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    spread = rows.std() / math.sqrt(len(rows))
    assert (low, high) == pytest.approx(theirs, abs=0.1 * spread)
    normal = stats.norm.interval(0.95, rows.mean(), spread)
    assert (low, high) == pytest.approx(normal, abs=0.2 * spread)


@pytest.mark.parametrize(("right", "rows"), [(0, 5), (37, 120), (114, 120), (120, 120)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_of_a_share_is_wilsons(right: int, rows: int, level: float) -> None:
    figure = mean_of("x", [1.0] * right + [0.0] * (rows - right), is_share=True)
    theirs = stats.binomtest(right, rows).proportion_ci(level, method="wilson")
    assert interval(figure, IntervalOptions(level=level)) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_interval_of_a_perplexity_is_that_of_a_ratio_by_the_delta_method() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(200, 300, 150).astype(float)
    losses = tokens * generator.normal(3.0, 0.3, 150)
    figure = Figure("p", math.exp(losses.sum() / tokens.sum()), np.stack([losses, tokens], 1), ratio_exp)
    mean = losses.sum() / tokens.sum()
    error = math.sqrt(((losses - mean * tokens) ** 2).sum()) / tokens.sum()
    low, high = interval(figure, OPTIONS)
    assert math.log(low) == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert math.log(high) == pytest.approx(mean + 1.96 * error, abs=0.25 * error)


def test_a_difference_is_paired_so_that_what_both_find_hard_does_not_widen_it() -> None:
    rows, change = scores(), np.random.default_rng(5).normal(0.1, 0.05, 200)
    found = difference(mean_of("x", rows + change), mean_of("x", rows), OPTIONS)
    spread = change.std() / math.sqrt(200)
    assert found.value == pytest.approx(change.mean())
    assert found.interval == pytest.approx(stats.norm.interval(0.95, change.mean(), spread), abs=0.2 * spread)
    assert found.relative == pytest.approx(change.mean() / rows.mean())
    low, high = found.relative_interval
    assert low < found.relative < high
    theirs = stats.bootstrap(
        (rows + change, rows),
        lambda ours, others, axis: np.mean(ours, axis) - np.mean(others, axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=2,
    ).confidence_interval
    assert found.interval == pytest.approx(theirs, abs=0.15 * spread)


def test_about_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    options = IntervalOptions(num_resamples=400)
    generator = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        low, high = interval(mean_of("x", generator.exponential(1.0, 100)), options)
        held += low <= 1.0 <= high
    # Of 400 intervals with 93% to 95% each, fewer than 355 are one in a thousand.
    assert 355 <= held <= 395


def test_rows_that_are_not_known_have_no_interval_and_others_rows_are_refused() -> None:
    alone = Figure("x", 2.0)
    assert interval(alone, OPTIONS) is interval(mean_of("x", [1.0]), OPTIONS) is None
    found = difference(alone, Figure("x", 0.0), OPTIONS)
    assert (found.value, found.interval, found.relative) == (2.0, None, None)
    with pytest.raises(ValueError, match="3 rows cannot be compared with 2"):
        difference(mean_of("x", [1.0, 2.0, 3.0]), mean_of("x", [1.0, 2.0]), OPTIONS)
    with pytest.raises(ConfigError, match="key level"):
        IntervalOptions(level=1.0)
    with pytest.raises(ConfigError, match="key num_resamples"):
        IntervalOptions(num_resamples=10)
