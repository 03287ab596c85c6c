"""Rows, chat templates, labels and packing: from a file to the batches of a run."""

from __future__ import annotations

from fourfold.data.dataset import OVERLONG, DataOptions, DataReport, PreparedData, prepare
from fourfold.data.packing import Collator, model_inputs, pack, supervised_positions
from fourfold.data.row_formats import ROW_FORMATS, Message, RowFormat, detect_row_format
from fourfold.data.sources import load_rows
from fourfold.data.templates import IGNORE_INDEX, Encoded, check_tokenizer, encode_conversation

__all__ = [
    "IGNORE_INDEX",
    "OVERLONG",
    "ROW_FORMATS",
    "Collator",
    "DataOptions",
    "DataReport",
    "Encoded",
    "Message",
    "PreparedData",
    "RowFormat",
    "check_tokenizer",
    "detect_row_format",
    "encode_conversation",
    "load_rows",
    "model_inputs",
    "pack",
    "prepare",
    "supervised_positions",
]
