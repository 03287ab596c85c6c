"""Stopping when evaluations are no longer better, by Transformers' rule; a run that goes on counts on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fourfold.training.best import BestOptions

__all__ = ["EarlyStopping", "early_stopping", "keep_callback_states"]

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' callback, with two differences.

    Its count is read from the checkpoint that a run goes on from, while patience and threshold are those of now. And of
    several evaluation sets it looks only at the one that has the figure.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            logger.info(
                "The run was stopped early at step %d; a longer early_stopping_patience would go on", state.global_step
            )
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is None or args.metric_for_best_model not in metrics:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and self.early_stopping_patience_counter >= self.early_stopping_patience:
            logger.info(
                "Step %d: no better %s for %d evaluations; training stops",
                state.global_step,
                args.metric_for_best_model,
                self.early_stopping_patience_counter,
            )


def early_stopping(best: BestOptions) -> list[TrainerCallback]:
    """The callback, if it is asked for."""
    return [] if best.patience is None else [EarlyStopping(best.patience, best.threshold)]


def keep_callback_states(state: TrainerState, callbacks: Iterable[TrainerCallback | TrainerControl]) -> None:
    """Put what callbacks have counted into the state that a checkpoint holds."""
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()
