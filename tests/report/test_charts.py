from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from fourfold.report.charts import Bar, above_axis, described, draw_bars, draw_chart
from fourfold.report.series import Chart, Mark, Series

SVG = "{http://www.w3.org/2000/svg}"


def chart(points: list[tuple[float, float]], **options: object) -> Chart:
    return Chart("Loss", "nats", [Series("training", points, 1)], **options)  # type: ignore[arg-type]


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)


@pytest.mark.parametrize(
    "points", [[(5, 2.0)], [(5, 2.0), (5.0, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -3e9), (10**9, 4e-9)]]
)
def test_any_values_are_drawn_with_finite_coordinates(points: list[tuple[float, float]]) -> None:
    text = draw_chart(chart(points), 360, 220, "c-360")
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()
    assert parsed(text).findall(".//text")


def test_a_line_stands_where_its_values_are() -> None:
    root = parsed(draw_chart(chart([(0, 0.0), (50, 5.0), (100, 10.0)]), 540, 250, "c-540"))
    x0, x1, left, right = map(float, root.attrib["data-x"].split())
    y0, y1, bottom, top = map(float, root.attrib["data-y"].split())
    (path,) = root.findall(".//path")
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.attrib["d"])]
    for (step, value), (across, down) in zip([(0, 0), (50, 5), (100, 10)], places, strict=True):
        assert across == pytest.approx(left + (step - x0) / (x1 - x0) * (right - left), abs=0.06)
        assert down == pytest.approx(bottom + (value - y0) / (y1 - y0) * (top - bottom), abs=0.06)


def test_a_few_first_losses_far_above_do_not_flatten_the_rest() -> None:
    points = [(step, 12.0 if step < 2 else 1 + step / 1000) for step in range(200)]
    drawn = chart(points)
    assert above_axis(drawn) == 2
    high = float(parsed(draw_chart(drawn, 540, 250, "c-1")).attrib["data-y"].split()[1])
    assert 1.19 < high < 2


def test_a_chart_is_told_in_words_and_its_names_are_text() -> None:
    named = Chart("Loss", "", [Series("<b>&", [(1, 2.0), (9, 1.5)], 1)], marks=[Mark(4, "<i>")])
    assert described(named) == "Loss by optimizer step. <b>&: 2 at step 1, 1.5 at step 9, least 1.5 at step 9."
    root = parsed(draw_chart(named, 540, 250, "c-2"))
    assert root.attrib["aria-label"] == described(named)
    assert "<i>" in [element.text for element in root.iter("text")]


def test_bars_are_as_long_as_their_amounts() -> None:
    bars = [Bar("planned", [("a", 6.0, 1), ("b", 2.0, 2)]), Bar("measured", [("a", 6.0, 1), ("b", 0.0, 2)])]
    rects = parsed(draw_bars(bars, 1000, "m", "GiB")).findall("rect")
    widths = [float(rect.attrib["width"]) + 1 for rect in rects]
    assert len(widths) == 3
    assert widths[0] == widths[2] == pytest.approx(3 * widths[1], abs=0.5)
