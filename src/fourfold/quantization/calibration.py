"""Choosing the scale of a block of an integer format: its absmax, or something smaller that clips outliers.

Each takes elements as blocks, fp32 [num_blocks, block_size], and returns their scales, fp32 [num_blocks]. A short last
block is calibrated by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.quantization.number_format import NumberFormat
from fourfold.quantization.rounding import round_nearest

__all__ = [
    "CALIBRATIONS",
    "Calibration",
    "by_absmax",
    "by_kl_divergence",
    "by_percentile",
    "by_squared_error",
    "check_calibration",
]

# Ratios of the absmax that the searches try: below half of it nothing but damage was ever found.
_RATIOS = tuple(1 - step / 40 for step in range(21))


def by_absmax(blocks: Tensor, number_format: NumberFormat) -> Tensor:
    """The largest magnitude of each block: nothing is clipped."""
    if blocks.numel() == 0:
        return blocks.new_zeros(blocks.shape[0])
    return blocks.abs().amax(dim=1)


def by_percentile(blocks: Tensor, number_format: NumberFormat, percentile: float = 99.0) -> Tensor:
    """The `percentile`-th percentile of each block's magnitudes."""
    if blocks.numel() == 0:
        return blocks.new_zeros(blocks.shape[0])
    magnitudes = blocks.abs().sort(dim=1).values
    position = percentile / 100 * (blocks.shape[1] - 1)
    below, above = magnitudes[:, math.floor(position)], magnitudes[:, math.ceil(position)]
    scales = below.lerp(above, position % 1)
    # A block of mostly zeros would be scaled by zero, and lose the few elements that it has.
    return torch.where(scales > 0, scales, by_absmax(blocks, number_format))


def by_squared_error(blocks: Tensor, number_format: NumberFormat) -> Tensor:
    """For each block the ratio of its absmax with the least squared error."""
    absmax = by_absmax(blocks, number_format)
    best_scale = absmax.clone()
    best_error = torch.full_like(absmax, torch.inf)
    codebook = number_format.codebook(blocks.device)
    for ratio in _RATIOS:
        scale = absmax * ratio
        codes = round_nearest((blocks * _reciprocal(scale)[:, None]).reshape(-1), number_format)
        error = (codebook[codes.int()].view_as(blocks) * scale[:, None] - blocks).square().sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def by_kl_divergence(blocks: Tensor, number_format: NumberFormat, num_bins: int = 2048) -> Tensor:
    """One ratio of the absmax for the whole tensor, at which rounding loses the least information.

    The elements in units of their absmax form a histogram P of `num_bins` bins over [-1, 1]. For a ratio, the elements
    are clipped and rounded, and Q spreads each code's share evenly over the non-empty bins that were rounded to it. The
    ratio with the least KL(P || Q) wins (the calibration of TensorRT, S. Migacz, "8-bit inference with TensorRT",
    2017).
    """
    absmax = by_absmax(blocks, number_format)
    if blocks.numel() == 0:
        return absmax
    normalized = (blocks * _reciprocal(absmax)[:, None]).reshape(-1)
    counts = torch.histc(normalized, bins=num_bins, min=-1, max=1).double()
    centres = torch.linspace(-1 + 1 / num_bins, 1 - 1 / num_bins, num_bins, device=blocks.device)
    occupied = (counts > 0).double()
    reference = counts / counts.sum()
    best_ratio, best_divergence = 1.0, float("inf")
    for ratio in _RATIOS:
        # P with its outliers moved to the edge is what the format sees; Q is what it makes of it.
        inside = centres.abs() <= ratio
        codes = round_nearest(centres / ratio, number_format).long()
        share = torch.zeros(len(number_format.values), dtype=torch.float64, device=blocks.device)
        share.index_add_(0, codes[inside], reference[inside])
        places = torch.zeros_like(share).index_add_(0, codes[inside], occupied[inside])
        spread = (share / places.clamp_min(1))[codes] * occupied * inside
        clipped = torch.where(inside, reference, 0.0)
        edges = inside.nonzero()
        clipped[edges[0]] += reference[: int(edges[0])].sum()
        clipped[edges[-1]] += reference[int(edges[-1]) + 1 :].sum()
        # The floor stands for "never": mass that Q does not have is dear, but not infinitely.
        spread = (spread / spread.sum().clamp_min(1e-30)).clamp_min(1e-9)
        divergence = float(torch.special.xlogy(clipped, clipped / spread).sum())
        if divergence < best_divergence:
            best_ratio, best_divergence = ratio, divergence
    return absmax * best_ratio


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, and a large finite number for a block of zeros, whose elements stay zero."""
    return 1.0 / scales.clamp_min(1e-38)


@dataclass(frozen=True)
class Calibration:
    """A way to choose scales.

    Args:
        scales: The function, as the module describes it.
        is_blockwise: Whether a block's scale depends on that block alone, so that a tensor may be taken in parts.
    """

    scales: Callable[[Tensor, NumberFormat], Tensor]
    is_blockwise: bool = True


CALIBRATIONS: dict[str, Calibration] = {
    "absmax": Calibration(by_absmax),
    "percentile": Calibration(by_percentile),
    "mse": Calibration(by_squared_error),
    "kl": Calibration(by_kl_divergence, is_blockwise=False),
}


def check_calibration(name: str, number_format: NumberFormat) -> None:
    """Raise QuantizationError unless there is such a calibration, and it is for this format."""
    if name not in CALIBRATIONS:
        raise QuantizationError("unknown calibration", found=name, allowed=CALIBRATIONS)
    if name != "absmax" and not number_format.is_integer:
        raise QuantizationError(
            f"calibration is for integer formats; {number_format.name} is built for blocks scaled by their absmax",
            found=name,
            allowed="absmax",
        )
