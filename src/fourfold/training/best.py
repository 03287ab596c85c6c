"""The best checkpoint of a run: which it is, that it stays, and that its weights are the result.

The Trainer knows the best figure and its step (`TrainerState.best_metric`, `best_global_step`). What is added here: a
step that is the best so far is saved at once, whatever `save_steps` says, so that its weights are there in the end; an
evaluation that was due when a run ended is made up for when it goes on; and a run that has nothing left to do makes no
step more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from fourfold.errors import ConfigError, TrainingError
from fourfold.training.checkpoint import check_checkpoint, checkpoint_path, restore_weights
from fourfold.training.evaluation_sets import prefix_of
from fourfold.training.interrupt import InterruptCallback
from fourfold.training.running import RunsOn

__all__ = ["BestOptions", "KeepsBest", "best_of", "evaluation_is_due", "name_best"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BestOptions:
    """Which evaluation is the best, and what follows from it.

    Attributes:
        load_at_end: Whether the best checkpoint is kept, and its weights are left when training ends.
        metric: A figure of the evaluations, with or without eval_.
        greater_is_better: None: unless the figure's name ends with loss, as the Trainer has it.
        patience: Evaluations without a better figure after which training stops; None: it never does.
        threshold: By how much a figure must be better to count as better there.

    Raises:
        ConfigError: A patience below 1 or a threshold below 0.
    """

    load_at_end: bool = False
    metric: str = "eval_loss"
    greater_is_better: bool | None = None
    patience: int | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ConfigError("early_stopping_patience is out of range", found=self.patience, allowed="1 or more")
        if self.threshold < 0:
            raise ConfigError("early_stopping_threshold is out of range", found=self.threshold, allowed="0 or more")

    @property
    def is_asked_for(self) -> bool:
        """Whether anything depends on which evaluation is the best."""
        return self.load_at_end or self.patience is not None

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments; `load_best_model_at_end` is set after them, see `to_sft_config`."""
        if not self.is_asked_for:
            return {}
        greater = self.greater_is_better
        return {
            "metric_for_best_model": "eval_" + self.metric.removeprefix("eval_"),
            "greater_is_better": not self.metric.endswith("loss") if greater is None else greater,
        }


def evaluation_is_due(checkpoint: Path, args: TrainingArguments, sets: Iterable[str]) -> bool:
    """Whether a run that goes on from a checkpoint ended before the evaluation after that step, or within it.

    Args:
        checkpoint: Its folder.
        args: Those of now.
        sets: Names of the sets of held-out rows.

    Raises:
        ConfigError: The checkpoint is past `max_steps`.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step = state["global_step"]
    if 0 < args.max_steps < step:
        raise ConfigError(
            f"{checkpoint} is past max_steps",
            found=f"step {step}, max_steps {args.max_steps}",
            hint="raise max_steps, or resume from an earlier checkpoint",
        )
    logged = {key for entry in state["log_history"] if entry["step"] == step for key in entry}
    if args.eval_strategy == "no" or all(f"{prefix_of(name)}_loss" in logged for name in sets):
        return False
    return step % args.eval_steps == 0 if args.eval_strategy == "steps" else float(state["epoch"]).is_integer()


def name_best(state: TrainerState, output_dir: Path, saving: Path | None = None) -> None:
    """Note the folder of the best step, if there is one; `saving`: that of a checkpoint about to be there."""
    if state.best_global_step:
        folder = checkpoint_path(output_dir, state.best_global_step)
        if folder == saving or folder.is_dir():
            state.best_model_checkpoint = str(folder)


class KeepsBest(RunsOn):
    """What `FourfoldTrainer` does about the best checkpoint.

    Attributes:
        loaded_best: The step whose weights the model was given when training ended; None: it has the last ones.
    """

    loaded_best: int | None = None

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model a checkpoint's adapter, or where there is none all its weights."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(str(checkpoint), self.model)
        else:
            restore_weights(self.model, checkpoint)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler:
            # One that is made up for before the first step: the Trainer looks only at those after a step.
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        metric = self.args.metric_for_best_model
        if metric is not None and metric not in metrics:
            found = sorted(name for name in metrics if name.startswith("eval_"))
            raise TrainingError("metric_for_best_model is no figure of the evaluation", found=metric, allowed=found)
        is_better: bool = super()._determine_best_metric(metrics, trial)
        if is_better and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_better

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        # Before the first step: a run that goes on from its end, or from where it was stopped early.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.loaded_best = None
        name_best(self.state, Path(self.args.output_dir))
        best = self.state.best_global_step
        if self.args.load_best_model_at_end and best and self.state.best_model_checkpoint is None:
            logger.warning("The checkpoint of the best step, %d, is gone: the last weights stay", best)
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        signals = [one.signal_number for one in self.callback_handler.callbacks if isinstance(one, InterruptCallback)]
        if any(signals) and self.state.global_step < self.state.max_steps:
            return  # it goes on another time
        best = Path(self.state.best_model_checkpoint)
        check_checkpoint(best)
        self.load_weights(best)
        self.loaded_best = self.state.best_global_step
        logger.info(
            "The best step was %d, %s %.6g: its weights are left",
            self.loaded_best,
            self.args.metric_for_best_model,
            self.state.best_metric,
        )


def best_of(trainer: KeepsBest) -> dict[str, Any]:
    """Step and figure of the best checkpoint, if its weights were left: best_step, best_metric."""
    if trainer.loaded_best is None:
        return {}
    return {"best_step": trainer.loaded_best, "best_metric": trainer.state.best_metric}
