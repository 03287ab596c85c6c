"""The trainer of a run, by its method; and what methods that compare answers are measured by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.data import Collator, PreparedData
from fourfold.data.streamed import StreamedData
from fourfold.training.building import build_trainer
from fourfold.training.evaluation_sets import as_the_trainer_takes_them, by_name, prefix_of
from fourfold.training.options import TrainingOptions
from fourfold.training.preference import DPOTrainer, PreferenceTrainer, build_preference_trainer
from fourfold.training.reference import read_reference
from fourfold.training.streamed import build_streamed_trainer
from fourfold.training.trackers import without_trackers
from fourfold.training.trainer import FourfoldTrainer

__all__ = ["compare_answers", "preferences_of", "trainer_for"]


def trainer_for(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: PreparedData | StreamedData,
    eval_data: Mapping[str, PreparedData],
    options: TrainingOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> FourfoldTrainer:
    """The trainer of the run's method; `eval_data`: sets of held-out rows by name, "" where one needs none.

    Raises as `build_trainer` and `build_preference_trainer`.
    """
    collator = Collator(
        tokenizer.pad_token_id,
        width=config.max_length if config.packing else None,
        multiple_of=64 if model.device.type == "cuda" else 1,
    )
    held_out = as_the_trainer_takes_them({name: data.dataset for name, data in eval_data.items()})
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
    with without_trackers(trainer):
        measured = trainer.evaluate()
    prefixes = [prefix_of(name) for name in by_name(trainer.eval_dataset)]
    figures = {f"{prefix}_{figure}" for prefix in prefixes for figure in ("loss", "accuracy", "margin", "mean_reward")}
    rewards = tuple(f"{prefix}_rewards/" for prefix in prefixes)
    return {name: value for name, value in measured.items() if name in figures or name.startswith(rewards)}


def compare_answers(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Mapping[str, PreparedData],
) -> dict[str, Any]:
    """`preferences_of` a run that ended; nothing where its method compares nothing, or there are no rows.

    Raises:
        CheckpointError: What the reference gave the rows was computed before training, and is gone.
    """
    if config.method not in PREFERENCE_METHODS or not eval_data:
        return {}
    options = dataclasses.replace(choices.training_options(config), report_to=())
    trainer = trainer_for(config, model, tokenizer, next(iter(eval_data.values())), eval_data, options)
    if isinstance(trainer, DPOTrainer) and trainer.method.precompute_ref_log_probs:
        rows = {prefix_of(name): len(data.dataset) for name, data in eval_data.items()}
        trainer.use_reference(read_reference(Path(config.output_dir), rows))
    return preferences_of(trainer)
