"""What a run says while it runs: a live line on a terminal, plain lines in a log, JSON for machines."""

from __future__ import annotations

import enum
import json
import sys
import time
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.training.evaluation_sets import loss_names
from fourfold.training.run_folder import metrics_record
from fourfold.training.samples import Answer

__all__ = ["ProgressCallback", "ProgressStyle", "choose_style"]


class ProgressStyle(enum.Enum):
    """How progress is told."""

    LIVE = "live"
    PLAIN = "plain"
    JSON = "json"
    SILENT = "silent"


def choose_style(stream: TextIO, *, json: bool = False) -> ProgressStyle:
    """JSON when asked for, else a live display where `stream` is a terminal and plain lines where not."""
    if json:
        return ProgressStyle.JSON
    return ProgressStyle.LIVE if stream.isatty() else ProgressStyle.PLAIN


class ProgressCallback(TrainerCallback):
    """Tells step, loss, tokens a second, memory and time left.

    Args:
        style: How.
        stream: Where to; standard output by default.
    """

    def __init__(self, style: ProgressStyle, stream: TextIO | None = None) -> None:
        self.style = style
        self.stream = sys.stdout if stream is None else stream
        self._console = Console(file=self.stream, highlight=False)
        self._latest: dict[str, Any] = {}
        self._began = 0.0
        self._first_step = 0
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._task = TaskID(0)
        self._evaluated = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._latest = {}
        self._began = time.monotonic()
        self._first_step = state.global_step
        if self.style is ProgressStyle.LIVE and state.is_world_process_zero:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", style="cyan"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, figures=""
            )
            # The cursor comes back even if the run ends by an error: see close().
            self._live = Live(self._progress, console=self._console, refresh_per_second=4)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated = 0
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, description="train")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated += 1
        if self._progress is not None:
            self._progress.update(self._task, description=f"evaluate (batch {self._evaluated})")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description="train")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or self.style is ProgressStyle.SILENT:
            return
        record = metrics_record(state.global_step, logs)
        if self.style is ProgressStyle.JSON:
            print(
                json.dumps({"event": "log", "max_steps": state.max_steps, **record}),
                file=self.stream,
                flush=True,
            )
            return
        evaluated = loss_names(logs)
        if "loss" not in logs and not evaluated:
            return
        self._latest.update(record)
        if self._progress is not None:
            self._progress.update(self._task, figures=figures(self._latest))
            for key, name in evaluated.items():
                line = f"step {state.global_step}: {_validation(name, logs[key])}"
                self._progress.console.print(line, style="green")
        elif self.style is ProgressStyle.PLAIN:
            head = f"step {state.global_step}/{state.max_steps}"
            lines = [_validation(name, logs[key]) for key, name in evaluated.items()]
            if "loss" in logs:
                lines.append(f"{figures(record)}  {self._time_left(state)} left")
            for line in lines:
                print(f"{head}  {line}", file=self.stream, flush=True)

    def tell_samples(self, state: TrainerState, answers: list[Answer]) -> None:
        """Tell what the model answers, on a line of its own each; to machines all of it."""
        for answer in answers:
            if self.style is ProgressStyle.JSON:
                self._print_json({"event": "sample", **asdict(answer)})
                continue
            line = f"sample  {_shortened(answer.last_turn(), 60)}  ->  {_shortened(answer.answer, 100)}"
            if self._progress is not None:
                self._progress.console.print(f"step {answer.step}: {line}", style="magenta", markup=False)
            elif self.style is ProgressStyle.PLAIN:
                print(f"step {answer.step}/{state.max_steps}  {line}", file=self.stream, flush=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.style is ProgressStyle.JSON and state.is_world_process_zero:
            self._print_json({"event": "save", "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; to be called when training ends by an error, too. Safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = self._progress = None

    def _print_json(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self.stream, flush=True)

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        seconds = (time.monotonic() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours:d}:{minutes:02d}:{seconds:02d}"


def _shortened(text: str, width: int) -> str:
    """On one line, of so many characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _validation(name: str, loss: float) -> str:
    return f"validation loss {loss:.4f}" + (f" ({name})" if name else "")


def figures(record: dict[str, Any]) -> str:
    """The figures of one log, short enough for one line: loss, speed and the peak of memory."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if "memory_peak_bytes" in record:
        memory = f"{record['memory_peak_bytes'] / 2**30:.2f} GiB"
        named = [(name, record.get(f"memory_{name}_bytes")) for name in ("weights", "rest")]
        shares = [f"{name} {size / 2**30:.2f}" for name, size in named if size is not None]
        parts.append(f"{memory} ({', '.join(shares)})" if shares else memory)
    return "  ".join(parts)
