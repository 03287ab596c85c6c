"""The scales of a quantized tensor's blocks: as they are, or quantized themselves (double quantization)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourfold.kernels.blockwise import dequantize_scales

__all__ = ["NESTED_BLOCK_SIZE", "NestedScales", "PlainScales", "Scales", "dynamic_map"]

NESTED_BLOCK_SIZE = 256


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """The signed dynamic map: fp32 [256], sorted, shared on `device`; not to be written to.

    A value has a sign, a decimal exponent of 0 to -6 that takes one bit a step, and a fraction in the bits left. For
    exponent -e there are 2**(6 - e) equally long intervals of [0.1, 1], whose middles, times 10**-e, are the values; 0
    and 1 are added. Source: Dettmers, "8-bit approximations for parallelism in deep learning"
    (https://arxiv.org/abs/1511.04561), as bitsandbytes computes it, in fp32.
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (6 - exponent) + 1, dtype=torch.float32, device="cpu")
        middles = (boundaries[:-1] + boundaries[1:]) / 2.0
        positive = (10 ** (-exponent) * middles).tolist()
        values += positive + [-value for value in positive]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _thresholds(device: torch.device) -> Tensor:
    """The middles between neighbouring values of the dynamic map: fp32 [255]."""
    code_map = dynamic_map(device)
    return (code_map[1:] + code_map[:-1]) / 2


@dataclass(frozen=True)
class PlainScales:
    """Scales in fp32.

    Args:
        absmax: fp32 [num_blocks].
    """

    absmax: Tensor

    def dequantize(self) -> Tensor:
        """The scales, fp32 [num_blocks]."""
        return self.absmax

    @property
    def num_bytes(self) -> int:
        """Bytes held for this tensor alone."""
        return self.absmax.nbytes

    def as_bytes(self) -> Tensor:
        """What there is of each block, as uint8 [bytes]; shares memory."""
        return self.absmax.view(torch.uint8)

    def with_bytes(self, held: Tensor) -> PlainScales:
        """The same kind of scales, with what `as_bytes` gave of others."""
        return replace(self, absmax=held.view(torch.float32))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> PlainScales:
        """The same scales with `function` applied to each tensor."""
        return replace(self, absmax=function(self.absmax))


@dataclass(frozen=True)
class NestedScales:
    """Scales in 8 bits.

    Args:
        codes: uint8 [num_blocks].
        nested_absmax: fp32 [ceil(num_blocks / nested_block_size)].
        offset: fp32 scalar tensor, the mean of the scales.
        code_map: fp32 [256].
        nested_block_size: Scales that share one nested scale.
    """

    codes: Tensor
    nested_absmax: Tensor
    offset: Tensor
    code_map: Tensor
    nested_block_size: int = NESTED_BLOCK_SIZE

    @classmethod
    def quantize(cls, absmax: Tensor) -> NestedScales:
        """Quantize fp32 scales [num_blocks] to 8 bits."""
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        centred = absmax - offset
        blocks = -(-centred.numel() // NESTED_BLOCK_SIZE)
        padded = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCK_SIZE - centred.numel()))
        padded = padded.view(blocks, NESTED_BLOCK_SIZE)
        nested = padded.abs().amax(dim=1) if blocks else padded.new_zeros(0)
        normalized = (padded * (1.0 / nested.clamp_min(1e-38))[:, None]).reshape(-1)[: centred.numel()]
        thresholds = _thresholds(absmax.device)
        codes = torch.bucketize(normalized.clamp_(-1, 1), thresholds, out_int32=True).to(torch.uint8)
        return cls(codes, nested, offset, dynamic_map(absmax.device))

    def dequantize(self) -> Tensor:
        """The scales, fp32 [num_blocks]."""
        return dequantize_scales(self.codes, self.code_map, self.nested_absmax, self.offset, self.nested_block_size)

    @property
    def num_bytes(self) -> int:
        """Bytes held for this tensor alone; the map is shared by all."""
        return self.codes.nbytes + self.nested_absmax.nbytes + self.offset.nbytes

    def as_bytes(self) -> Tensor:
        """What there is of each block, as uint8 [bytes]; shares memory. Nested scales are a thousandth of it."""
        return self.codes

    def with_bytes(self, held: Tensor) -> NestedScales:
        """The same kind of scales, with what `as_bytes` gave of others."""
        return replace(self, codes=held)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> NestedScales:
        """The same scales with `function` applied to each tensor; the shared map is only moved."""
        codes = function(self.codes)
        shared = dynamic_map(self.code_map.device)
        code_map = dynamic_map(codes.device) if self.code_map is shared else function(self.code_map)
        return replace(
            self,
            codes=codes,
            nested_absmax=function(self.nested_absmax),
            offset=function(self.offset),
            code_map=code_map,
        )


Scales = PlainScales | NestedScales
