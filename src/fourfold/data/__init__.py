"""Rows, chat templates, labels and packing: from files to the batches of a run."""

from __future__ import annotations

from fourfold.data.dataset import PreparedData, prepare
from fourfold.data.encoding import RecognisedRows, parse_rows, recognise
from fourfold.data.options import DataOptions
from fourfold.data.overlong import OVERLONG
from fourfold.data.packing import Collator, model_inputs, pack, supervised_positions
from fourfold.data.report import DataReport
from fourfold.data.row_formats import ROW_FORMATS, RowFormat, detect_row_format
from fourfold.data.sources import load_rows
from fourfold.data.templates import IGNORE_INDEX, Encoded, check_tokenizer, encode_conversation
from fourfold.data.turns import Message

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
    "RecognisedRows",
    "RowFormat",
    "check_tokenizer",
    "detect_row_format",
    "encode_conversation",
    "load_rows",
    "model_inputs",
    "pack",
    "parse_rows",
    "prepare",
    "recognise",
    "supervised_positions",
]
