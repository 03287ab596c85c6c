"""Trainers for rows that are tokenized and masked, from a model, its data and narrow options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fourfold.errors import ConfigError
from fourfold.training.batches import ROW_NUMBERS, Collator, NumberedCollator, require_labels
from fourfold.training.early_stopping import early_stopping
from fourfold.training.evaluation_sets import EvalDataset, by_name
from fourfold.training.options import (
    COMPUTE_DTYPES,
    TrainingOptions,
    keep_in_fp32,
    optimizer_arguments,
    to_sft_config,
)
from fourfold.training.processes import follow_main
from fourfold.training.trainer import FourfoldTrainer

__all__ = ["build_trainer", "trainer_arguments"]


def build_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: EvalDataset,
    collator: Collator,
    options: TrainingOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> FourfoldTrainer:
    """A trainer for rows that are tokenized and masked.

    Args:
        model: Its adapters, or without any all of it, are trained as they are; their dtype is not changed.
        train_dataset, eval_dataset: Rows of `input_ids` and `labels`, -100 where there is no label; several held-out
            sets by name.
        collator: From rows to tensors: input_ids, labels, and attention_mask or (packed) position_ids;
            with what else `fourfold.data.Collator` gives, the host never waits for the device to count labels.

    Raises:
        ConfigError: Evaluation is asked for without rows for it, or nothing in the model can be trained.
        DataError: There are no rows, or no row has a label.
    """
    require_labels("training", train_dataset)
    for name, dataset in by_name(eval_dataset).items():
        require_labels(f"evaluation ({name})" if name else "evaluation", dataset)
    return FourfoldTrainer(
        **trainer_arguments(model, tokenizer, train_dataset, eval_dataset, collator, options, callbacks)
    )


def trainer_arguments(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: EvalDataset,
    collator: Collator,
    options: TrainingOptions,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """The arguments of `FourfoldTrainer` and of what is derived from it; see `build_trainer`."""
    if options.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError(
            "eval_strategy asks for evaluation, but there are no rows to evaluate on",
            found=options.eval_strategy,
            hint="give an evaluation data set, or set eval_strategy: no",
        )
    keep_in_fp32(model, COMPUTE_DTYPES[options.compute_dtype])
    arguments, row = to_sft_config(options), options.row
    if row.shard is not None:
        row.shard(model, arguments.device)
    else:
        # DDP brings parameters along, codes among them, but not their scales.
        follow_main(model, with_codes=False)
    return {
        "model": model,
        "args": arguments,
        "row": row,
        "data_collator": NumberedCollator(collator),
        "train_dataset": train_dataset.add_column(ROW_NUMBERS, list(range(len(train_dataset)))),
        "eval_dataset": eval_dataset,
        "processing_class": tokenizer,
        "callbacks": [*callbacks, *early_stopping(options.best)],
        "optimizer_cls_and_kwargs": optimizer_arguments(options, model, arguments),
    }
