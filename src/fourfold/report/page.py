"""A run's page as HTML: styles, script and charts stand in it, and it asks for nothing else.

Whatever comes from the run is text: the template escapes it. Beside that, the page's own policy allows no script but
the one below, by its hash, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from fourfold.report.charts import Bar, above_axis, draw_bars, draw_chart, plotted
from fourfold.report.glance import figures_of, status_of
from fourfold.report.numbers import gib, number
from fourfold.report.record import Answer, Event, RunRecord, Setting, TextSample, Turn
from fourfold.report.series import Chart, Mark, charts_of

__all__ = ["render"]

HERE = Path(__file__).parent
GIB = 2**30

# The widths at which a chart is drawn; the style sheet shows one of the two.
NARROW, WIDE, WHOLE = 360, 540, 1112
HEIGHTS = {NARROW: 220, WIDE: 250, WHOLE: 330}
# Of each chart, points for reading values off, and rows of its table.
NUM_HOVER_POINTS, NUM_TABLE_ROWS = 400, 24
# Of texts: prompts, steps of each, held-out answers, characters of a text.
NUM_PROMPTS, NUM_SAMPLE_STEPS, NUM_ANSWERS, NUM_CHARACTERS = 12, 8, 24, 2000

T = TypeVar("T")


@dataclass(frozen=True)
class _Drawn:
    """A chart on the page."""

    key: str
    chart: Chart
    pictures: list[Markup]
    table: list[list[str]]
    num_above: int


def render(record: RunRecord, now: datetime | None = None) -> str:
    """The page.

    Args:
        now: When it is written; None: now.
    """
    charts = [_drawn(f"chart{index}", chart) for index, chart in enumerate(charts_of(record.metrics, _marks(record)))]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = _template().render(
        run=record,
        status=status_of(record),
        figures=figures_of(record),
        charts=charts,
        hover={drawn.key: _hover(drawn.chart) for drawn in charts},
        memory=_memory(record),
        samples=_sample_groups(record.samples),
        num_prompts=len({_key(sample.prompt) for sample in record.samples}),
        answers=_chosen_answers(record.answers),
        num_correct=sum(answer.correct for answer in record.answers),
        data_tables=[(title, list(_data_rows(fields))) for title, fields in record.data_reports],
        settings=_grouped(record.settings),
        num_changed=sum(setting.is_changed for setting in record.settings),
        events=[_event_row(event) for event in record.events],
        written=(now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
    )
    # Half of a surrogate pair, which JSON can hold, is no character.
    return text.encode("utf-8", errors="replace").decode("utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clipped"] = _clipped
    return environment.get_template("page.html.jinja")


def _clipped(text: str) -> str:
    rest = len(text) - NUM_CHARACTERS
    return text if rest <= 0 else f"{text[:NUM_CHARACTERS]} … ({rest:,} more characters)"


def _drawn(key: str, chart: Chart) -> _Drawn:
    wide = WHOLE if chart.is_wide else WIDE
    pictures = [draw_chart(chart, width, HEIGHTS[width], f"{key}-{width}") for width in (wide, NARROW)]
    return _Drawn(key, chart, pictures, _table(chart), above_axis(chart))


def _marks(record: RunRecord) -> list[Mark]:
    names = {"resume": "resumed", "step_down": "less memory", "interrupted": "interrupted"}
    found = {event.step: names[event.name] for event in record.events if event.name in names and event.step}
    return [Mark(step, text) for step, text in found.items() if step is not None]


def _hover(chart: Chart) -> list[dict[str, Any]]:
    """What the page's script reads values off: the lines' points, as written."""
    return [
        {
            "name": line.name,
            "colour": line.colour,
            "points": [[step, float(f"{value:.5g}")] for step, value in line.points],
        }
        for line in plotted(chart, NUM_HOVER_POINTS)
        if not line.is_faint
    ]


def _table(chart: Chart) -> list[list[str]]:
    """Some rows of the chart's values, its first and its last among them: step, and a cell for each line."""
    lines = [dict(line.points) for line in chart.series]
    every = sorted({step for line in lines for step in line})
    # Steps with the most values say the most.
    rarest = min((line for line in lines if len(line) > 1), key=len, default=lines[0])
    steps = _evenly(sorted({*rarest, every[0], every[-1]}) if len(lines) > 1 else every, NUM_TABLE_ROWS)
    return [[number(step, 7), *(number(line[step]) if step in line else "–" for line in lines)] for step in steps]


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of them, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


_PARTS = {
    "memory_weights_bytes": "weights",
    "memory_adapters_bytes": "adapters",
    "memory_optimizer_state_bytes": "optimizer state",
    "memory_rest_bytes": "activations, gradients and what is worked in",
}


def _memory(record: RunRecord) -> dict[str, Any] | None:
    """Memory by part, planned beside measured; None where neither is known, as on a CPU."""
    logged: Mapping[str, Any] = next((item for item in reversed(record.metrics) if "memory_rest_bytes" in item), {})
    measured = {key: record.figures.get(key, logged.get(key)) for key in _PARTS}
    planned = {key: record.planned.get(f"planned_{key}") for key in _PARTS}
    sides = {"planned": planned, "measured": measured}
    bars = [
        Bar(label, [(name, (side[key] or 0) / GIB, index) for index, (key, name) in enumerate(_PARTS.items(), start=1)])
        for label, side in sides.items()
        if any(side.values())
    ]
    if not bars:
        return None
    rows = [(index, name, planned[key], measured[key]) for index, (key, name) in enumerate(_PARTS.items(), start=1)]
    rows.append((0, "together", _total(planned), _total(measured)))
    return {
        "pictures": [draw_bars(bars, width, f"memory-{width}", "GiB") for width in (WHOLE, NARROW)],
        "rows": [(index, name, *map(_size, (a, b)), _difference(a, b)) for index, name, a, b in rows],
    }


def _total(side: Mapping[str, int | None]) -> int | None:
    return sum(value or 0 for value in side.values()) if any(side.values()) else None


def _size(value: int | None) -> str:
    return "–" if value is None else gib(value)


def _difference(planned: int | None, measured: int | None) -> str:
    if not planned or measured is None:
        return "–"
    return f"{measured / planned - 1:+.1%}".replace("-", "−")


def _key(prompt: Sequence[Turn]) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in prompt)


def _sample_groups(samples: Sequence[TextSample]) -> list[list[TextSample]]:
    """Samples of one prompt together, by step; of one step the later."""
    groups: dict[Any, dict[int, TextSample]] = {}
    for sample in samples:
        groups.setdefault(_key(sample.prompt), {})[sample.step] = sample
    chosen = list(groups.values())[:NUM_PROMPTS]
    return [_evenly([group[step] for step in sorted(group)], NUM_SAMPLE_STEPS) for group in chosen]


def _chosen_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Those that are wrong first, and about as many that are right."""
    wrong = [answer for answer in answers if not answer.correct]
    right = [answer for answer in answers if answer.correct]
    num_wrong = min(len(wrong), max(NUM_ANSWERS // 2, NUM_ANSWERS - len(right)))
    return wrong[:num_wrong] + right[: NUM_ANSWERS - num_wrong]


def _data_rows(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    def count(key: str) -> int:
        value = fields.get(key)
        return value if isinstance(value, int) else 0

    if fields.get("row_format"):
        yield "rows are", str(fields["row_format"])
    if count("buffer_size"):
        yield "streamed in blocks of", f"{count('buffer_size'):,} rows"
        return
    yield "rows read", f"{count('rows_read'):,}"
    yield "rows kept", f"{count('rows_kept'):,}"
    for key, label in (
        ("rows_trained_on", "that are trained on, too"),
        ("rows_overlong", f"above max_length ({fields.get('overlong')})"),
        ("rows_unlearned", "with nothing to learn, left out"),
        ("rows_empty", "empty, left out"),
    ):
        if count(key):
            yield label, f"{count(key):,}"
    tokens, learned = count("num_tokens"), count("num_supervised_tokens")
    yield "tokens", f"{tokens:,}"
    if tokens:
        yield "of them learned", f"{learned:,} ({learned / tokens:.0%})"
    percentiles = fields.get("length_percentiles")
    if isinstance(percentiles, Mapping) and percentiles:
        yield "tokens a row", ", ".join(f"p{percent} {length}" for percent, length in percentiles.items())
    if count("longest"):
        yield "longest row read", f"{count('longest'):,} tokens"
    packed = fields.get("rows_packed")
    if isinstance(packed, int) and packed and count("max_length"):
        yield "packed into", f"{packed:,} rows, {tokens / (packed * count('max_length')):.0%} filled"


def _grouped(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.group, []).append(setting)
    return groups


_EVENTS = {
    "begin": "began",
    "resume": "went on from a checkpoint",
    "step_down": "went on with a plan that takes less memory",
    "out_of_memory": "memory ran out",
    "interrupted": "interrupted",
    "failed": "failed",
    "pruned": "pruned by a search",
    "end": "ended",
}


def _event_row(event: Event) -> tuple[str, str, str, str]:
    """Time, step, what, and more of it."""
    time = event.time.strftime("%Y-%m-%d %H:%M:%S") if event.time else "–"
    step = "–" if event.step is None else f"{event.step:,}"
    detail = str(event.fields.get("message") or "")
    return time, step, _EVENTS.get(event.name, event.name), detail
