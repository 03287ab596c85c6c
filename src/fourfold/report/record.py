"""What a page is made of: a run as its folder tells it, whole or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

__all__ = ["Answer", "Event", "RunRecord", "Setting", "TextSample", "Turn"]

Turn = Mapping[str, str]
"""One message: `role` and `content`."""


@dataclass(frozen=True)
class Setting:
    """A key of the configuration, its value and its default as YAML has them; no default where one must be given."""

    group: str
    key: str
    value: str
    default: str | None

    @property
    def is_changed(self) -> bool:
        return self.value != self.default


@dataclass(frozen=True)
class TextSample:
    """What the model answered to a prompt at an optimizer step; `reference` is the answer wanted, if one is known."""

    step: int
    prompt: tuple[Turn, ...]
    answer: str
    reference: str | None


@dataclass(frozen=True)
class Answer:
    """A held-out row that was answered after training, and whether that counts as the same as the reference."""

    prompt: tuple[Turn, ...]
    reference: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Event:
    """Something that happened to the run: begin, resume, step_down, out_of_memory, interrupted, pruned, failed, end."""

    name: str
    time: datetime | None
    step: int | None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        name: Of the folder.
        model, data, method: What was trained, on what, how; in words.
        metrics: Records of the log in order, each with its `step`.
        figures: Final figures by name, as the run gives them at its end; empty before.
        planned: Planned memory in bytes, by the names of the log: planned_peak_bytes, planned_memory_weights_bytes, ...
        events: In order.
        updated: When the log was last written to.
        samples, answers: Texts.
        settings: The configuration.
        data_reports: Title and fields of `fourfold.data.DataReport`, for each set of rows.
        versions, machine: Names and values, as they were when the run began last.
        faults: What of the folder could not be read, in words.
    """

    name: str
    model: str
    data: str
    method: str
    metrics: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    planned: Mapping[str, int] = field(default_factory=dict)
    events: Sequence[Event] = ()
    updated: datetime | None = None
    samples: Sequence[TextSample] = ()
    answers: Sequence[Answer] = ()
    settings: Sequence[Setting] = ()
    data_reports: Sequence[tuple[str, Mapping[str, Any]]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[str] = ()

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.metrics), default=0)
