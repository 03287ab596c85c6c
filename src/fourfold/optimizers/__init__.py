"""Optimizers: all parameters in one call, clipping inside, no wait for the device.

adamw.py        AdamW
lion.py         Lion
adafactor.py    Adafactor
moments.py      what the first two share: the bits of their moments, and where those live
base.py         what all share: parameters, steps, checkpoints
footprint.py    the bytes that their state takes
maps.py         the code points of 8-bit state
"""

from __future__ import annotations

from fourfold.optimizers.adafactor import Adafactor
from fourfold.optimizers.adamw import AdamW
from fourfold.optimizers.lion import Lion

__all__ = ["Adafactor", "AdamW", "Lion"]
