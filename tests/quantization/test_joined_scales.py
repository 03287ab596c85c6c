"""Codes and scales in one parameter, as shards want them, are the same weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourfold.quantization.linear import QuantizedLinear

FORMATS = pytest.mark.parametrize(
    "options",
    [{"format": "nf4"}, {"format": "nf4", "double_quant": False}, {"format": "int8"}, {"format": "llm_int8"}],
    ids=["nested", "plain", "int8", "llm_int8"],
)


@FORMATS
# 33 * 30 codes of 4 bits are no multiple of 16 bytes.
@pytest.mark.parametrize("shape", [(64, 128), (33, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_joined_scales_give_the_same_weight_bit_for_bit(
    options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(shape[1], shape[0]), **options)
    before, x = layer.quantized.dequantize(), torch.randn(3, shape[1])
    wanted, num_bytes = layer(x), layer.quantized.num_bytes
    layer.join_scales(torch.device("cpu"), dtype)
    layer.join_scales(torch.device("cpu"), dtype)
    assert torch.equal(layer.quantized.dequantize(), before)
    assert torch.equal(layer(x), wanted)
    # One parameter has all but what is one in ten thousand, and a gap.
    assert layer.weight.dtype == dtype
    assert layer.scales is not None
    assert num_bytes <= layer.weight.nbytes + layer.scales.num_bytes < num_bytes + 16 + dtype.itemsize


def tensors(value: object) -> Iterator[Tensor]:
    """All that are in a module's attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


@FORMATS
def test_a_joined_weight_keeps_nothing_of_what_it_was_joined_from(options: dict[str, Any]) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64, bias=False), **options)
    codes, scales = layer.weight.untyped_storage(), layer.quantized.scales.as_bytes().untyped_storage()
    layer.join_scales(torch.device("cpu"))
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors(vars(layer))}
    assert layer.weight.untyped_storage().data_ptr() in held
    # Both are still here, so that nothing else is at their addresses.
    assert not held & {codes.data_ptr(), scales.data_ptr()}
