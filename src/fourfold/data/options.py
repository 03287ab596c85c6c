"""How rows become tokens: the options of the data room."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fourfold.data.overlong import OVERLONG
from fourfold.data.row_formats import ROW_FORMATS, Kind
from fourfold.errors import ConfigError

__all__ = ["DataOptions"]

ROWS_A_WORKER = 20_000
MAX_WORKERS = 8


@dataclass(frozen=True)
class DataOptions:
    """How rows become tokens.

    Attributes:
        max_length: Tokens a row may have.
        train_on_prompt: Whether prompts are learned too.
        overlong: What happens to rows above `max_length`; a name in `OVERLONG`.
        row_format: A name in `ROW_FORMATS`; found from the columns where None.
        columns: Column of the data set for each key of the row format: `{"prompt": "question"}`.
        kinds: What rows may be; where columns fit several row formats, those of other kinds do not count. None: any.
        packing: Whether several rows share one sequence of `max_length` tokens.
        num_proc: Processes that tokenize; None: see `workers`.

    Raises:
        ConfigError: A value that is not allowed.
    """

    max_length: int = 1024
    train_on_prompt: bool = False
    overlong: str = "drop"
    row_format: str | None = None
    columns: dict[str, str] | None = None
    kinds: tuple[Kind, ...] | None = None
    packing: bool = False
    num_proc: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError("key max_length", found=self.max_length, allowed="at least 2")
        if self.num_proc is not None and self.num_proc < 1:
            raise ConfigError("key num_proc", found=self.num_proc, allowed="at least 1")
        if self.overlong not in OVERLONG:
            raise ConfigError("key overlong", found=self.overlong, allowed=OVERLONG)
        if self.row_format is not None and self.row_format not in ROW_FORMATS:
            raise ConfigError("key row_format", found=self.row_format, allowed=ROW_FORMATS)

    def workers(self, num_rows: int) -> int | None:
        """Processes that tokenize so many rows; None: this one. What comes of it is the same."""
        if self.num_proc is not None:
            return self.num_proc if self.num_proc > 1 else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Starting one takes as long as tokenizing some thousands of short rows.
        number = min(num_rows // ROWS_A_WORKER, cores, MAX_WORKERS)
        return number if number > 1 else None
