"""The Triton kernel, interpreted, bit-equal to the reference and to bitsandbytes."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize(
    "constants",
    [{}, {"CHUNKS": 1}, {"CHUNKS": 4}, {"THREADS": 64}],
    ids=lambda constants: ",".join(constants),
)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 256])
def test_kernel_of_whole_tiles_is_bit_equal_however_its_tiles_are_made(
    block_size: int, double_quant: bool, constants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in constants.items():
        monkeypatch.setitem(blockwise_triton.EVEN, name, value)
    weight = torch.randn(12, 1024, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, "fp4", block_size, double_quant)
    nested_block_size = 256 if double_quant else None
    sizes = (weight.numel(), block_size, nested_block_size)
    assert blockwise_triton.is_even(quantized.codes, quantized.codebook, *sizes)
    assert torch.equal(dequantize_by_kernel(quantized, torch.float16), quantized.dequantize(torch.float16))


@pytest.mark.parametrize(
    ("shape", "format", "block_size"),
    [((3, 1000), "nf4", 64), ((4, 1024), "int8", 64), ((2, 4096), "nf4", 8192)],
    ids=["no whole tiles", "no 4 bits", "blocks above a tile"],
)
def test_weights_that_are_not_whole_tiles_are_none_for_their_kernel(
    shape: tuple[int, int], format: str, block_size: int
) -> None:
    quantized = quantize(torch.ones(shape), format)
    num_elements = quantized.num_elements
    assert not blockwise_triton.is_even(quantized.codes, quantized.codebook, num_elements, block_size, None)


def test_tiles_that_meet_two_nested_blocks_are_none_for_the_kernel_of_whole_tiles() -> None:
    quantized = quantize(torch.ones(4, 1024))
    sizes = (quantized.num_elements, 64)
    assert blockwise_triton.is_even(quantized.codes, quantized.codebook, *sizes, 64)
    assert not blockwise_triton.is_even(quantized.codes, quantized.codebook, *sizes, 16)


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
