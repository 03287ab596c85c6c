"""INT4: sixteen equally spaced values, -8/7 to 1 in units of the block's scale.

A block scaled by its absmax uses -7 to 7; the sixteenth value, -8, serves blocks whose scale was calibrated below their
absmax. Code 0 is -8.
"""

from fourfold.quantization.number_format import NumberFormat

__all__ = ["INT4"]

INT4 = NumberFormat(name="int4", bits=4, values=tuple(i / 7 for i in range(-8, 8)), is_integer=True)
