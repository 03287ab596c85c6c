"""What is told around training: lines for people, JSON lines for machines."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from fourfold.data import DataReport
from fourfold.data.streamed import StreamReport
from fourfold.errors import ConfigError
from fourfold.memory.planner import Plan
from fourfold.models.size import ModelSize
from fourfold.training.progress import ProgressStyle

__all__ = ["PROGRESS", "Speaker"]

PROGRESS: dict[str, ProgressStyle] = {
    "terminal": ProgressStyle.LIVE,
    "plain": ProgressStyle.PLAIN,
    "json": ProgressStyle.JSON,
    "silent": ProgressStyle.SILENT,
}


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

    def result(self, event: str, result: DataReport | StreamReport | ModelSize | Plan | None) -> None:
        """Say a result by its `lines()`, or as a JSON event of its fields."""
        if result is None:
            return
        if self.progress == "json":
            fields = result.to_dict() if isinstance(result, Plan) else asdict(result)
            sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
            sys.stdout.flush()
        for line in result.lines():
            self.line(line)
