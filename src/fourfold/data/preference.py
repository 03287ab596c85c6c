"""Rows of preferences: pairs of answers to one prompt, and answers marked good or bad; their tokens and batches.

Columns are TRL's: `prompt`, `chosen`, `rejected`, or `prompt`, `completion`, `label`, in turns, as
`fourfold.data.parse_rows` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from fourfold.data.cache import cache_file, content_key
from fourfold.data.packing import supervised_positions
from fourfold.data.report import at
from fourfold.data.row_formats import Kind
from fourfold.data.templates import IGNORE_INDEX, encode_conversation, num_supervised
from fourfold.data.turns import Message, Row
from fourfold.errors import DataError

__all__ = [
    "ALL_LABELS",
    "ALL_POSITIONS",
    "KL_PREFIX",
    "PREFERENCE_ROWS",
    "REFERENCE",
    "REFERENCE_COLUMNS",
    "AnswerCollator",
    "PairCollator",
    "encode_preferences",
]

REFERENCE = "reference_log_probs"
"""Key of a batch: the reference's log-probability of each row, fp32 [rows]."""
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's columns of the same."""
ALL_LABELS, ALL_POSITIONS = "all_labels", "all_positions"
"""Keys of a batch: labels with the prompts of the chosen rows, and the positions that predict them."""
KL_PREFIX = "KL_"
"""Before the names of the batch of prompts with the answers of other rows."""


@dataclass(frozen=True)
class PreferenceRows:
    """What a method's rows look like.

    Attributes:
        kind: Their kind, which has the columns `KINDS[kind]`.
        encode: Makes the columns of one row's tokens.
    """

    kind: Kind
    encode: Callable[[Row, Any], dict[str, Any]]


def encode_preferences(
    rows: datasets.Dataset, tokenizer: Any, method: str, name: str, num_proc: int | None = None
) -> datasets.Dataset:
    """Tokenize rows of preferences as `fourfold.data.parse_rows` gives them, cached by content.

    Returns:
        Pairs as `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels`; marked answers as
        `input_ids`, `labels`, `label`; both with `num_tokens` (of the longer answer's row), `num_supervised_tokens` (of
        the answer that has fewer) and `row_number`. Only the answer after the prompt is labelled.

    Raises:
        DataError: A row that the chat template does not take, named by its number.
    """
    kind = PREFERENCE_ROWS[method].kind
    key = content_key(rows, tokenizer, {"kind": kind, "encoded": True})
    return rows.map(
        _encode_row,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        fn_kwargs={"tokenizer": tokenizer, "method": method, "name": name},
        new_fingerprint=key,
        cache_file_name=cache_file(key),
        desc=f"tokenizing {name}",
    )


def _encode_row(row: Row, index: int, tokenizer: Any, method: str, name: str) -> dict[str, Any]:
    try:
        return {**PREFERENCE_ROWS[method].encode(row, tokenizer), "row_number": index + 1}
    except DataError as error:
        raise at(f"data set {name}, row {index + 1}", error) from error


def _encode_pair(row: Row, tokenizer: Any) -> dict[str, Any]:
    encoded: dict[str, Any] = {"num_tokens": 0, "num_supervised_tokens": 2**31}
    for key in ("chosen", "rejected"):
        ids, labels = _encode_answer(row["prompt"], row[key], tokenizer)
        encoded |= {f"{key}_input_ids": ids, f"{key}_labels": labels}
        encoded["num_tokens"] = max(encoded["num_tokens"], len(ids))
        encoded["num_supervised_tokens"] = min(encoded["num_supervised_tokens"], num_supervised(labels))
    return encoded


def _encode_marked(row: Row, tokenizer: Any) -> dict[str, Any]:
    ids, labels = _encode_answer(row["prompt"], row["completion"], tokenizer)
    return {
        "input_ids": ids,
        "labels": labels,
        "label": row["label"],
        "num_tokens": len(ids),
        "num_supervised_tokens": num_supervised(labels),
    }


_PAIRS = PreferenceRows("preference", _encode_pair)

# method -> its rows
PREFERENCE_ROWS: dict[str, PreferenceRows] = {
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "reward": _PAIRS,
    "kto": PreferenceRows("judged", _encode_marked),
}


def _encode_answer(prompt: list[Message], answer: list[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and labels of what follows the prompt."""
    encoded = encode_conversation([*prompt, *answer], tokenizer)
    ids = list(encoded.input_ids)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    # As far as both agree: the rendering of a prompt may end otherwise once an answer follows.
    same = np.asarray(ids[: len(asked)]) == np.asarray(asked[: len(ids)])
    start = len(same) if same.all() else int(same.argmin())
    return ids, [IGNORE_INDEX] * start + list(encoded.labels[start:])


def truncated(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Of a row from `encode_preferences`, its first `max_length` tokens."""
    cut = {key: value[:max_length] for key, value in row.items() if isinstance(value, list)}
    learned = [num_supervised(value) for key, value in cut.items() if key.endswith("labels")]
    return row | cut | {"num_tokens": min(row["num_tokens"], max_length), "num_supervised_tokens": min(learned)}


Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class PairCollator:
    """Pairs to the batch of `collate` over all chosen rows and then all rejected ones, [2 * pairs, width].

    Rows with `REFERENCE_COLUMNS` give `REFERENCE`.

    Attributes:
        collate: From rows to tensors.
        with_prompts: Whether to add `ALL_LABELS` and `ALL_POSITIONS`.
    """

    collate: Collate
    with_prompts: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        parts = [
            {"input_ids": row[f"{side}_input_ids"], "labels": row[f"{side}_labels"]}
            for side in ("chosen", "rejected")
            for row in rows
        ]
        batch = self.collate(parts)
        if self.with_prompts:
            of_chosen = torch.arange(len(parts))[:, None] < len(rows)
            is_learned = of_chosen & (batch["attention_mask"] == 1)
            batch[ALL_LABELS] = torch.where(is_learned, batch["input_ids"], batch["labels"])
            batch[ALL_POSITIONS] = supervised_positions(batch[ALL_LABELS])
        if REFERENCE_COLUMNS[0] in rows[0]:
            batch[REFERENCE] = torch.tensor([row[column] for column in REFERENCE_COLUMNS for row in rows])
        return batch


@dataclass(frozen=True)
class AnswerCollator:
    """Marked answers to the batch of `collate` with `label`, bool [rows], and another of mismatched rows.

    The latter, its names after `KL_PREFIX`, has each prompt with the answer of the row before it, the first with that
    of the last: https://arxiv.org/abs/2402.01306, section 4.1.

    Attributes:
        collate: From rows to tensors.
        max_length: Tokens to which mismatched rows are cut.
        with_kl: Whether the mismatched rows are wanted.
    """

    collate: Collate
    max_length: int
    with_kl: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        batch["label"] = torch.tensor([row["label"] for row in rows])
        if self.with_kl:
            mismatched = self.collate([self._mismatched(row, rows[number - 1]) for number, row in enumerate(rows)])
            batch |= {f"{KL_PREFIX}{name}": value for name, value in mismatched.items()}
        return batch

    def _mismatched(self, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = _prompt_tokens(row), _prompt_tokens(other)
        ids = row["input_ids"][:prompt] + other["input_ids"][answer:]
        labels = [IGNORE_INDEX] * prompt + other["labels"][answer:]
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}


def _prompt_tokens(row: dict[str, Any]) -> int:
    return next(position for position, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
