"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["cdiv", "next_power_of_2", "on_device", "splits_for"]

_HERE: AbstractContextManager[None] = contextlib.nullcontext()

# Programs that keep a large GPU busy: four on each of 132 multiprocessors, rounded down to a power of two.
_WANTED_PROGRAMS = 512


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches; costs nothing where it is."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def splits_for(num_tiles: int, num_blocks: int, least_blocks: int = 4) -> tuple[int, int]:
    """How a reduction over `num_blocks` is split where `num_tiles` programs alone would leave a GPU idle.

    Returns:
        Number of splits, and blocks of each but the last, which may have fewer: at least `least_blocks`, and a power
        of two, since a kernel is compiled for each number.
    """
    wanted = max(1, _WANTED_PROGRAMS // max(num_tiles, 1))
    blocks = next_power_of_2(max(cdiv(num_blocks, wanted), least_blocks))
    return cdiv(num_blocks, blocks), blocks
