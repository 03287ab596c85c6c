"""Watches each optimizer step: how long it takes, and whether its numbers are finite."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.errors import TrainingError
from fourfold.training.checkpoint import list_checkpoints

__all__ = ["StepGuard"]


class StepGuard(TrainerCallback):
    """Times the optimizer steps and stops a run before a gradient that is not finite reaches the adapters.

    Attributes:
        seconds: Spent in optimizer steps, without evaluation and saving, since it was last set to 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._loss: torch.Tensor | float = 0.0

    def add_loss(self, loss: torch.Tensor) -> None:
        """Count a microbatch's share of the step's loss; it stays on its device until the step is applied."""
        self._loss = self._loss + loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()
        self._loss = 0.0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises TrainingError, naming the step and the last good checkpoint. One wait for the device."""
        assert model is not None
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        loss, gradient_norm = torch.stack([torch.as_tensor(self._loss).to(norm), norm]).tolist()
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return
        checkpoints = list_checkpoints(Path(args.output_dir))
        raise TrainingError(
            f"The loss or its gradient is not finite at step {state.global_step + 1}",
            found=f"loss {loss}, gradient norm {gradient_norm}",
            hint="lower learning_rate, or look for bad weights or rows; "
            + (f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved yet"),
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
