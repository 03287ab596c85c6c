"""Several documents in one row, none of which sees another, and the collator for packed and unpacked rows."""

from __future__ import annotations

import bisect
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fourfold.data.templates import IGNORE_INDEX
from fourfold.errors import DataError

__all__ = ["Collator", "best_fit", "model_inputs", "numbers_of", "pack", "row_lengths", "supervised_positions"]

Indices = np.ndarray[Any, np.dtype[np.int64]]

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


WINDOW_TOKENS = 2**22
"""About as many tokens are in memory, and documents that fit are sought among, at a time; but of each window the last
row is filled in part only, so there are at least `WINDOW_ROWS` of them."""

WINDOW_ROWS = 256

_ROWS_AT_A_TIME = 10_000


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
    lengths = row_lengths(dataset)
    if lengths.max() > max_length:
        raise DataError(
            "a document is longer than the row it shall be packed into",
            found=f"{lengths.max()} tokens",
            allowed=f"at most max_length = {max_length}",
        )
    window = max(WINDOW_TOKENS, WINDOW_ROWS * max_length) / max(1, lengths.mean())
    packed: datasets.Dataset = dataset.with_format("arrow").map(
        _pack_table, batched=True, batch_size=int(window) + 1, fn_kwargs={"max_length": max_length}, desc="packing"
    )
    return packed.with_format(None)


def _pack_table(table: pa.Table, max_length: int) -> pa.Table:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    lengths = pc.list_value_length(columns["input_ids"]).to_numpy(zero_copy_only=False)
    documents, num_documents = best_fit(lengths, max_length)
    ends = np.cumsum(num_documents)
    lengths = lengths[documents]
    # The tokens of row r are those before `borders[r + 1]`, of the documents in their new order.
    borders = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], ends])]
    packed = {name: _joined(column.take(pa.array(documents)), borders) for name, column in columns.items()}
    packed["seq_lengths"] = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], ends]), pa.int32()), pa.array(lengths, pa.int32())
    )
    return pa.table(packed)


def _joined(column: pa.ListArray, borders: Indices) -> pa.ListArray:
    return type(column).from_arrays(pa.array(borders, column.offsets.type), column.flatten())


def best_fit(lengths: Indices, capacity: int) -> tuple[Indices, Indices]:
    """Put documents into rows: the longest first, each where the least space is left over.

    Documents of one length are placed together: the fullest row that has space for one gets as many as it has space
    for, then the next; so this takes as many steps as there are lengths and spaces, not documents.

    Args:
        lengths: Tokens of each document, at most `capacity`; those without any are left out. int [documents].
        capacity: Tokens a row may hold.

    Returns:
        The documents' indices, row by row, and the number of documents in each row; int64.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    row_of = np.empty(len(order), np.int64)
    # Space that is left to the rows that have it.
    spaces: list[int] = []
    rows_with: dict[int, Indices] = {}
    num_rows = 0
    changes = np.flatnonzero(np.diff(lengths[order])) + 1
    for first, end in itertools.pairwise([0, *changes.tolist(), len(order)]):
        length = int(lengths[order[first]]) if len(order) else 0
        while first < end:
            place = bisect.bisect_left(spaces, length)
            if place < len(spaces):
                space = spaces.pop(place)
                rows = rows_with.pop(space)
            else:
                space = capacity
                rows = np.arange(num_rows, num_rows + -(-(end - first) // (capacity // length)))
                num_rows += len(rows)
            each = space // length
            number = min(end - first, each * len(rows))
            row_of[first : first + number] = rows.repeat(each)[:number]
            first += number
            full, over = divmod(number, each)
            for some, taken in ((rows[:full], each), (rows[full : full + 1], over), (rows[full + 1 :], 0)):
                left = space - taken * length
                if len(some) and left:
                    if left in rows_with:
                        rows_with[left] = np.concatenate([rows_with[left], some])
                    else:
                        bisect.insort(spaces, left)
                        rows_with[left] = some
    return order[np.argsort(row_of, kind="stable")], np.bincount(row_of, minlength=num_rows)


def numbers_of(dataset: datasets.Dataset, column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A column of whole numbers, int64 [rows], without a Python object for each."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return np.asarray(table[column].to_numpy(), np.int64)


def row_lengths(dataset: datasets.Dataset, column: str = "input_ids") -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each row, int64 [rows], without reading the tokens."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(_ROWS_AT_A_TIME)
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
