"""How a value between two codes is rounded to one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fourfold.quantization.number_format import NumberFormat

__all__ = ["ROUNDINGS", "round_nearest", "round_stochastic"]


def round_nearest(normalized: Tensor, number_format: NumberFormat, generator: torch.Generator | None = None) -> Tensor:
    """The code of the nearest value; on the midpoint between two, the lower one.

    Args:
        normalized: fp32 [n], elements in units of their block's scale.
        number_format: The format.
        generator: Not used: the result is determined.

    Returns:
        uint8 [n].
    """
    _, codes = number_format.sorted_values(normalized.device)
    rank = _count_below(normalized, number_format.thresholds(normalized.device))
    return rank if number_format.is_sorted else codes.index_select(0, rank.int())


def round_stochastic(
    normalized: Tensor, number_format: NumberFormat, generator: torch.Generator | None = None
) -> Tensor:
    """One of the two neighbouring codes at random, so that the expectation is the value itself.

    Args:
        normalized: fp32 [n], elements in units of their block's scale. Beyond the outermost values they are clipped.
        number_format: The format.
        generator: Source of randomness; torch's default one if None.

    Returns:
        uint8 [n].
    """
    values, codes = number_format.sorted_values(normalized.device)
    upper = _count_below(normalized, values).int().clamp_(1, values.numel() - 1)
    low, high = values[upper - 1], values[upper]
    # FP4 has two zeros, a step of width 0.
    fraction = ((normalized - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)).clamp_(0, 1)
    draw = torch.rand(normalized.shape, generator=generator, device=normalized.device)
    return codes[upper - 1 + (draw < fraction).int()]


def _count_below(normalized: Tensor, boundaries: Tensor) -> Tensor:
    """How many of the ascending `boundaries` are below each element: uint8 [n]."""
    if boundaries.numel() > 16:
        return torch.bucketize(normalized, boundaries, out_int32=True).to(torch.uint8)
    # Sixteen comparisons of whole vectors are several times faster than one binary search an element.
    count = torch.zeros_like(normalized, dtype=torch.uint8)
    is_above = torch.empty_like(normalized, dtype=torch.bool)
    for boundary in boundaries:
        torch.gt(normalized, boundary, out=is_above)
        count += is_above.view(torch.uint8)
    return count


ROUNDINGS: dict[str, Callable[[Tensor, NumberFormat, torch.Generator | None], Tensor]] = {
    "nearest": round_nearest,
    "stochastic": round_stochastic,
}
