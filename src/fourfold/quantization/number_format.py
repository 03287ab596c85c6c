"""The contract of a number format: a codebook, and what may be done with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["NumberFormat"]


@dataclass(frozen=True)
class NumberFormat:
    """A format of 4 or 8 bits, given by the values its codes stand for.

    Args:
        name: Name in configuration and files.
        bits: 4 (two codes a byte, the even element in the high nibble) or 8.
        values: The 2**bits values in units of the block's scale; `values[code]` is what `code` means.
        is_integer: Whether the values are equally spaced, so that the scale may be calibrated to clip outliers.
        is_vectorwise: Whether a block is a row, and codes are int8 in the tensor's own shape: LLM.int8().
    """

    name: str
    bits: int
    values: tuple[float, ...]
    is_integer: bool = False
    is_vectorwise: bool = False

    def __post_init__(self) -> None:
        if len(self.values) != 2**self.bits:
            raise ValueError(f"{self.name}: {self.bits} bits need {2**self.bits} values, got {len(self.values)}")

    @property
    def is_sorted(self) -> bool:
        """Whether codes ascend with their values."""
        return all(low < high for low, high in pairwise(self.values))

    def codebook(self, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [2**bits], shared by all tensors of this format on `device`; not to be written to."""
        return _codebook(self, torch.device(device))

    def sorted_values(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The values in ascending order, fp32 [2**bits], and the code of each, uint8 [2**bits]."""
        return _sorted_values(self, torch.device(device))

    def thresholds(self, device: torch.device | str = "cpu") -> Tensor:
        """The middles between neighbouring values, in ascending order: fp32 [2**bits - 1]."""
        return _thresholds(self, torch.device(device))

    def num_code_bytes(self, num_elements: int) -> int:
        """Bytes that the codes of `num_elements` elements take."""
        return -(-num_elements * self.bits // 8)

    def empty_codes(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Room for the codes of a tensor of that shape: uint8 [num_code_bytes, 1], or int8 of that shape."""
        if self.is_vectorwise:
            return torch.empty(tuple(shape), dtype=torch.int8, device=device)
        return torch.empty((self.num_code_bytes(math.prod(shape)), 1), dtype=torch.uint8, device=device)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [n] codes as stored: uint8 [num_code_bytes(n), 1], bitsandbytes' shape."""
        if self.bits == 8:
            return codes.view(-1, 1)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return ((codes[0::2] << 4) | codes[1::2]).view(-1, 1)

    def unpack(self, packed: Tensor, num_elements: int) -> Tensor:
        """The inverse of `pack`: uint8 [num_elements]."""
        flat = packed.reshape(-1)
        if self.bits == 8:
            return flat[:num_elements]
        return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:num_elements]


@functools.cache
def _codebook(number_format: NumberFormat, device: torch.device) -> Tensor:
    return torch.tensor(number_format.values, dtype=torch.float32, device=device)


@functools.cache
def _sorted_values(number_format: NumberFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    values, codes = _codebook(number_format, device).sort(stable=True)
    return values, codes.to(torch.uint8)


@functools.cache
def _thresholds(number_format: NumberFormat, device: torch.device) -> Tensor:
    values, _ = _sorted_values(number_format, device)
    return (values[1:] + values[:-1]) / 2
