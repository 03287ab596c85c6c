"""Watches each optimizer step: how long it takes, and whether its numbers are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.errors import TrainingError
from fourfold.optimizers.base import OwnOptimizer
from fourfold.training.checkpoint import list_checkpoints

__all__ = ["StepGuard", "own_optimizer"]

NUM_NAMED_ROWS = 32
# Of the loss: what does not fit fp16 then is a fault of the numbers.
SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class _Report:
    """What a step came to, on its way from the device.

    Attributes:
        values: Each microbatch's share of the loss, and the gradients' norm; fp32, on the CPU.
        arrived: When `values` may be read; None: now.
        rows: Numbers of each microbatch's rows, where they are known.
    """

    step: int
    output_dir: Path
    values: Tensor
    arrived: torch.cuda.Event | None
    rows: Sequence[Sequence[int]]

    def check(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        *losses, norm = self.values.tolist()
        if all(map(math.isfinite, [*losses, norm])):
            return
        spoiled = [number for number, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        found = f"loss {sum(losses)}, gradient norm {norm}; microbatch {', '.join(str(n + 1) for n in spoiled)}"
        rows = [row + 1 for number in spoiled if number < len(self.rows) for row in self.rows[number]]
        if rows:
            named = ", ".join(map(str, rows[:NUM_NAMED_ROWS]))
            found += f", rows {named}" + (", ..." if len(rows) > NUM_NAMED_ROWS else "")
            found += " of the prepared training data, counted from 1"
        checkpoints = list_checkpoints(self.output_dir)
        raise TrainingError(
            f"The loss or its gradient is not finite at step {self.step}",
            found=found,
            hint="lower learning_rate, or look for bad weights or rows; "
            + (f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved yet"),
        )


class StepGuard(TrainerCallback):
    """Times the optimizer steps and stops a run before a gradient that is not finite reaches the adapters.

    The optimizers of `fourfold.optimizers` make no update of such a step, so its numbers are looked at one step later,
    when they have arrived: nothing waits for them. They are looked at without delay before anything is logged,
    evaluated, saved or ended. With any other optimizer each step waits for its numbers before it is made.

    Where the loss is scaled (fp16), gradients that are not finite are no fault: the scaler leaves the step out and
    halves the scale. A loss that is not finite is one, and so is a scale below `SMALLEST_SCALE`.

    Args:
        scaler: What scales the loss; None: nothing does.
        total_norm: The norm of a model's gradients, where the optimizer is not ours.

    Attributes:
        skipped: Steps that were left out since the run began, or went on.
        seconds: Spent in optimizer steps, without evaluation and saving, since it was last set to 0.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, total_norm: Callable[[nn.Module], Tensor]) -> None:
        self.seconds = 0.0
        self.skipped = 0
        self._scaler = scaler
        self._total_norm = total_norm
        self._scale = 0.0
        self._began = 0.0
        self._losses: list[Tensor] = []
        self._rows: Sequence[Sequence[int]] = ()
        self._report: _Report | None = None

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """Tell the rows of the next step, by microbatch: their positions in the training data set."""
        self._rows = rows

    def add_loss(self, loss: Tensor) -> None:
        """Count a microbatch's share of the step's loss; it stays on its device until the step is applied."""
        self._losses.append(loss)

    def check(self) -> None:
        """Look at the last step now. Raises TrainingError naming step, rows and the last good checkpoint."""
        report, self._report = self._report, None
        if report is not None:
            report.check()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = 0.0
        self._report = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()
        self._losses = []
        if self._scaler is not None:
            self._scale = self._scaler.get_scale()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        losses = torch.stack(self._losses).float()
        own = own_optimizer(optimizer)
        if own is not None:
            own.watched_loss = losses.sum()
            return
        assert model is not None
        self._report = self._send(losses, self._total_norm(model), args, state)
        self.check()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._check_scale(state)
        own = own_optimizer(optimizer)
        if own is not None:
            report = self._send(torch.stack(self._losses).float(), own.grad_norm, args, state)
            self.check()
            self._report = report
            if report.arrived is None:
                self.check()

    def scaling(self) -> dict[str, float]:
        """For a log: the loss's scale and the number of steps left out; nothing where the loss is not scaled."""
        if self._scaler is None:
            return {}
        return {"loss_scale": self._scaler.get_scale(), "skipped_steps": self.skipped}

    def _check_scale(self, state: TrainerState) -> None:
        if self._scaler is None:
            return
        scale = self._scaler.get_scale()
        self.skipped += scale < self._scale
        if scale < SMALLEST_SCALE:
            raise TrainingError(
                f"Gradients overflow fp16 at step {state.global_step + 1}, however little the loss is scaled",
                found=f"scale {scale:g}, {self.skipped} steps left out",
                hint="lower learning_rate, or train in bfloat16 or float32",
            )

    def _send(self, losses: Tensor, norm: Tensor, args: TrainingArguments, state: TrainerState) -> _Report:
        if self._scaler is not None:
            norm = torch.where(norm.isfinite(), norm, 0.0)
        values = torch.cat([losses, norm.to(losses).view(1)])
        arrived = None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Report(state.global_step + 1, Path(args.output_dir), values, arrived, self._rows)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Waiting here rather than in the log also makes `seconds` those of the device.
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check()
        self.seconds += time.perf_counter() - self._began

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.check()


def own_optimizer(optimizer: Any) -> OwnOptimizer | None:
    """Our optimizer, where one is what accelerate has wrapped; else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, OwnOptimizer) else None
