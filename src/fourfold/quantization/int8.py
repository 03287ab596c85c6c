"""INT8: 256 equally spaced values, -128/127 to 1 in units of the block's scale. Code 0 is -128."""

from fourfold.quantization.number_format import NumberFormat

__all__ = ["INT8"]

INT8 = NumberFormat(name="int8", bits=8, values=tuple(i / 127 for i in range(-128, 128)), is_integer=True)
