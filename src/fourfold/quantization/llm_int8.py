"""LLM.int8(): int8 codes, one scale a row of the weight, and inputs that are rounded to int8 too, but for outliers.

A code is an int8 number of bitsandbytes' `CB`, so that its values stand in the order of their bits: 0 to 127, then -128
to -1, in units of the row's scale / 127. See `fourfold.kernels.vectorwise` for the products.
"""

from fourfold.quantization.number_format import NumberFormat

__all__ = ["DEFAULT_THRESHOLD", "LLM_INT8"]

# Magnitudes from which a column of the input is an outlier: https://arxiv.org/abs/2208.07339, section 3.
DEFAULT_THRESHOLD = 6.0

LLM_INT8 = NumberFormat(
    name="llm_int8",
    bits=8,
    values=tuple(i / 127 for i in (*range(128), *range(-128, 0))),
    is_integer=True,
    is_vectorwise=True,
)
