"""Quantizing the base anew every so many steps, and a run whose base goes along with its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.adapters.recalibration import requantize
from fourfold.models.block import drop_graphs
from fourfold.training.processes import follow_main

__all__ = ["RequantizeCallback", "save_changed_base"]

logger = logging.getLogger(__name__)


class RequantizeCallback(TrainerCallback):
    """Merges the adapter into its quantized base after every `every` optimizer steps but the last; see `requantize`.

    The optimizer starts anew then: its moments, and its count of steps, belong to the former A and B. The learning
    rate's course goes on.

    Args:
        every: Optimizer steps.
        calibration: As for `quantize`.
        save_base: Writes the base, as it is now, into a folder. Every checkpoint holds one, since its adapter belongs
            to that base alone.
        keeps_rest: As for `requantize`.
    """

    def __init__(
        self, every: int, calibration: str, save_base: Callable[[Path], None], keeps_rest: bool = True
    ) -> None:
        self.every = every
        self.calibration = calibration
        self.save_base = save_base
        self.keeps_rest = keeps_rest

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        assert model is not None
        peft_model = getattr(model, "module", model)
        options: dict[str, Any] = {"calibration": self.calibration, "keeps_rest": self.keeps_rest}
        kept = requantize(peft_model, seed=args.seed + state.global_step, **options)
        follow_main(peft_model)
        drop_graphs(peft_model)
        # No entry for a parameter: it has never been updated.
        optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
        logger.info("Step %d: the base is quantized anew; %.1f%% of the adapter is kept", state.global_step, 100 * kept)


def save_changed_base(callbacks: Iterable[TrainerCallback], checkpoint: Path) -> None:
    """Put the base as it is now into `checkpoint`, if one of a trainer's callbacks changes it."""
    for callback in callbacks:
        if isinstance(callback, RequantizeCallback):
            callback.save_base(checkpoint / "base")
