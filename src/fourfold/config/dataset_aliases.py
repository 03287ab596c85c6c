"""Data sets as Axolotl and LLaMA-Factory list them, in our keys.

Sources: axolotl `src/axolotl/utils/schemas/datasets.py`, LLaMA-Factory `src/llamafactory/hparams/data_args.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["axolotl_datasets", "dataset_names", "pretraining_dataset"]

_ROW_FORMATS = {
    "chat_template": "messages",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "chat_template.default": "preference",
}
# The key of the row format that a column of theirs holds.
_FIELDS = {
    "field_messages": {"chat_template": "messages", "sharegpt": "conversations"},
    "field": {"completion": "text"},
    "field_chosen": {"chat_template.default": "chosen"},
    "field_rejected": {"chat_template.default": "rejected"},
}
_SAME = ("path", "name", "split", "revision", "weight", "columns", "sample_by", "row_format")
# Told by the file, or what happens anyway.
_IGNORED = ("ds_type", "chat_template", "message_property_mappings", "roles_to_train", "train_on_eos")
_SHAREGPT = {"role": "from", "content": "value"}
_ANSWERS_ONLY = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "chat_template": "tokenizer_default"}


def axolotl_datasets(key: str) -> Callable[[Any], dict[str, Any]]:
    """Axolotl's list of `{path, type, split, ...}`; type chat_template is our row format messages.

    One data set that needs no list is given by the keys of the run. Ours are accepted inside, too.
    """

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            raise ValueError("give a list of mappings with path, or train_dataset: FILE")
        entries = [_entry(one, key) for one in value]
        if len(entries) == 1 and entries[0].keys() <= {"path", "row_format", "columns"}:
            return {key if name == "path" else name: given for name, given in entries[0].items()}
        if key != "train_dataset":
            raise ValueError("a set of held-out rows is read by its path: give eval_dataset: FILE, or {NAME: FILE}")
        return {key: entries}

    return convert


def _entry(dataset: dict[str, Any], key: str) -> dict[str, Any]:
    if "path" not in dataset:
        raise ValueError("the data set has no path")
    if unknown := sorted(map(str, dataset.keys() - {"type", *_SAME, *_IGNORED, *_FIELDS})):
        raise ValueError(f"not supported inside {key}: {', '.join(unknown)}; see row_format and columns")
    entry = {name: dataset[name] for name in _SAME if dataset.get(name) is not None}
    for name, done in _ANSWERS_ONLY.items():
        if dataset.get(name) not in (None, done):
            raise ValueError(f"{name} inside {key} is {done} here, for the run as a whole: leave it out")
    kind = dataset.get("type")
    mapped = dataset.get("message_property_mappings")
    if kind == "chat_template" and mapped == _SHAREGPT:
        kind = "sharegpt"
    elif mapped not in (None, _SHAREGPT, {"role": "role", "content": "content"}):
        raise ValueError("turns are read with role and content, or with from and value")
    if kind is not None:
        if kind not in _ROW_FORMATS:
            raise ValueError(f"row types read: {', '.join(_ROW_FORMATS)}; see row_format and columns")
        entry["row_format"] = _ROW_FORMATS[kind]
    for field, columns in _FIELDS.items():
        if dataset.get(field) is not None:
            ours = columns.get(kind or next(iter(columns)))
            if ours is None:
                raise ValueError(f"{field} inside {key} has no meaning for type {kind}; see columns")
            entry["columns"] = {**entry.get("columns", {}), ours: dataset[field]}
    return entry


def pretraining_dataset(value: Any) -> dict[str, Any]:
    """Axolotl's raw text: a path, or a list of one `{path, name, split, text_column}`."""
    dataset = value[0] if isinstance(value, list) and len(value) == 1 else value
    dataset = {"path": dataset} if isinstance(dataset, str) else dataset
    if not isinstance(dataset, dict) or "path" not in dataset:
        raise ValueError("give a path, or a list of one mapping with path")
    known = {"path", "name", "split", "text_column", "type"}
    if unknown := sorted(map(str, dataset.keys() - known)):
        raise ValueError(f"not supported inside pretraining_dataset: {', '.join(unknown)}")
    entry = {name: dataset[name] for name in ("path", "name", "split") if dataset.get(name) is not None}
    entry["row_format"] = "text"
    if dataset.get("text_column") not in (None, "text"):
        entry["columns"] = {"text": dataset["text_column"]}
    return {"method": "pretrain", "train_dataset": [entry]}


def dataset_names(key: str) -> Callable[[Any], dict[str, Any]]:
    """LLaMA-Factory's `dataset`: names with commas between; here they are files, folders or names on the hub."""

    def convert(value: Any) -> dict[str, Any]:
        if isinstance(value, str) and "," in value:
            return {key: [{"path": name.strip()} for name in value.split(",")]}
        return {key: value}

    return convert
