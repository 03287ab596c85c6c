"""Watches each optimizer step: how long it takes, and whether its numbers are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.errors import TrainingError
from fourfold.optimizers.base import OwnOptimizer
from fourfold.training.checkpoint import list_checkpoints
from fourfold.training.processes import sides, summed

__all__ = ["StepGuard", "own_optimizer"]

NUM_NAMED_ROWS = 32
# Of the loss: what does not fit fp16 then is a fault of the numbers.
SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class _Report:
    """What a step came to, on its way from the device.

    Attributes:
        values: Each microbatch's share of the loss here, their sum over all, and the gradients' norm; fp32, on the
            CPU.
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
        *losses, total, norm = self.values.tolist()
        if all(map(math.isfinite, [total, norm])):
            return
        # All processes come here, and find the fault in some of them, or nowhere: then it may be in each.
        by_rank = sides([number for number, loss in enumerate(losses) if not math.isfinite(loss)])
        is_one, nowhere = len(by_rank) == 1, not any(by_rank)
        own = range(len(losses)) if nowhere else by_rank[0] if is_one else by_rank[distributed.get_rank()]
        named = sides(self._named(own))
        found = f"loss {total}, gradient norm {norm}; " + "; ".join(
            text if is_one else f"rank {rank}: {text}" for rank, text in enumerate(named) if nowhere or by_rank[rank]
        )
        checkpoints = list_checkpoints(self.output_dir)
        raise TrainingError(
            f"The loss or its gradient is not finite at step {self.step}",
            found=found,
            hint="lower learning_rate, or look for bad weights or rows; "
            + (f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved yet"),
        )

    def _named(self, microbatches: Sequence[int]) -> str:
        text = f"microbatch {', '.join(str(number + 1) for number in microbatches)}"
        rows = [row + 1 for number in microbatches if number < len(self.rows) for row in self.rows[number]]
        if not rows:
            return text
        named = ", ".join(map(str, rows[:NUM_NAMED_ROWS])) + (", ..." if len(rows) > NUM_NAMED_ROWS else "")
        return f"{text}, rows {named} of the prepared training data, counted from 1"


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
        self._total = torch.zeros(())

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
        self._total = summed(losses.sum())
        own = own_optimizer(optimizer)
        if own is not None:
            own.watched_loss = self._total.clone()
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
        values = torch.cat([losses, self._total.view(1), norm.to(losses).view(1)])
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
