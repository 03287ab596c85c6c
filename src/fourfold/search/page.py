"""The page of a study: Optuna's own plots as SVG, and all trials as a table, in one file that needs no other."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from optuna import Study
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from fourfold.search.study import TrialRecord

__all__ = ["render_study"]

logger = logging.getLogger(__name__)

# With fewer finished trials than these there is nothing to compare.
_LEAST_FINISHED = 2
_TEMPLATE = jinja2.Environment(
    loader=jinja2.PackageLoader("fourfold.search", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True)
class _Picture:
    title: str
    svg: str


def render_study(
    study: Study, objectives: Mapping[str, str], records: Sequence[TrialRecord], best: Sequence[int]
) -> str:
    """The page's HTML.

    Args:
        objectives: minimize or maximize, by name.
        records: All trials.
        best: Numbers of the best ones.
    """
    page: str = _TEMPLATE.get_template("page.html.jinja").render(
        name=study.study_name,
        objectives=objectives,
        records=records,
        keys=list(dict.fromkeys(key for record in records for key in record.params)),
        best=best,
        counts={
            outcome: count
            for outcome in ("finished", "pruned", "refused", "failed", "running", "waiting")
            if (count := sum(record.outcome == outcome for record in records))
        },
        pictures=list(_pictures(study, list(objectives))),
        shown=_shown,
    )
    return page


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)


def _pictures(study: Study, objectives: list[str]) -> Iterator[_Picture]:
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < _LEAST_FINISHED:
        return
    plots = optuna.visualization.matplotlib
    varied = len({str(sorted(trial.params.items())) for trial in finished}) > 1
    targets: list[tuple[str, dict[str, Any]]] = [("", {})]
    if len(objectives) > 1:
        if len(objectives) <= 3:
            yield from _drawn("Pareto front", plots.plot_pareto_front, study, target_names=objectives)
        targets = [
            (f": {name}", {"target": lambda trial, index=index: trial.values[index], "target_name": name})
            for index, name in enumerate(objectives)
        ]
    for words, options in targets:
        named = options or {"target_name": objectives[0]}
        yield from _drawn(f"Course of the search{words}", plots.plot_optimization_history, study, **named)
        if varied:
            weighed = {"evaluator": PedAnovaImportanceEvaluator()}
            yield from _drawn(f"What matters{words}", plots.plot_param_importances, study, **named, **weighed)
            yield from _drawn(f"Each key by itself{words}", plots.plot_slice, study, **named)
            yield from _drawn(f"All keys together{words}", plots.plot_parallel_coordinate, study, **named)
    if len(objectives) == 1:
        yield from _drawn("While the trials trained", plots.plot_intermediate_values, study)
    yield from _drawn("Workers over time", plots.plot_timeline, study)


def _drawn(title: str, plot: Any, study: Study, **options: Any) -> Iterator[_Picture]:
    """One of Optuna's plots; none where it has nothing to draw."""
    import matplotlib.pyplot as plt

    # The same file for the same study, and text that can be read out and found.
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "figure.max_open_warning": 0, "figure.autolayout": False}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        # Optuna calls its plots with matplotlib experimental, and says so each time.
        warnings.simplefilter("ignore")
        try:
            drawn = plot(study, **options)
        except Exception:
            logger.warning("%s could not be drawn", title, exc_info=True)
            plt.close("all")
            return
        axes: list[Axes] = list(np.ravel(np.asarray(drawn, dtype=object)))
        figure = axes[0].get_figure()
        assert isinstance(figure, Figure)
        _make_room(figure, len(axes))
        FigureCanvasAgg(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    svg = text.getvalue()
    # Names of clips and markers are the page's own: each picture's get its number.
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'id="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}-', svg)
    yield _Picture(title, svg[svg.index("<svg") :])


def _make_room(figure: Figure, num_axes: int) -> None:
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, 3.0 * num_axes, 8.0), max(height, 4.5))
    figure.suptitle("")
    for axes in figure.axes:
        for place in ("left", "center"):
            axes.set_title("", loc=place)
