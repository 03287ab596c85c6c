"""What happens to a run, one JSON object a line of events.jsonl: where it began, stopped, went on and ended.

Each has a `time` (UTC, ISO 8601), an `event` and, where that is known, a `step`; what else, the event decides. The file
outlives a resume: it is the history of the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic_core

from fourfold.errors import FourfoldError
from fourfold.files import write_whole
from fourfold.training.interrupt import TrainingInterrupted
from fourfold.training.out_of_memory import OutOfMemory
from fourfold.training.pruning import TrainingPruned
from fourfold.training.run_folder import EVENTS_FILE

__all__ = ["Journal", "read_lines"]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file of lines, and how many lines are none; a file that is not there has no lines."""
    if not path.is_file():
        return [], 0
    found: list[dict[str, Any]] = []
    num_broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif line.strip():
            num_broken += 1
    return found, num_broken


class Journal:
    """Writes the events of a run.

    Args:
        run_folder: Where the run is.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / EVENTS_FILE

    def open(self, step: int, **fields: Any) -> None:
        """The run begins, or goes on from a checkpoint of `step`; a line that was cut by a crash goes."""
        former = read_lines(self.path)[0] if step else []
        write_whole(self.path, "".join(_line(event) for event in former))
        self.note("resume" if step else "begin", step, **fields)

    def note(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Write one event."""
        at = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "step": step}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({key: value for key, value in at.items() if value is not None} | fields))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes why training within did not come to its end; the error goes on."""
        try:
            yield
        except TrainingInterrupted as error:
            step = int(error.checkpoint.name.rpartition("-")[2])
            self.note("interrupted", step, message=f"signal {error.signal_number}")
            raise
        except TrainingPruned as error:
            self.note("pruned", error.step, message=error.reason)
            raise
        except OutOfMemory as error:
            self.note("out_of_memory", error.step, message=str(error.what), parts=error.parts)
            raise
        except BaseException as error:
            message = error.what if isinstance(error, FourfoldError) else f"{type(error).__name__}: {error}"
            self.note("failed", message=message)
            raise


def _line(event: dict[str, Any]) -> str:
    return pydantic_core.to_json(event, inf_nan_mode="null", fallback=str).decode() + "\n"
