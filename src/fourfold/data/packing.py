"""Several documents in one row, none of which sees another, and the collator for packed and unpacked rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import trl

from fourfold.data.templates import IGNORE_INDEX
from fourfold.errors import DataError

__all__ = ["Collator", "model_inputs", "numbers_of", "pack", "row_lengths", "supervised_positions"]

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


PACKED_AT_A_TIME = 10_000
"""Documents among which the fitting ones are sought."""


def pack(
    dataset: datasets.Dataset, max_length: int, num_proc: int | None = None, keep_in_memory: bool = False
) -> datasets.Dataset:
    """Join documents into rows of at most `max_length` tokens, best fit decreasing; no document is cut.

    Args:
        dataset: Rows with `input_ids` and `labels`; other columns are left behind.
        max_length: Tokens a packed row may hold.
        num_proc: Processes that do it; one, in this process, where None.
        keep_in_memory: Whether nothing is written to the cache.

    Returns:
        Rows with `input_ids`, `labels` and `seq_lengths`, the number of tokens of each document in the row.

    Raises:
        DataError: A document longer than `max_length`.
    """
    dataset = dataset.select_columns(["input_ids", "labels"])
    longest = int(row_lengths(dataset).max())
    if longest > max_length:
        raise DataError(
            "a document is longer than the row it shall be packed into",
            found=f"{longest} tokens",
            allowed=f"at most max_length = {max_length}",
        )
    # Of each batch the last row is filled in part only.
    workers = None if len(dataset) < PACKED_AT_A_TIME else num_proc
    map_kwargs = {"batch_size": PACKED_AT_A_TIME, "num_proc": workers, "keep_in_memory": keep_in_memory}
    return trl.pack_dataset(dataset, max_length, strategy="bfd", map_kwargs=map_kwargs)


def numbers_of(dataset: datasets.Dataset, column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A column of whole numbers, int64 [rows], without a Python object for each."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return np.asarray(table[column].to_numpy(), np.int64)


def row_lengths(dataset: datasets.Dataset, column: str = "input_ids") -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each row, int64 [rows], without reading the tokens."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(PACKED_AT_A_TIME)
    return np.concatenate([pc.list_value_length(table[column]).to_numpy() for table in tables]).astype(np.int64)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Flat indices, int64 [tokens], of the positions of [batch, seq] whose next token has a label.

    On a GPU the host waits for their number; the collator therefore finds them before a batch goes there.

    Args:
        labels: [batch, seq], int64, -100 where there is none.
    """
    has_label = labels != IGNORE_INDEX
    predicts = torch.nn.functional.pad(has_label[:, 1:], (0, 1))
    return predicts.flatten().nonzero().squeeze(1)


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch of `Collator` goes into the model's forward: not the labels, nor what it has no name for.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one.
        batch: As the collator made it, or with its tensors moved to a device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dropped = ("labels", "supervised_positions", *(() if _takes_boundaries(base.__class__.forward) else _BOUNDARIES))
    return {name: value for name, value in batch.items() if name not in dropped}


@functools.cache
def _takes_boundaries(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@dataclass(frozen=True)
class Collator:
    """Rows to one padded batch on the right; tensors are int64, [batch, width], unless said otherwise.

    Unpacked rows give `input_ids`, `labels`, `attention_mask` and `supervised_positions` [tokens], which is
    `supervised_positions(labels)`.

    Packed rows (those with `seq_lengths`) give `input_ids`, `labels`, `supervised_positions` and `position_ids`,
    which start again at 0 with each document and with the padding, and no `attention_mask`: from exactly that,
    Transformers builds the block-diagonal causal mask (`masking_utils.find_packed_sequence_indices`) for sdpa, eager
    and flex attention. For attention of variable length they give its `FlashAttentionKwargs`: `cu_seq_lens_q` and
    `cu_seq_lens_k`, int32 [documents + 1], where documents start in the batch's tokens laid end to end and how
    many tokens there are, the padding of a row counting as a document; and `max_length_q` and `max_length_k`, the
    longest document, numbers of Python. The model must be called with `use_cache=False`, since with a cache
    Transformers takes the row for one document. Each document's first label is -100, for no token of its own
    stands before it.

    Attributes:
        pad_token_id: Written into the padding's `input_ids`; its labels are -100 whatever this id is.
        width: Tokens of every row; by default, as many as the longest row of the batch has.
        multiple_of: To which that is rounded up: the fastest attention kernels of a GPU want 64.
    """

    pad_token_id: int
    width: int | None = None
    multiple_of: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = self.width or -(-longest // self.multiple_of) * self.multiple_of
        batch: dict[str, Any] = {
            "input_ids": self._padded(rows, "input_ids", width, self.pad_token_id),
            "labels": self._padded(rows, "labels", width, IGNORE_INDEX),
        }
        if "seq_lengths" in rows[0]:
            documents = [_document_lengths(row["seq_lengths"], width) for row in rows]
            batch["position_ids"] = torch.stack([torch.cat(list(map(torch.arange, row))) for row in documents])
            batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORE_INDEX)
            lengths = [length for row in documents for length in row]
            starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
            batch |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        else:
            lengths = [len(row["input_ids"]) for row in rows]
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        batch["supervised_positions"] = supervised_positions(batch["labels"])
        return batch

    @staticmethod
    def _padded(rows: list[dict[str, Any]], key: str, width: int, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])


def _document_lengths(seq_lengths: list[int], width: int) -> list[int]:
    """With the row's padding as a document of its own; documents without a token have no place in attention."""
    lengths = [length for length in seq_lengths if length]
    padding = width - sum(lengths)
    return [*lengths, padding] if padding else lengths
