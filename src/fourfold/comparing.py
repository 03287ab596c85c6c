"""The trainer of a run, by its method; and what methods that compare answers are measured by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.data import Collator, PreparedData
from fourfold.data.streamed import StreamedData
from fourfold.training.options import TrainingOptions
from fourfold.training.preference import DPOTrainer, PreferenceTrainer, build_preference_trainer
from fourfold.training.reference import read_reference
from fourfold.training.streamed import build_streamed_trainer
from fourfold.training.trainer import FourfoldTrainer, build_trainer

__all__ = ["compare_answers", "preferences_of", "trainer_for"]


def trainer_for(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: PreparedData | StreamedData,
    eval_data: PreparedData | None,
    options: TrainingOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> FourfoldTrainer:
    """The trainer of the run's method. Raises as `build_trainer` and `build_preference_trainer`."""
    collator = Collator(
        tokenizer.pad_token_id,
        width=config.max_length if config.packing else None,
        multiple_of=64 if model.device.type == "cuda" else 1,
    )
    held_out = eval_data.dataset if eval_data else None
    if isinstance(train_data, StreamedData):
        rows = (train_data.stream, train_data.first_rows)
        return build_streamed_trainer(model, tokenizer, *rows, held_out, collator, options, callbacks)
    if config.method not in PREFERENCE_METHODS:
        return build_trainer(model, tokenizer, train_data.dataset, held_out, collator, options, callbacks)
    method = choices.method_options(config)
    return build_preference_trainer(
        model,
        tokenizer,
        train_data.dataset,
        held_out,
        collator,
        options,
        method,
        callbacks,
        max_length=config.max_length,
    )


def preferences_of(trainer: FourfoldTrainer) -> dict[str, Any]:
    """Loss and rewards of the held-out rows, under the names of the log; nothing where the method compares nothing."""
    if not isinstance(trainer, PreferenceTrainer):
        return {}
    measured = trainer.evaluate()
    figures = ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward")
    return {name: value for name, value in measured.items() if name in figures or name.startswith("eval_rewards/")}


def compare_answers(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: PreparedData | None,
) -> dict[str, Any]:
    """`preferences_of` a run that ended; nothing where its method compares nothing, or there are no rows.

    Raises:
        CheckpointError: What the reference gave the rows was computed before training, and is gone.
    """
    if config.method not in PREFERENCE_METHODS or eval_data is None:
        return {}
    options = dataclasses.replace(choices.training_options(config), report_to=())
    trainer = trainer_for(config, model, tokenizer, eval_data, eval_data, options)
    if isinstance(trainer, DPOTrainer) and trainer.method.precompute_ref_log_probs:
        trainer.use_reference(read_reference(Path(config.output_dir), {"eval": len(eval_data.dataset)}))
    return preferences_of(trainer)
