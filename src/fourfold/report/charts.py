"""Charts as inline SVG, drawn for the width they are shown at: text keeps its size on a phone."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fourfold.report.numbers import number, ticks
from fourfold.report.series import Chart, Point, Series, thinned

__all__ = ["Bar", "above_axis", "described", "draw_bars", "draw_chart", "plotted"]

LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
_ABOVE = 0.98
"""Share of the values that an axis shows at least: the rest may be a few far above, such as the first losses."""
_FAR = 3.0


@dataclass(frozen=True)
class Bar:
    """A stacked bar: (name, bytes or other amount, number of its colour) from left to right."""

    label: str
    parts: Sequence[tuple[str, float, int]]

    @property
    def total(self) -> float:
        return sum(amount for _, amount, _ in self.parts)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def _value_range(chart: Chart) -> tuple[float, float, int]:
    """Least and highest value of the axis, and how many values lie above it."""
    values = sorted(value for line in chart.series for _, value in line.points)
    low, high = values[0], values[-1]
    bulk = values[min(math.ceil(len(values) * _ABOVE), len(values)) - 1]
    if len(values) >= 50 and high - low > _FAR * (bulk - low) > 0:
        high = bulk + 0.25 * (bulk - low)
    if chart.from_zero or 0 < low < 0.3 * high:
        low = min(low, 0.0)
    return low, high, sum(value > high for value in values)


def above_axis(chart: Chart) -> int:
    """How many values lie above what the chart shows."""
    return _value_range(chart)[2]


def plotted(chart: Chart, width: int) -> list[Series]:
    """The chart's lines with as many points as a width of so many pixels can show."""
    return [
        Series(line.name, thinned(line.points, width), line.colour, line.has_markers, line.is_faint)
        for line in chart.series
    ]


def described(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    told = []
    for line in chart.series:
        if line.is_faint:
            continue
        (first, begin), (last, end) = line.points[0], line.points[-1]
        at, least = min(line.points, key=lambda point: point[1])
        text = f"{line.name}: {number(begin)} at step {number(first, 7)}"
        if last != first:
            text += f", {number(end)} at step {number(last, 7)}, least {number(least)} at step {number(at, 7)}"
        told.append(text)
    unit = f" ({chart.unit})" if chart.unit else ""
    return f"{chart.title}{unit} by optimizer step. {'; '.join(told)}."


def draw_chart(chart: Chart, width: int, height: int, key: str) -> Markup:
    """The chart as an `svg` element.

    Args:
        width, height: In pixels, of the shown size.
        key: Unique on the page; what the page's script knows the chart by stands before its last "-".
    """
    steps = [step for line in chart.series for step, _ in line.points]
    low, high, _ = _value_range(chart)
    value_ticks = ticks(low, high, most=6)
    step_ticks = [step for step in ticks(min(steps), max(steps), most=max(width // 75, 4)) if float(step).is_integer()]
    x = _Axis(*_around(min(steps), max(steps)), LEFT, width - RIGHT)
    y = _Axis(value_ticks[0], value_ticks[-1], height - BOTTOM, TOP)
    svg = ET.Element(
        "svg",
        {
            "class": "plot",
            "viewBox": f"0 0 {width} {height}",
            "role": "img",
            "aria-label": described(chart),
            "data-chart": key.rpartition("-")[0],
            "data-x": f"{x.low} {x.high} {x.begin} {x.end}",
            "data-y": f"{y.low} {y.high} {y.begin} {y.end}",
        },
    )
    for value in value_ticks:
        _line(svg, "grid" if value else "grid zero", x.begin, y(value), x.end, y(value))
        _text(svg, x.begin - 8, y(value) + 4, number(value), "end")
    for step in step_ticks:
        if x.low <= step <= x.high:
            _line(svg, "tick", x(step), y.begin, x(step), y.begin + 4)
            _text(svg, x(step), y.begin + 18, number(step, 7), "middle")
    _text(svg, (x.begin + x.end) / 2, height - 4, "optimizer step", "middle")
    clip = ET.SubElement(ET.SubElement(svg, "clipPath", {"id": key}), "rect")
    _place(clip, x.begin - 4, TOP - 4, x.end - x.begin + 8, y.begin - TOP + 8)
    for index, mark in enumerate(chart.marks):
        if x.low <= mark.step <= x.high:
            _line(svg, "mark", x(mark.step), y.end, x(mark.step), y.begin)
            is_right = x(mark.step) > (x.begin + x.end) / 2
            # Every other one lower, so that neighbours do not lie over one another.
            down = y.end + 10 + index % 2 * 14
            _text(svg, x(mark.step) + (-4 if is_right else 4), down, mark.text, "end" if is_right else "start")
    lines = ET.SubElement(svg, "g", {"clip-path": f"url(#{key})"})
    for line in plotted(chart, width):
        _draw_line(lines, line, x, y)
    return Markup(ET.tostring(svg, encoding="unicode"))


def _around(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 1, high + 1)


def _draw_line(parent: ET.Element, line: Series, x: _Axis, y: _Axis) -> None:
    shade = f"c{line.colour}" + (" faint" if line.is_faint else "")
    places = [(x(step), y(value)) for step, value in line.points]
    if len(places) > 1:
        ET.SubElement(parent, "path", {"class": f"line {shade}", "d": _path(places)})
    if (line.has_markers and len(places) <= 60) or len(places) == 1:
        for across, down in places:
            ET.SubElement(parent, "circle", {"class": shade, "cx": f"{across:.1f}", "cy": f"{down:.1f}", "r": "3.2"})


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places)


def draw_bars(bars: Sequence[Bar], width: int, key: str, unit: str) -> Markup:
    """Stacked bars below one another, over one axis."""
    row, gap, top, left = 30, 14, 6, 84
    height = top + len(bars) * (row + gap) + 40
    axis_ticks = ticks(0, max(bar.total for bar in bars), most=max(width // 90, 3))
    x = _Axis(0, axis_ticks[-1], left, width - RIGHT - 8)
    told = "; ".join(
        f"{bar.label}: " + ", ".join(f"{name} {number(amount)}" for name, amount, _ in bar.parts) for bar in bars
    )
    svg = ET.Element(
        "svg",
        {"class": "bars", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": f"In {unit}. {told}."},
    )
    floor = height - 40
    for value in axis_ticks:
        _line(svg, "grid", x(value), top, x(value), floor)
        _text(svg, x(value), floor + 16, number(value), "middle")
    _text(svg, (x.begin + x.end) / 2, height - 4, unit, "middle")
    for index, bar in enumerate(bars):
        down = top + index * (row + gap) + gap / 2
        _text(svg, left - 10, down + row / 2 + 4, bar.label, "end")
        begin = 0.0
        for name, amount, colour in bar.parts:
            if amount > 0:
                rect = ET.SubElement(svg, "rect", {"class": f"c{colour}"})
                _place(rect, x(begin), down, max(x(begin + amount) - x(begin) - 1, 0.5), row)
                ET.SubElement(rect, "title").text = f"{bar.label}, {name}: {number(amount)} {unit}"
            begin += amount
    return Markup(ET.tostring(svg, encoding="unicode"))


def _line(parent: ET.Element, name: str, x1: float, y1: float, x2: float, y2: float) -> None:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ET.SubElement(parent, "line", {"class": name} | {key: f"{value:.1f}" for key, value in places.items()})


def _text(parent: ET.Element, x: float, y: float, text: str, anchor: str) -> None:
    element = ET.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor})
    element.text = text


def _place(rect: ET.Element, x: float, y: float, width: float, height: float) -> None:
    for key, value in {"x": x, "y": y, "width": width, "height": height}.items():
        rect.set(key, f"{value:.1f}")
