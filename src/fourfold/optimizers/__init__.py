"""Optimizers.

adamw.py    AdamW: all parameters in one launch, 32-bit or 8-bit state, clipping inside, no wait for the device
maps.py     the code points of the 8-bit state
"""

from __future__ import annotations

from fourfold.optimizers.adamw import AdamW

__all__ = ["AdamW"]
