"""Models side by side as a picture: one panel a figure, each model a point with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from fourfold.errors import ConfigError
from fourfold.evaluation.side_by_side import Cell, Comparison

__all__ = ["FORMATS", "check_picture", "draw_comparison"]

FORMATS = (".png", ".svg", ".pdf")
_MIB = 2**20
_COLOURS = ("#9498a0", "#4269d0", "#3ca951", "#efb118", "#ff725c", "#a463f2", "#6cc5b0", "#ff8ab7")
_COLUMNS = 3


def check_picture(path: Path) -> None:
    """Raise ConfigError for a picture of a kind that is not drawn, or in a folder that is not there."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError("a picture of an unknown kind", found=path.name, allowed=FORMATS)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"no folder {path.absolute().parent} to draw {path.name} in")


def draw_comparison(path: Path, comparison: Comparison, title: str = "") -> Path:
    """Draw each figure, then memory and speed.

    Args:
        path: The picture; its suffix chooses the format.
        comparison: What was measured.
        title: A line above all.
    """
    names = [model.name for model in comparison.models]
    costs: dict[str, dict[str, float | None]] = {
        "weights, MiB": {model.name: model.cost.weights_bytes / _MIB for model in comparison.models},
        "peak memory, MiB": {model.name: model.cost.peak_bytes / _MIB for model in comparison.models},
        "scored tokens/s": {model.name: model.cost.scored_per_second for model in comparison.models},
        "written tokens/s": {model.name: model.cost.generated_per_second for model in comparison.models},
        "energy, J": {model.name: model.cost.joules for model in comparison.models},
    }
    known = {name: {key: value for key, value in row.items() if value is not None} for name, row in costs.items()}
    known = {name: row for name, row in known.items() if row}
    num_panels = len(comparison.cells) + len(known)
    columns = min(_COLUMNS, num_panels)
    rows = math.ceil(num_panels / columns)
    height = rows * (0.75 + 0.32 * len(names)) + (0.4 if title else 0)
    canvas = Canvas(figsize=(4.2 * columns, height), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes, (figure, cells) in zip(panels, comparison.cells.items(), strict=False):
        arrow = "higher is better" if comparison.higher_is_better[figure] else "lower is better"
        _points(axes, names, cells)
        _finish(axes, names, f"{figure}  ({arrow})")
    for axes, (cost, values) in zip(panels[len(comparison.cells) :], known.items(), strict=False):
        _bars(axes, names, values)
        _finish(axes, names, cost)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    if title:
        canvas.suptitle(title, x=0.01, ha="left", fontsize=11)
    canvas.savefig(path)
    return path


def _points(axes: Axes, names: list[str], cells: Mapping[str, Cell]) -> None:
    first = cells.get(names[0])
    if first is not None:
        axes.axvline(first.value, color="#c4c8cf", linewidth=1, zorder=0)
    for row, name in enumerate(names):
        cell = cells.get(name)
        if cell is None:
            axes.annotate("does not compare", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            continue
        colour = _COLOURS[row % len(_COLOURS)]
        if cell.interval is not None:
            axes.plot(cell.interval, (row, row), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([cell.value], [row], "o", color=colour, markersize=6)
        axes.annotate(
            f"{cell.value:.4g}", (cell.value, row), (0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    axes.margins(x=0.12)


def _bars(axes: Axes, names: list[str], values: Mapping[str, float]) -> None:
    for row, name in enumerate(names):
        if name not in values:
            continue
        axes.barh([row], [values[name]], height=0.55, color=_COLOURS[row % len(_COLOURS)])
        axes.annotate(
            f"{values[name]:,.4g}", (values[name], row), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(left=0)
    axes.margins(x=0.18)


def _finish(axes: Axes, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    # Room above the first row for its number.
    axes.set_ylim(len(names) - 0.5, -0.75)
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
