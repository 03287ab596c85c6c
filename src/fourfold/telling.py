"""What is told around training: lines for people, JSON lines for machines."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import ParamSpec, TypeVar

from fourfold.config import RunConfig
from fourfold.config.resuming import Resumption
from fourfold.data import DataReport
from fourfold.data.streamed import StreamReport
from fourfold.errors import ConfigError
from fourfold.memory.planner import Plan
from fourfold.models.size import ModelSize
from fourfold.training.progress import ProgressStyle
from fourfold.training.trackers import require_trackers, tracking

__all__ = ["PROGRESS", "Speaker", "tracked"]

P = ParamSpec("P")
R = TypeVar("R")

PROGRESS: dict[str, ProgressStyle] = {
    "terminal": ProgressStyle.LIVE,
    "plain": ProgressStyle.PLAIN,
    "json": ProgressStyle.JSON,
    "silent": ProgressStyle.SILENT,
}


def tracked(verb: Callable[P, R]) -> Callable[P, R]:
    """A function, first of a `config`, within whose trackers it runs; see `fourfold.training.trackers`."""

    @functools.wraps(verb)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        config = args[0] if args else kwargs["config"]
        assert isinstance(config, RunConfig)
        require_trackers(config.report_to)
        with tracking(config.report_to, config.project):
            return verb(*args, **kwargs)

    return within


class Speaker:
    """Prints what happens around training: lines for people, JSON lines for machines."""

    def __init__(self, progress: str) -> None:
        if progress not in PROGRESS:
            raise ConfigError("unknown kind of progress", found=progress, allowed=PROGRESS)
        self.progress = progress

    def line(self, line: str) -> None:
        if self.progress in ("terminal", "plain"):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def result(self, event: str, result: DataReport | StreamReport | ModelSize | Plan | Resumption | None) -> None:
        """Say a result by its `lines()`, or as a JSON event of its fields."""
        if result is None:
            return
        if self.progress == "json":
            fields = result.to_dict() if isinstance(result, Plan) else asdict(result)
            sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
            sys.stdout.flush()
        for line in result.lines():
            self.line(line)
