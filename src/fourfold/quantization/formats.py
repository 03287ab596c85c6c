"""The tables of number formats. A new one is a file with its `NumberFormat`, and a row here."""

from __future__ import annotations

from fourfold.errors import QuantizationError
from fourfold.quantization.fp4 import FP4
from fourfold.quantization.int4 import INT4
from fourfold.quantization.int8 import INT8
from fourfold.quantization.llm_int8 import LLM_INT8
from fourfold.quantization.nf4 import NF4
from fourfold.quantization.number_format import NumberFormat

__all__ = ["BLOCK_SIZES", "FORMATS", "VECTORWISE_FORMATS", "get_format"]

FORMATS: dict[str, NumberFormat] = {"nf4": NF4, "fp4": FP4, "int4": INT4, "int8": INT8}

# Those whose blocks are rows, and whose layers round their input too.
VECTORWISE_FORMATS: dict[str, NumberFormat] = {"llm_int8": LLM_INT8}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def get_format(name: str) -> NumberFormat:
    """The format called `name`; raises QuantizationError naming those there are."""
    known = FORMATS | VECTORWISE_FORMATS
    try:
        return known[name]
    except KeyError:
        raise QuantizationError("unknown number format", found=name, allowed=known) from None
