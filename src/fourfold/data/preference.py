"""Rows of preferences: pairs of answers to one prompt, and answers marked good or bad; their tokens and batches.

Columns are TRL's: `prompt`, `chosen`, `rejected`, or `prompt`, `completion`, `label`; each text, or turns. A pair may
leave the prompt out where both answers are whole conversations, which then begin alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from fourfold.data.packing import supervised_positions
from fourfold.data.row_formats import ROLES, Message, Row
from fourfold.data.templates import IGNORE_INDEX, encode_conversation
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
        columns: Columns without which a row is of another kind.
        encode: Makes the columns of one row's tokens.
    """

    columns: tuple[str, ...]
    encode: Callable[[Row, Any], dict[str, Any]]


def encode_preferences(
    rows: datasets.Dataset, tokenizer: Any, method: str, name: str, num_proc: int | None = None
) -> datasets.Dataset:
    """Tokenize rows of preferences.

    Returns:
        Pairs as `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels`; marked answers as
        `input_ids`, `labels`, `label`; both with `num_tokens` (of the longer answer's row), `num_supervised_tokens` (of
        the answer that has fewer) and `row_number`. Only the answer after the prompt is labelled.

    Raises:
        DataError: Rows of another kind, or a bad row, named by its number.
    """
    kind = PREFERENCE_ROWS[method]
    missing = [column for column in kind.columns if column not in rows.column_names]
    if missing:
        fitting = [method for method, other in PREFERENCE_ROWS.items() if set(other.columns) <= set(rows.column_names)]
        raise DataError(
            f"data set {name}: method {method} needs column {', '.join(missing)}",
            found=", ".join(rows.column_names),
            allowed=" + ".join(kind.columns),
            hint=f"such rows are for method: {' or '.join(fitting)}"
            if fitting
            else "these rows are for method: sft, or map other names with columns",
        )
    return rows.map(
        _encode_row,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        fn_kwargs={"tokenizer": tokenizer, "method": method, "name": name},
        desc=f"tokenizing {name}",
    )


def _encode_row(row: Row, index: int, tokenizer: Any, method: str, name: str) -> dict[str, Any]:
    try:
        return {**PREFERENCE_ROWS[method].encode(row, tokenizer), "row_number": index + 1}
    except DataError as error:
        where = f"data set {name}, row {index + 1}: {error.what}"
        raise DataError(where, found=error.found, allowed=error.allowed, hint=error.hint) from error


def _encode_pair(row: Row, tokenizer: Any) -> dict[str, Any]:
    chosen, rejected = _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant")
    if row.get("prompt") is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise DataError("key 'prompt': there is none, and the answers do not begin alike", found=_brief(row))
    else:
        prompt = _turns(row, "prompt", "user")
    if chosen == rejected:
        raise DataError("keys 'chosen' and 'rejected' are the same", found=_brief(chosen), allowed="two answers")
    encoded: dict[str, Any] = {"num_tokens": 0, "num_supervised_tokens": 2**31}
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        ids, labels = _encode_answer(prompt, answer, key, tokenizer)
        encoded |= {f"{key}_input_ids": ids, f"{key}_labels": labels}
        encoded["num_tokens"] = max(encoded["num_tokens"], len(ids))
        encoded["num_supervised_tokens"] = min(encoded["num_supervised_tokens"], num_labels(labels))
    return encoded


def _encode_marked(row: Row, tokenizer: Any) -> dict[str, Any]:
    label = row.get("label")
    if not isinstance(label, bool):
        raise DataError("key 'label': not a truth value", found=_brief(label), allowed="true (good) or false (bad)")
    answer = _turns(row, "completion", "assistant")
    ids, labels = _encode_answer(_turns(row, "prompt", "user"), answer, "completion", tokenizer)
    return {
        "input_ids": ids,
        "labels": labels,
        "label": label,
        "num_tokens": len(ids),
        "num_supervised_tokens": num_labels(labels),
    }


_PAIRS = PreferenceRows(("chosen", "rejected"), _encode_pair)

# method -> its rows
PREFERENCE_ROWS: dict[str, PreferenceRows] = {
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "reward": _PAIRS,
    "kto": PreferenceRows(("prompt", "completion", "label"), _encode_marked),
}


def _encode_answer(
    prompt: list[Message], answer: list[Message], key: str, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and labels of what follows the prompt."""
    if not answer or answer[-1]["role"] != "assistant":
        roles = [message["role"] for message in answer]
        raise DataError(f"key {key!r}: the last turn is not the assistant's", found=roles, allowed="an answer")
    encoded = encode_conversation([*prompt, *answer], tokenizer)
    ids = list(encoded.input_ids)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    # As far as both agree: the rendering of a prompt may end otherwise once an answer follows.
    same = np.asarray(ids[: len(asked)]) == np.asarray(asked[: len(ids)])
    start = len(same) if same.all() else int(same.argmin())
    return ids, [IGNORE_INDEX] * start + list(encoded.labels[start:])


def num_labels(labels: list[int]) -> int:
    """Labels that the shifted loss sees."""
    return sum(label != IGNORE_INDEX for label in labels[1:])


def truncated(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Of a row from `encode_preferences`, its first `max_length` tokens."""
    cut = {key: value[:max_length] for key, value in row.items() if isinstance(value, list)}
    learned = [num_labels(value) for key, value in cut.items() if key.endswith("labels")]
    return row | cut | {"num_tokens": min(row["num_tokens"], max_length), "num_supervised_tokens": min(learned)}


def _turns(row: Row, key: str, role: str) -> list[Message]:
    value = row.get(key)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"key {key!r}: nothing there", found=_brief(value), allowed="text, or a list of turns")
    for number, turn in enumerate(value, start=1):
        where = f"key {key!r}, turn {number}"
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"{where}: no role that is known", found=_brief(turn), allowed=ROLES)
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            raise DataError(f"{where}, key 'content': no text", found=_brief(turn), allowed="text that is not empty")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _brief(value: object) -> str:
    return repr(value)[:120]


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
