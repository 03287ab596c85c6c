"""Leaving a run in good order when the person or the system asks for it."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.errors import TrainingError
from fourfold.training.processes import Agreement, processes

__all__ = ["EvaluationInterrupted", "InterruptCallback", "TrainingInterrupted", "catch_interrupts"]

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(TrainingError):  # noqa: N818 - an orderly end, not a fault
    """The run was asked to stop, and left a checkpoint.

    Attributes:
        signal_number: The signal that asked; the exit code is 128 + this, as shells have it.
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path) -> None:
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number
        super().__init__(
            f"Training was interrupted after step {step}; nothing is lost",
            found=signal.Signals(signal_number).name,
            hint=f"`fourfold train {checkpoint.parent} --resume_from_checkpoint auto` goes on from {checkpoint.name}",
        )


class EvaluationInterrupted(Exception):  # noqa: N818 - a signal within the trainer, never an error to a person
    """Leaves an evaluation, which has nothing to save, so that the step before it can be saved now."""


class InterruptCallback(TrainerCallback):
    """Turns a pending signal into: finish this optimizer step, save, stop.

    Where several processes train, all do so with the same step, though the signal may have reached but one of them.

    Args:
        device: Where collectives work.

    Attributes:
        signal_number: The signal that all know of.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.signal_number: int | None = None
        self._agreement = Agreement(device or torch.device("cpu"))
        self._caught = 0

    def reset(self) -> None:
        """Forget a signal of an earlier run."""
        self.signal_number, self._caught = None, 0

    def _agree(self, *, now: bool = False) -> None:
        self.signal_number = self._agreement.largest(self._caught, now=now) or self.signal_number

    def request(self, signal_number: int, _: FrameType | None) -> None:
        """A signal handler. The second signal finds the former handlers back in place and ends the run."""
        self._caught = signal_number
        if not processes().are_several:
            self.signal_number = signal_number
        logger.warning(
            "%s: finishing this step, then saving a checkpoint. Once more to quit at once, without saving.",
            signal.Signals(signal_number).name,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._agree()
        if self.signal_number is not None:
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.signal_number is not None:
            control.should_evaluate = False
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._agree(now=True)
        if self.signal_number is not None:
            raise EvaluationInterrupted


@contextlib.contextmanager
def catch_interrupts(callback: InterruptCallback) -> Iterator[None]:
    """Send SIGINT and SIGTERM to `callback`, the first time; the handlers before are back afterwards.

    Outside the main thread Python allows no handlers, and a signal keeps its usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        callback.request(number, frame)

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
