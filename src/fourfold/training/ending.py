"""A run that goes on from the checkpoint of its last step has no step left to make."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EndingCallback"]


class EndingCallback(TrainerCallback):
    """Stops a run before its first step where it has made all of them; the Trainer itself looks after a step only."""

    def __init__(self) -> None:
        self._has_ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._has_ended = state.global_step >= state.max_steps
        control.should_training_stop = self._has_ended

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._has_ended:
            # All was done of the epoch that is in the checkpoint.
            control.should_log = control.should_evaluate = control.should_save = False
