"""Several documents in one row, none of which sees another, and the collator for packed and unpacked rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import torch
import trl

from fourfold.data.templates import IGNORE_INDEX
from fourfold.errors import DataError

__all__ = ["Collator", "pack"]


def pack(dataset: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Join documents into rows of at most `max_length` tokens, best fit decreasing; no document is cut.

    Args:
        dataset: Rows with `input_ids` and `labels`; other columns are left behind.
        max_length: Tokens a packed row may hold.

    Returns:
        Rows with `input_ids`, `labels` and `seq_lengths`, the number of tokens of each document in the row.

    Raises:
        DataError: A document longer than `max_length`.
    """
    dataset = dataset.select_columns(["input_ids", "labels"])
    longest = max(len(input_ids) for input_ids in dataset["input_ids"])
    if longest > max_length:
        raise DataError(
            "a document is longer than the row it shall be packed into",
            found=f"{longest} tokens",
            allowed=f"at most max_length = {max_length}",
        )
    return trl.pack_dataset(dataset, max_length, strategy="bfd")


@dataclass(frozen=True)
class Collator:
    """Rows to one padded batch on the right; all tensors int64, [batch, width].

    Unpacked rows give `input_ids`, `labels` and `attention_mask`.

    Packed rows (those with `seq_lengths`) give `input_ids`, `labels` and `position_ids`, which start again at
    0 with each document and with the padding, and no `attention_mask`: from exactly that, Transformers builds
    the block-diagonal causal mask (`masking_utils.find_packed_sequence_indices`) for sdpa, eager and flex
    attention. The model must be called with `use_cache=False`, since with a cache Transformers takes the row
    for one document. Each document's first label is -100, for no token of its own stands before it.

    Attributes:
        pad_token_id: Written into the padding's `input_ids`; its labels are -100 whatever this id is.
        width: Tokens of every row; by default, as many as the longest row of the batch has.
    """

    pad_token_id: int
    width: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packed = "seq_lengths" in rows[0]
        width = self.width or max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": self._padded(rows, "input_ids", width, self.pad_token_id),
            "labels": self._padded(rows, "labels", width, IGNORE_INDEX),
        }
        if packed:
            batch["position_ids"] = torch.stack([_position_ids(row["seq_lengths"], width) for row in rows])
            batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORE_INDEX)
        else:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return batch

    @staticmethod
    def _padded(rows: list[dict[str, Any]], key: str, width: int, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])


def _position_ids(seq_lengths: list[int], width: int) -> torch.Tensor:
    padding = width - sum(seq_lengths)
    return torch.cat([torch.arange(length) for length in (*seq_lengths, padding)])
