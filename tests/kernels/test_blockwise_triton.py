"""The Triton kernel, interpreted, bit-equal to the reference and to bitsandbytes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fourfold.kernels import blockwise_triton
from fourfold.kernels.blockwise import dequantize_nested, dequantize_nested_reference
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor, quantize


def dequantize_by_kernel(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    scales, nested = weight.scales, None
    if isinstance(scales, NestedScales):
        nested = blockwise_triton.NestedParts(scales.code_map, scales.nested_absmax, scales.offset, 256)
        values = scales.codes
    else:
        values = scales.absmax
    shape = list(weight.shape)
    return blockwise_triton.dequantize(weight.codes, weight.codebook, values, weight.block_size, shape, dtype, nested)


# Not bf16: the interpreter cuts numbers off where the GPU rounds them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((3, 100), 32), ((5, 4096), 64), ((33, 257), 128), ((3, 4100), 4096), ((1,), 64), ((0, 8), 64)],
)
def test_kernel_is_bit_equal_to_what_the_cpu_does(
    shape: tuple[int, ...], block_size: int, format: str, double_quant: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, format, block_size, double_quant)
    assert torch.equal(dequantize_by_kernel(quantized, dtype), quantized.dequantize(dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_kernel_is_equal_to_bitsandbytes(quant_type: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 200, generator=torch.Generator().manual_seed(0)).half()
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    nested = blockwise_triton.NestedParts(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    ours = blockwise_triton.dequantize(codes, state.code, state.absmax, 64, [96, 200], torch.float16, nested)
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


def test_codes_that_are_not_aligned_to_words_are_read_byte_by_byte() -> None:
    quantized = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), double_quant=False)
    shifted = torch.cat([torch.zeros(1, 1, dtype=torch.uint8), quantized.codes])[1:]
    assert shifted.data_ptr() % 4
    ours = blockwise_triton.dequantize(
        shifted, quantized.codebook, quantized.scales.dequantize(), 64, [8, 64], torch.float32
    )
    assert torch.equal(ours, quantized.dequantize())


def test_nested_operator_passes_opcheck_and_is_the_two_that_it_joins() -> None:
    quantized = quantize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    scales = quantized.scales
    assert isinstance(scales, NestedScales)
    parts = (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
    arguments = (quantized.codes, quantized.codebook, *parts, 64, 256, [40, 64], torch.bfloat16)
    torch.library.opcheck(torch.ops.fourfold.dequantize_nested.default, arguments)
    assert torch.equal(dequantize_nested(*arguments), dequantize_nested_reference(*arguments))
    assert torch.equal(dequantize_nested(*arguments), quantized.dequantize(torch.bfloat16))
