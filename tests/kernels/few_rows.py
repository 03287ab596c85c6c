"""What the tests of the product of few rows share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor


def parts(weight: QuantizedTensor) -> tuple[Any, ...]:
    """The arguments of `matmul_4bit` between x and the bias."""
    scales = weight.scales
    if isinstance(scales, NestedScales):
        nested = (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
        return (weight.codes, weight.codebook, *nested, weight.block_size, scales.nested_block_size, weight.shape[0])
    return (weight.codes, weight.codebook, scales.absmax, None, None, None, weight.block_size, 1, weight.shape[0])


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())
