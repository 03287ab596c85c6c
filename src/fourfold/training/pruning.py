"""Leaving a run early because a search has no hope of it any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.errors import TrainingError

__all__ = ["PruningCallback", "TrainingPruned"]


class TrainingPruned(TrainingError):  # noqa: N818 - an end that a search wants, not a fault
    """The run was left early.

    Attributes:
        step: After which step.
        reason: Why.
    """

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(f"Training was pruned after step {step}: {reason}")


class PruningCallback(TrainerCallback):
    """Reports a figure of each evaluation, and ends training where there is no hope of it.

    Args:
        figure: Its name in the evaluations, such as eval_loss.
        is_hopeless: Is given the step and the figure.

    Raises:
        TrainingPruned: From within the trainer, after an evaluation which is not the last. A figure that is not finite
            is hopeless at any step.
    """

    def __init__(self, figure: str, is_hopeless: Callable[[int, float], bool]) -> None:
        self.figure = figure
        self._is_hopeless = is_hopeless

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        value = (metrics or {}).get(self.figure)
        if value is None:
            return
        if not math.isfinite(value):
            raise TrainingPruned(state.global_step, f"{self.figure} is {value}")
        if self._is_hopeless(state.global_step, float(value)) and state.global_step < state.max_steps:
            raise TrainingPruned(state.global_step, f"{self.figure} {value:.4g} is worse than that of other trials")
