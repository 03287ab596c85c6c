"""What a run came to, at a glance: how it stands, and its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.report.numbers import duration, gib, number
from fourfold.report.record import Event, RunRecord
from fourfold.report.series import points_of

__all__ = ["Figure", "Status", "figures_of", "status_of"]


@dataclass(frozen=True)
class Figure:
    """One figure: what it is, its value, and a line below."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Status:
    """How a run stands: good, bad or open; in words."""

    kind: str
    text: str
    detail: str = ""


def status_of(record: RunRecord) -> Status:
    """Told by the run's last event; a run that was killed leaves none."""
    last = record.events[-1] if record.events else None
    step = f"step {record.last_step:,}"
    if last is None:
        return Status("open", "No account of its end", f"last logged at {step}")
    if last.name == "end":
        return Status("good", "Finished", f"{step}")
    if last.name == "interrupted":
        return Status("bad", "Interrupted", f"after {step}; a checkpoint was saved")
    if last.name == "out_of_memory":
        return Status("bad", "Out of memory", f"after {step}")
    if last.name == "pruned":
        return Status("open", "Pruned", f"after {step}: {last.fields.get('message', '')}")
    if last.name == "failed":
        return Status("bad", "Failed", str(last.fields.get("message", "")))
    return Status("open", "Not ended yet", f"last logged at {step}; running, or killed")


def figures_of(record: RunRecord) -> list[Figure]:
    """The figures at the top of the page; those that the run does not have are left out."""
    return [figure for figure in _figures(record) if figure is not None]


def _figures(record: RunRecord) -> Iterator[Figure | None]:
    metrics = record.metrics
    final = record.figures
    validation = points_of(metrics, "eval_loss")
    if validation:
        step, best = min(validation, key=lambda point: point[1])
        is_last = step == validation[-1][0]
        note = "the best so far" if is_last else f"best {_loss(best)} at step {number(step, 7)}"
        yield Figure("Validation loss", _loss(validation[-1][1]), note if len(validation) > 1 else "")
    training = points_of(metrics, "loss")
    if training:
        note = f"from {_loss(training[0][1])}" if len(training) > 1 else ""
        yield Figure("Training loss", _loss(training[-1][1]), note)
    yield _share(final or _last(metrics), "exact_match", "Exact match", "exact_match_rows")
    yield _share(_last(metrics), "eval_rewards/accuracies", "Preferred answers")
    yield _share(_last(metrics), "eval_accuracy", "Preferred answers")
    perplexity = _last(metrics).get("perplexity")
    if isinstance(perplexity, (int, float)):
        yield Figure("Perplexity", number(perplexity))
    yield _time(record)
    speeds = [value for _, value in points_of(metrics, "tokens_per_second")]
    if speeds:
        yield Figure("Speed", number(statistics.median(speeds)), "tokens/s, median")
    tokens = points_of(metrics, "num_tokens")
    if tokens:
        yield Figure("Tokens", number(tokens[-1][1], 7), "read in training")
    yield _memory(record)


def _loss(value: float) -> str:
    """Always four digits, so that losses side by side have the same number."""
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1e3 else number(value)


def _last(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each figure."""
    merged: dict[str, Any] = {}
    for record in metrics:
        merged.update({key: value for key, value in record.items() if value is not None})
    return merged


def _share(figures: Mapping[str, Any], key: str, label: str, rows: str = "") -> Figure | None:
    share = figures.get(key)
    if not isinstance(share, (int, float)):
        return None
    count = figures.get(rows)
    return Figure(label, f"{share:.1%}", f"of {count:,} held-out rows" if isinstance(count, int) else "held out")


def _time(record: RunRecord) -> Figure | None:
    """Of training alone where the run went through in one; else between its first sign and its last."""
    begins = [event for event in record.events if event.name in ("begin", "resume")]
    seconds = record.figures.get("train_seconds")
    if isinstance(seconds, (int, float)) and len(begins) <= 1:
        return Figure("Training time", duration(seconds))
    total = sum(_lengths(record))
    if not total:
        return None
    return Figure("Time", duration(total), f"in {len(begins)} parts" if len(begins) > 1 else "so far")


def _lengths(record: RunRecord) -> Iterator[float]:
    """Seconds from each beginning to the last sign before the next; a part that was killed leaves its beginning."""
    begin: Event | None = None
    last = None
    for event in record.events:
        if event.name in ("begin", "resume"):
            if begin is not None and begin.time and last:
                yield (last - begin.time).total_seconds()
            begin, last = event, event.time
        else:
            last = event.time or last
    if begin is not None and begin.time and last:
        if record.updated and record.events[-1] is begin:
            last = max(last, record.updated)
        yield (last - begin.time).total_seconds()


def _memory(record: RunRecord) -> Figure | None:
    peaks = [value for _, value in points_of(record.metrics, "memory_peak_bytes")]
    peak = record.figures.get("memory_peak_bytes") or (max(peaks) if peaks else None)
    if peak is None:
        return None
    planned = record.planned.get("planned_peak_bytes")
    return Figure("Peak memory", gib(peak), f"planned {gib(planned)}" if planned else "of the process")
