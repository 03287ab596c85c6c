"""The codec's kernels on a GPU: what the interpreter cannot show, against the CPU and bitsandbytes' own kernels."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pairwise import pairwise
from torch import Tensor

from fourfold.kernels import blockwise, blockwise_triton
from fourfold.kernels.expansion import expand_blockwise_reference
from fourfold.kernels.low_rank import new_extended
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor, are_alike, expand_alike_, quantize

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized_on_cpu(shape: tuple[int, ...], *options: Any) -> QuantizedTensor:
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), *options)


def poison(num_bytes: int) -> None:
    """Leave NaN (0xFF) in the memory that the next allocation of this size gets."""
    torch.full((num_bytes,), 255, dtype=torch.uint8, device="cuda")


def unwritten(rows: int, columns: int, rank: int, dtype: torch.dtype) -> Tensor:
    """NaN as `new_extended` lays it out, [rows, columns + rank], and between its rows."""
    out = new_extended(torch.empty(0, dtype=dtype, device="cuda"), rows, columns, rank)
    with_gaps(out).fill_(torch.nan)
    return out


def with_gaps(out: Tensor) -> Tensor:
    return out.as_strided((len(out), out.stride(0)), (out.stride(0), 1))


@pytest.mark.parametrize(
    ("shape_and_block_size", "format", "double_quant", "dtype"),
    pairwise(
        [((512, 4096), 64), ((1000, 1032), 32), ((33, 257), 128), ((3, 41000), 4096), ((7, 9, 5), 64), ((1,), 64)],
        ["nf4", "fp4", "int8"],
        [False, True],
        DTYPES,
    ),
)
def test_dequantize_is_bit_equal_to_the_cpu(
    shape_and_block_size: tuple[tuple[int, ...], int], format: str, double_quant: bool, dtype: torch.dtype
) -> None:
    shape, block_size = shape_and_block_size
    quantized = quantized_on_cpu(shape, format, block_size, double_quant)
    expected = quantized.dequantize(dtype)
    poison(expected.nbytes)
    assert torch.equal(quantized.to("cuda").dequantize(dtype).cpu(), expected)


def test_nothing_is_dequantized_to_nothing() -> None:
    assert quantized_on_cpu((0, 8)).to("cuda").dequantize().shape == (0, 8)


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_is_bit_equal_to_bitsandbytes(double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    nested = None
    if double_quant:
        second = state.state2
        nested = blockwise_triton.NestedParts(second.code, second.absmax, state.offset, second.blocksize)
    expected = functional.dequantize_4bit(codes, state)
    poison(expected.nbytes)
    shape = list(weight.shape)
    ours = blockwise_triton.dequantize(codes, state.code, state.absmax, 64, shape, weight.dtype, nested)
    assert torch.equal(ours, expected)


def test_products_over_all_of_fp32_are_rounded_as_torch_rounds_them() -> None:
    absmax = torch.arange(-(2**31), 2**31, 1009, device="cuda").to(torch.int32).view(torch.float32)
    codes = torch.full((absmax.numel() * 16,), 0xFF, dtype=torch.uint8, device="cuda")
    ours = blockwise.dequantize_blockwise(
        codes, torch.ones(16, device="cuda"), absmax, 32, [absmax.numel(), 32], torch.bfloat16
    )
    expected = absmax.to(torch.bfloat16)[:, None].expand(-1, 32)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize(
    ("columns_and_linears", "double_quant", "dtype"),
    pairwise(
        [(4096, [(512, 16), (128, 7), (128, 256)]), (1536, [(200, 3), (100, 16)]), (100, [(7, 3), (9, None)])],
        [False, True],
        DTYPES,
    ),
)
def test_expansion_is_bit_equal_to_the_reference(
    columns_and_linears: tuple[int, list[tuple[int, int | None]]], double_quant: bool, dtype: torch.dtype
) -> None:
    columns, linears = columns_and_linears
    total_rows = sum(rows for rows, _ in linears)
    used_ranks = sum(rank or 0 for _, rank in linears)
    padded_ranks = -(-used_ranks // 16) * 16
    out = unwritten(total_rows + padded_ranks, columns, padded_ranks, dtype)
    expected, row, rank_row = unwritten(total_rows + padded_ranks, columns, padded_ranks, dtype), 0, 0
    for rows, rank in linears:
        weight = quantized_on_cpu((rows, columns), "nf4", 64, double_quant).to("cuda")
        a = None if rank is None else torch.randn(rank, columns, device="cuda")
        b = None if rank is None else torch.randn(rows, rank, device="cuda")
        place: dict[str, Any] = {"row": row, "total_rows": total_rows, "used_ranks": used_ranks, "rank_row": rank_row}
        place |= {"lora_a": a, "lora_b": b, "scaling": 0.7}
        weight.expand_(out, **place)
        absmax = weight.scales.dequantize()
        arguments = (weight.codes, weight.codebook, absmax, 64, rows, columns, *place.values())
        expand_blockwise_reference(expected, *arguments)
        row, rank_row = row + rows, rank_row + (rank or 0)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    gaps = (total_rows + padded_ranks) * (out.stride(0) - out.shape[1])
    assert int(with_gaps(out).isnan().sum()) == padded_ranks**2 + gaps


# The first group is one launch, of whole tiles; the second too, and its rows end within runs of words; the third is
# one launch a linear, and so is the last.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("fp4", False), ("int8", True)])
@pytest.mark.parametrize(
    ("columns", "linears"),
    [
        (4096, [(512, 16), (128, 7), (128, 256)]),
        (1536, [(256, 3), (512, None)]),
        (14336, [(64, 16)]),
        (1536, [(200, 3), (100, 16)]),
        (2048, [(64, None), (32, None)]),
        (1024, [(4, 1), (4, 2), (4, 3), (4, 4)]),
    ],
)
def test_group_expansion_is_bit_equal_to_the_reference(
    columns: int, linears: list[tuple[int, int | None]], format: str, double_quant: bool, dtype: torch.dtype
) -> None:
    num_rows = [rows for rows, _ in linears]
    total_rows, used_ranks = sum(num_rows), sum(rank or 0 for _, rank in linears)
    padded_ranks = -(-used_ranks // 16) * 16
    weights = [quantized_on_cpu((rows, columns), format, 64, double_quant).to("cuda") for rows in num_rows]
    a = [None if rank is None else torch.randn(rank, columns, device="cuda") for _, rank in linears]
    b = [None if rank is None else torch.randn(rows, rank, device="cuda") for rows, rank in linears]
    scalings = [0.7 + index for index in range(len(linears))]
    out = unwritten(total_rows + padded_ranks, columns, padded_ranks, dtype)
    expected, row, rank_row = unwritten(total_rows + padded_ranks, columns, padded_ranks, dtype), 0, 0
    assert are_alike(weights)
    expand_alike_(out, weights, a, b, scalings)
    for weight, (rows, rank), *adapter in zip(weights, linears, a, b, scalings, strict=True):
        absmax = weight.scales.dequantize()
        place = (rows, columns, row, total_rows, used_ranks, rank_row, *adapter)
        expand_blockwise_reference(expected, weight.codes, weight.codebook, absmax, 64, *place)
        row, rank_row = row + rows, rank_row + (rank or 0)
    torch.testing.assert_close(with_gaps(out), with_gaps(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("constants", [{"CHUNKS": 1}, {"CHUNKS": 4}, {"CHUNKS": 2, "THREADS": 256}])
def test_whole_tiles_are_bit_equal_however_they_are_made(
    constants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = quantized_on_cpu((512, 4096))
    expected = quantized.dequantize(torch.bfloat16)
    for name, value in constants.items():
        monkeypatch.setitem(blockwise_triton.EVEN, name, value)
    poison(expected.nbytes)
    assert torch.equal(quantized.to("cuda").dequantize(torch.bfloat16).cpu(), expected)


def test_a_group_of_whole_tiles_is_one_launch() -> None:
    weights = [quantized_on_cpu((rows, 4096)).to("cuda") for rows in (512, 128, 128)]
    out = unwritten(768 + 48, 4096, 48, torch.bfloat16)
    a = [torch.randn(16, 4096, device="cuda") for _ in weights]
    b = [torch.randn(weight.shape[0], 16, device="cuda") for weight in weights]
    expand_alike_(out, weights, a, b, [1.0, 1.0, 1.0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        expand_alike_(out, weights, a, b, [1.0, 1.0, 1.0])
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "Sync" not in name] == ["expand_group_kernel"]


@pytest.mark.parametrize(
    ("size_and_block_size", "format", "dtype"),
    pairwise([(2**20, 64), (100_001, 32), (50_000, 4096), (1, 64)], ["nf4", "fp4", "int4", "int8"], DTYPES),
)
def test_quantize_is_the_cpus(size_and_block_size: tuple[int, int], format: str, dtype: torch.dtype) -> None:
    size, block_size = size_and_block_size
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[64:128] = 0
    expected = quantize(tensor, format, block_size, double_quant=False)
    ours = quantize(tensor.cuda(), format, block_size, double_quant=False).to("cpu")
    assert torch.equal(ours.scales.dequantize(), expected.scales.dequantize())
    assert torch.equal(ours.codes, expected.codes)


def test_a_block_size_that_no_kernel_takes_is_served_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    codes = torch.randint(0, 256, (500,), dtype=torch.uint8)
    codebook, absmax = torch.randn(16), torch.rand(-(-1000 // 48))
    expected = blockwise.dequantize_blockwise(codes, codebook, absmax, 48, [1000], torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            on_gpu = (codes.cuda(), codebook.cuda(), absmax.cuda())
            ours = blockwise.dequantize_blockwise(*on_gpu, 48, [1000], torch.float32)
            assert torch.equal(ours.cpu(), expected)
    assert len([message for message in caplog.messages if "blocks of 48" in message]) == 1


def test_nested_scales_are_read_in_their_one_launch() -> None:
    weight = quantized_on_cpu((256, 256)).to("cuda")
    assert isinstance(weight.scales, NestedScales)
    weight.dequantize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        weight.dequantize()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "Sync" not in name] == ["dequantize_even_kernel"]
