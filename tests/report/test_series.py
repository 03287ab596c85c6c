from __future__ import annotations

import math

import numpy as np

from fourfold.report.series import charts_of, points_of, smoothed, thinned


def test_what_is_no_finite_number_is_left_out() -> None:
    values = [1.0, None, math.nan, math.inf, "2", True, 3]
    records = [{"step": step, "loss": value} for step, value in enumerate(values)]
    assert points_of(records, "loss") == [(0, 1.0), (6, 3)]


def test_of_a_step_written_twice_the_later_value_stays() -> None:
    assert points_of([{"step": 2, "loss": 5}, {"step": 1, "loss": 4}, {"step": 2, "loss": 6}], "loss") == [
        (1, 4),
        (2, 6),
    ]


def test_thinning_keeps_ends_and_extremes() -> None:
    draw = np.random.default_rng(0)
    points = list(enumerate(draw.normal(size=100_000).tolist()))
    kept = thinned(points, 600)
    assert len(kept) <= 600
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    for choose in (min, max):
        assert choose(value for _, value in kept) == choose(value for _, value in points)


def test_few_points_are_all_kept() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, 0.0)]
    assert thinned(points, 3) == points
    assert smoothed(points, 1) == points


def test_smoothing_is_the_median_around_and_unmoved_by_one_value() -> None:
    values = [float(index % 7) for index in range(200)]
    values[100] = 1e9
    found = dict(smoothed(list(enumerate(values)), 21))
    assert found[50] == np.median(values[40:61])
    assert max(found.values()) < 10


def test_every_validation_set_has_a_line_beside_the_training_loss() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.9}, {"step": 1, "eval_my_set_loss": 1.8}]
    loss = charts_of(records)[0]
    assert [line.name for line in loss.series] == ["training", "validation", "validation: my_set"]
    assert len({line.colour for line in loss.series}) == 3


def test_a_figure_that_no_one_foresaw_is_drawn_where_it_varies() -> None:
    records = [{"step": step, "loss": 1.0, "entropy": step / 2, "constant": 3, "epoch": step} for step in range(4)]
    assert [chart.title for chart in charts_of(records)] == ["Loss", "Entropy"]


def test_losses_that_were_not_finite_are_counted() -> None:
    chart = charts_of([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "eval_loss": None}])[0]
    assert chart.note == "2 logged losses were not finite and are left out."


def test_preferences_are_drawn_whatever_the_method_calls_them() -> None:
    pairs = [{"step": 1, "rewards/margins": 0.5, "rewards/accuracies": 0.6, "rewards/chosen": 1.0}]
    assert {chart.title for chart in charts_of(pairs)} == {"Preferred answers", "Reward margin", "Rewards"}
    scores = [{"step": 1, "accuracy": 0.6, "margin": 0.4, "eval_accuracy": 0.5}]
    assert {chart.title for chart in charts_of(scores)} == {"Preferred answers", "Reward margin"}
