from __future__ import annotations

import itertools
import random

import pytest
from matplotlib.ticker import MaxNLocator

from fourfold.report.numbers import duration, gib, number, ticks


def test_ticks_are_round_and_cover_the_range() -> None:
    draw = random.Random(0)
    for _ in range(300):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-6, 6)
        high = low + 10 ** draw.uniform(-4, 5) * max(abs(low), 1e-6)
        found = ticks(low, high, most=6)
        assert found[0] <= low + 1e-9 * abs(low)
        assert found[-1] >= high - 1e-9 * abs(high)
        steps = [b - a for a, b in itertools.pairwise(found)]
        leading = f"{steps[0]:.6e}"[:8]
        assert float(leading) in (1, 2, 5, 10), leading
        # Matplotlib's, of the same steps, are no fewer than about half of ours.
        peer = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high)
        assert len(peer) / 2 <= len(found) <= 8


def test_ticks_of_one_value_surround_it() -> None:
    for value in (0.0, 3.0, -2e-5):
        found = ticks(value, value, most=5)
        assert found[0] < value < found[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.42134, "0.4213"), (2e-4, "2e−4"), (-1.5, "−1.5"), (12345.6, "12,346"), (0.0025, "0.0025")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_steps_are_written_in_full() -> None:
    assert number(123456, 7) == "123,456"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (59, "59 s"),
        (75, "1 min 15 s"),
        (3599.7, "1 h 0 min"),
        (7440, "2 h 4 min"),
        (190000, "2 d 4 h"),
    ],
)
def test_durations_name_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_binary() -> None:
    assert gib(11.2 * 2**30) == "11.20 GiB"
    assert gib(90 * 2**20) == "90.0 MiB"
