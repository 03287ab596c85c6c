"""What stands in a batch beside the tokens: the numbers of its rows, and who may see whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from fourfold.errors import DataError
from fourfold.models.attention import Documents
from fourfold.models.attention_interface import ATTENTION_NAME, document_mask
from fourfold.models.families import FAMILIES
from fourfold.training.loss import IGNORE_INDEX

__all__ = [
    "ROW_NUMBERS",
    "Collator",
    "LengthGrouped",
    "NumberedCollator",
    "boundary_mask",
    "looks_back_only",
    "require_labels",
    "without_repeated",
]

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]

ROW_NUMBERS = "row_numbers"
"""Column of the training data set and key of a batch: positions of its rows, so that a bad step can name them."""


@dataclass(frozen=True)
class NumberedCollator:
    """A collator that keeps the rows' numbers beside the tensors, as a list: no tensor, so no copy to the device."""

    collate: Collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [row[ROW_NUMBERS] for row in rows if ROW_NUMBERS in row]
        batch: dict[str, Any] = self.collate([{k: v for k, v in row.items() if k != ROW_NUMBERS} for row in rows])
        return batch | {ROW_NUMBERS: numbers} if numbers else batch


class LengthGrouped(LengthGroupedSampler):
    """Transformers' sampler of rows of like length, whose order follows from seed and epoch.

    Its own draws from the generator that dropout draws from, so that a run which goes on would see other rows.

    Args:
        rows: Of `input_ids`, or of several columns of that ending, whose tokens count together.
        step_rows: Rows of one process's optimizer step.
        seed: Of the order.
    """

    def __init__(self, rows: Dataset, step_rows: int, seed: int) -> None:
        columns = [column for column in rows.column_names if column.endswith("input_ids")]
        lengths = [sum(map(len, ids)) for ids in zip(*(rows[column] for column in columns), strict=True)]
        super().__init__(step_rows, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        order: Iterator[int] = super().__iter__()
        return order


def looks_back_only(config: Any) -> bool:
    """Whether no layer lets a token depend on later ones, masked or not: all have plain causal attention."""
    config = config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None):
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return config.model_type in FAMILIES
    return set(layer_types) <= {"full_attention", "sliding_attention"}


def boundary_mask(batch: Mapping[str, Any], config: Any) -> Tensor | None:
    """The attention mask of a batch of `fourfold.data.Collator` for a model that looks back only, in training.

    A model that attends by "fourfold" is told the documents, of packed rows their own and of others a row each, padding
    included: so it neither builds a mask of [batch, 1, seq, seq] nor asks the device whether rows are packed. Any other
    takes packed rows by their position_ids, and needs no mask for others.

    Args:
        batch: On the device of the model.
        config: The model's.
    """
    config = config.get_text_config()
    # A window must be named by the layer itself, where a mask names the documents; the families' layers do.
    windowed = getattr(config, "sliding_window", None) is not None and config.model_type not in FAMILIES
    if config._attn_implementation != ATTENTION_NAME or windowed:
        return None
    if "cu_seq_lens_q" in batch:
        return document_mask(Documents(batch["cu_seq_lens_q"], int(batch["max_length_q"])))
    if "position_ids" in batch:
        return None
    rows, width = batch["input_ids"].shape
    ends = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=batch["input_ids"].device)
    return document_mask(Documents(ends, width))


def without_repeated(batch: dict[str, Any], accelerator: Any, batch_size: int) -> dict[str, Any]:
    """A batch of an evaluation without the labels of rows that accelerate repeats, so that all processes have as many
    batches: each row is counted once.

    Args:
        batch_size: Rows of a process's batch.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    kept = max(0, state.remainder - accelerator.process_index * batch_size)
    labels = batch["labels"].clone()
    labels[kept:] = IGNORE_INDEX
    return {name: value for name, value in batch.items() if name != "supervised_positions"} | {"labels": labels}


def require_labels(name: str, dataset: Dataset) -> None:
    """Raises DataError for rows, told as `name`, that there are none of, or with nothing to learn from."""
    if len(dataset) == 0:
        raise DataError(f"The {name} data set has no rows")
    missing = {"input_ids", "labels"} - set(dataset.column_names)
    if missing:
        raise DataError(f"The {name} data set lacks columns", found=dataset.column_names, allowed=sorted(missing))
    if all(label == IGNORE_INDEX for labels in dataset["labels"] for label in labels):
        raise DataError(
            f"All labels of the {name} data set are masked, so there is nothing to learn from",
            hint="check that the template marks the answers",
        )
