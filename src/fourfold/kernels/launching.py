"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Tile",
    "cdiv",
    "is_hopper",
    "launches_early",
    "next_power_of_2",
    "on_device",
    "rank_block",
]

_HERE: AbstractContextManager[None] = contextlib.nullcontext()


class Tile(NamedTuple):
    """Rows and columns of a program's tile, and its warps."""

    block_m: int
    block_k: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def rank_block(rank: int) -> int:
    """The columns of a tile for `rank`: a tile of the tensor cores is full."""
    return max(16, next_power_of_2(rank))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches; costs nothing where it is."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU with the tensor cores that Triton feeds from shared memory asynchronously."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it is ending (programmatic dependent launch, from 9.0 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
