"""Quantization by the kernel, interpreted, and by the reference, against `quantize` as it runs on the CPU."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.encoding import quantize_blockwise, serves
from fourfold.quantization.formats import FORMATS
from fourfold.quantization.tensor import quantize


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("size", "block_size", "dtype"),
    [(1, 32, torch.float32), (4097, 64, torch.float16), (9000, 4096, torch.float32), (0, 64, torch.float32)],
)
def test_codes_and_scales_are_those_of_quantize(
    size: int, block_size: int, dtype: torch.dtype, format: str, by_kernel: bool
) -> None:
    flat = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    flat[64:128] = 0
    expected = quantize(flat, format, block_size, double_quant=False)
    number_format = FORMATS[format]
    function = quantize_blockwise
    if by_kernel:
        pytest.importorskip("triton")
        from fourfold.kernels import encoding_triton

        function = encoding_triton.quantize
    codes, absmax = function(flat, number_format.thresholds(), number_format.sorted_values()[1], block_size)
    assert torch.equal(absmax, expected.scales.dequantize())
    assert torch.equal(codes, expected.codes.view(-1))


def test_values_half_way_between_two_codes_take_the_lower_one() -> None:
    number_format = FORMATS["nf4"]
    thresholds = number_format.thresholds()
    flat = torch.cat([thresholds, torch.ones(1)])
    codes, _ = quantize_blockwise(flat, thresholds, number_format.sorted_values()[1], 16)
    assert number_format.unpack(codes, 16).tolist() == list(range(16))


def test_operator_passes_opcheck() -> None:
    number_format = FORMATS["nf4"]
    arguments = (torch.randn(333), number_format.thresholds(), number_format.sorted_values()[1], 64)
    torch.library.opcheck(torch.ops.fourfold.quantize_blockwise.default, arguments)
    assert not serves(arguments[0], 64)
