"""A weight and its adapter in one matrix: the kernel against the reference, and both against plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.kernels.low_rank import new_extended
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor, quantize

# Rows, columns and ranks of the linears that share a matrix; None for no adapter.
GROUPS = {
    "one": (64, [(24, 16)]),
    "query, key, value": (4096 + 64, [(3, 5), (2, 1), (2, 8)]),
    "two tiles in a row": (2048, [(5, 3), (4, None)]),
    "columns that are no words": (36, [(7, 3), (9, 2)]),
    "columns that are odd": (33, [(5, 2), (4, 1)]),
    "no adapter": (64, [(8, None), (8, None)]),
}


def unwritten(rows: int, columns: int, rank: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """NaN as `new_extended` lays it out, [rows, columns + rank], and between its rows."""
    out = new_extended(torch.empty(0, dtype=dtype, device=device), rows, columns, rank)
    _rows_with_gaps(out).fill_(torch.nan)
    return out


def _rows_with_gaps(out: Tensor) -> Tensor:
    return out.as_strided((len(out), out.stride(0)), (out.stride(0), 1))


def assert_written(out: Tensor, expected: Tensor) -> None:
    """The same bits, and nothing between the rows."""
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert _rows_with_gaps(out)[:, out.shape[1] :].isnan().all()


def expanded(
    columns: int, linears: list[tuple[int, int | None]], dtype: torch.dtype, device: str = "cpu", **options: Any
) -> tuple[Tensor, Tensor, list[tuple[QuantizedTensor, dict[str, Any]]]]:
    """What the matrix must be, with NaN where nothing may be written; an equal one of NaN; and the calls."""
    torch.manual_seed(columns)
    total_rows = sum(rows for rows, _ in linears)
    used_ranks = sum(rank or 0 for _, rank in linears)
    padded_ranks = -(-used_ranks // 16) * 16 + (16 if used_ranks == 16 else 0)
    out = unwritten(total_rows + padded_ranks, columns, padded_ranks, dtype, device)
    expected = out.clone()
    expected[:total_rows, columns:] = 0
    expected[total_rows:, :columns] = 0
    calls, row, rank_row = [], 0, 0
    for rows, rank in linears:
        weight = quantize(torch.randn(rows, columns, device=device), **options)
        expected[row : row + rows, :columns] = weight.dequantize(dtype)
        place: dict[str, Any] = {"row": row, "total_rows": total_rows, "used_ranks": used_ranks, "rank_row": rank_row}
        if rank is not None:
            a, b = torch.randn(rank, columns, device=device), torch.randn(rows, rank, device=device)
            expected[total_rows + rank_row : total_rows + rank_row + rank, :columns] = a.to(dtype)
            expected[row : row + rows, columns + rank_row : columns + rank_row + rank] = (0.7 * b).to(dtype)
            place |= {"lora_a": a, "lora_b": b, "scaling": 0.7}
        calls.append((weight, place))
        row, rank_row = row + rows, rank_row + (rank or 0)
    return expected, out, calls


def expand_by_kernel(weight: QuantizedTensor, out: Tensor, place: dict[str, Any]) -> None:
    """The launcher itself, which on the CPU is interpreted."""
    from fourfold.kernels.blockwise_triton import NestedParts
    from fourfold.kernels.expansion_triton import expand_

    scales, nested = weight.scales, None
    if isinstance(scales, NestedScales):
        nested = NestedParts(scales.code_map, scales.nested_absmax, scales.offset, scales.nested_block_size)
        values = scales.codes
    else:
        values = scales.absmax
    place = {"lora_a": None, "lora_b": None, "scaling": 1.0} | place
    rows, columns = weight.shape
    expand_(
        *(out, weight.codes, weight.codebook, values, weight.block_size, nested), num_rows=rows, num_columns=columns,
        **place,
    )  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_operator_writes_every_linear_into_its_place_and_the_corner_never(name: str, double_quant: bool) -> None:
    expected, out, calls = expanded(*GROUPS[name], torch.bfloat16, double_quant=double_quant)
    for weight, place in calls:
        weight.expand_(out, **place)
    assert_written(out, expected)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    ("format", "dtype", "block_size", "double_quant"),
    [
        ("nf4", torch.float16, 64, True),
        ("fp4", torch.float16, 32, False),
        ("int8", torch.float32, 128, True),
    ],
)
def test_kernel_is_bit_equal_to_reference(
    name: str, format: str, dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    # Not bf16: the interpreter cuts numbers off where the GPU rounds them.
    pytest.importorskip("triton")
    options = {"format": format, "block_size": block_size, "double_quant": double_quant}
    expected, out, calls = expanded(*GROUPS[name], dtype, **options)
    for weight, place in calls:
        expand_by_kernel(weight, out, place)
    assert_written(out, expected)


def test_one_product_with_the_matrix_is_the_linears_with_their_adapters() -> None:
    _, out, calls = expanded(64, [(24, 3), (8, 5)], torch.float32)
    for weight, place in calls:
        weight.expand_(out, **place)
    total_rows = 32
    x = torch.randn(7, 64)
    xa = x @ out[total_rows:, :64].T
    ours = torch.cat([x, xa], dim=1) @ out[:total_rows].T
    plain = [x @ weight.dequantize().T + 0.7 * (x @ place["lora_a"].T) @ place["lora_b"].T for weight, place in calls]
    torch.testing.assert_close(ours, torch.cat(plain, dim=1))


@pytest.mark.parametrize(
    "change",
    [
        {"row": 1},
        {"total_rows": 25},
        {"used_ranks": 17},
        {"rank_row": 14},
        {"lora_a": torch.zeros(3, 63)},
        {"lora_b": torch.zeros(24, 4)},
        {"lora_b": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_linear_that_does_not_fit_its_place_is_refused(change: dict[str, Any]) -> None:
    _, out, [(weight, place)] = expanded(64, [(24, 3)], torch.float32)
    with pytest.raises(QuantizationError, match="do not fit"):
        weight.expand_(out, **place | change)


def test_operators_pass_opcheck() -> None:
    for double_quant, op in itertools.product(
        [False, True], [torch.ops.fourfold.expand_blockwise_.default, torch.ops.fourfold.expand_nested_.default]
    ):
        _, out, [(weight, place)] = expanded(64, [(24, 3)], torch.float32, double_quant=double_quant)
        scales = weight.scales
        tail = (24, 64, *place.values())
        out = torch.zeros_like(out)
        if isinstance(scales, NestedScales) and "nested" in op.name():
            parts = (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
            torch.library.opcheck(op, (out, weight.codes, weight.codebook, *parts, 64, 256, *tail))
        elif not isinstance(scales, NestedScales) and "blockwise" in op.name():
            torch.library.opcheck(op, (out, weight.codes, weight.codebook, scales.absmax, 64, *tail))
