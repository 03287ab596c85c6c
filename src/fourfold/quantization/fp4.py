"""FP4: one sign bit, two exponent bits, one fraction bit, scaled so that the largest value is 1.

Source: bitsandbytes, whose files this agrees with. Codes 0 to 7 are 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 (in the order
of their bit patterns); codes 8 to 15 are the same with the sign set.
"""

import struct

from fourfold.quantization.number_format import NumberFormat

__all__ = ["FP4"]


def _as_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


_MAGNITUDES = tuple(_as_float32(twelfths / 12.0) for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

FP4 = NumberFormat(
    name="fp4",
    bits=4,
    # bitsandbytes' own table holds +0 for code 8, not -0: the sign of zero is part of bit equality.
    values=(*_MAGNITUDES, 0.0, *(-magnitude for magnitude in _MAGNITUDES[1:])),
)
