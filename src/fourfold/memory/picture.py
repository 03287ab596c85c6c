"""Footprints side by side as stacked bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fourfold.memory.footprint import Footprint

__all__ = ["draw_footprints"]

GIB = 2**30
_COLOURS = (
    "#4269d0",
    "#97bbf5",
    "#6cc5b0",
    "#efb118",
    "#ff725c",
    "#a463f2",
    "#9c6b4e",
    "#3ca951",
    "#ff8ab7",
    "#9498a0",
)


def draw_footprints(path: Path, footprints: Mapping[str, Footprint], usable_bytes: int, title: str = "") -> Path:
    """Draw what each takes on the GPU, part by part, and the line above which nothing fits.

    Args:
        path: The picture; its suffix chooses the format.
        footprints: By name, from the first bar to the last.
        usable_bytes: What there is.
    """
    names = list(footprints)
    parts = sorted(
        {part for held in footprints.values() for part in held.parts},
        key=lambda part: -max(held.parts.get(part, 0) for held in footprints.values()),
    )
    figure = Figure(figsize=(9, 0.9 + 0.34 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lefts = [0.0] * len(names)
    for index, part in enumerate(parts):
        widths = [footprints[name].parts.get(part, 0) / GIB for name in names]
        axes.barh(names, widths, left=lefts, height=0.7, color=_COLOURS[index % len(_COLOURS)], label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for row, left in enumerate(lefts):
        axes.annotate(f"{left:.1f}", (left, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(usable_bytes / GIB, color="#333333", linewidth=1.2, linestyle="--")
    axes.annotate("usable", (usable_bytes / GIB, -0.6), (3, 0), textcoords="offset points", fontsize=8, va="bottom")
    axes.set_xlabel("GiB on the GPU at the peak")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return path
