"""A decode step's linear layers: the kernel, interpreted, against float64; the operator against the layers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_rows import error
from torch import Tensor

from fourfold.kernels.decode_linear import decode_linear, decode_linear_reference, serves
from fourfold.kernels.decode_tiles import SPREAD_ROWS, Tile
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor, quantize


def parts(weights: list[QuantizedTensor]) -> tuple[Any, ...]:
    """The arguments of `decode_linear` behind x."""
    first = weights[0].scales
    codes, rows = [weight.codes for weight in weights], [weight.shape[0] for weight in weights]
    if isinstance(first, NestedScales):
        scales: list[Any] = [weight.scales for weight in weights]
        nested = ([each.nested_absmax for each in scales], [each.offset for each in scales])
        return (
            codes,
            weights[0].codebook,
            [each.codes for each in scales],
            first.code_map,
            *nested,
            first.nested_block_size,
            rows,
        )
    return codes, weights[0].codebook, [weight.scales.dequantize() for weight in weights], None, [], [], 1, rows


def exact(x: Tensor, weights: list[QuantizedTensor]) -> Tensor:
    return torch.cat([x.double() @ weight.dequantize(torch.float32).double().T for weight in weights], dim=1)


# Rows that fill no tile, members that end in the middle of one; columns that fill all warps and such that do not.
@pytest.mark.parametrize(
    ("inputs", "rows", "columns"),
    [
        *((1, [40], 2048), (1, [160], 2048), (2, [24, 8, 20], 384), (2, [40], 14336)),
        # Blocks that do not come in pairs, and rows of W that do not come in fours.
        *((1, [24, 8, 20], 320), (2, [24, 33], 384)),
        *((3, [24, 8, 20], 320), (8, [40], 2048), (9, [72, 40], 4096), (50, [33], 576)),
    ],
)
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("fp4", False)])
def test_kernel_is_as_near_to_float64_as_its_output_can_be(
    inputs: int, rows: list[int], columns: int, format: str, double_quant: bool
) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    weights = [quantize(torch.randn(count, columns), format, 64, double_quant) for count in rows]
    x, total = torch.randn(inputs, columns).half(), sum(rows)
    bias, residual = torch.randn(total).half(), torch.randn(inputs, total).half()
    low, up = torch.randn(inputs, 16 * len(rows)).half(), torch.randn(total, 16).half()
    plain = decode_linear_triton.decode_linear(x, *parts(weights), None, None, None, None, "", 2.0, 1.0, torch.float16)
    expected = 2 * exact(x, weights)
    assert error(plain, expected) < 4e-4
    whole = decode_linear_triton.decode_linear(x, *parts(weights), bias, residual, low, up, "", 2.0, 1.0, torch.float16)
    owns = low.double().split(16, dim=1)
    adapted = torch.cat([own @ each.double().T for own, each in zip(owns, up.split(rows), strict=True)], dim=1)
    assert error(whole, expected + adapted + bias.double() + residual.double()) < 6e-4


# Members that end in the middle of a tile, and a program that has fewer tiles than others; a span to a warp, and two,
# of which the last ones are there or not.
@pytest.mark.parametrize(
    ("inputs", "rows", "gates"), [(1, [72, 72], True), (2, [72, 28, 12], False), (1, [132], False)]
)
@pytest.mark.parametrize("columns", [1024, 1536, 2048])
def test_tiles_of_rows_in_turn_give_the_same(inputs: int, rows: list[int], gates: bool, columns: int) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    weights = [quantize(torch.randn(count, columns) / columns**0.5) for count in rows]
    total = sum(rows)
    x, low = torch.randn(inputs, columns).half(), torch.randn(inputs, 16 * len(rows)).half()
    up, bias = torch.randn(total, 16).half() / 4, torch.randn(total).half()
    residual = None if gates else torch.randn(inputs, total).half()
    arguments: Any = (bias, residual, low, up, "silu" if gates else "", 1.0, 0.25 if gates else 1.0, torch.float16)
    tile = Tile(8, 16, 1, 4, tiles=3)
    ours = decode_linear_triton.decode_linear(x, *parts(weights), *arguments, tile=tile)
    assert error(ours, decode_linear_reference(x, *parts(weights), *arguments).double()) < 8e-4


@pytest.mark.parametrize("begin", [4, 8])
def test_scales_may_lie_anywhere(begin: int) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    weight = quantize(torch.randn(24, 1024) / 32)
    codes, codebook, scales, *rest = parts([weight])
    moved = torch.zeros(len(scales[0]) + begin, dtype=torch.uint8)[begin:]
    moved.copy_(scales[0])
    x, others = torch.randn(1, 1024).half(), (None, None, None, None, "", 1.0, 1.0, torch.float16)
    there = decode_linear_triton.decode_linear(x, codes, codebook, [moved], *rest, *others)
    torch.testing.assert_close(there, decode_linear_triton.decode_linear(x, *parts([weight]), *others), rtol=0, atol=0)


# Rows of x in one tile and in two; warps that share rows, columns, or both.
@pytest.mark.parametrize(("inputs", "gates"), [(2, False), (1, True), (3, False), (20, False), (9, True)])
@pytest.mark.parametrize("tile", [(8, 16, 2, 2), (8, 16, 1, 8), (16, 32, 4, 1), (32, 16, 1, 4), (32, 32, 1, 4)])
def test_kernel_gives_the_same_whatever_its_tile(inputs: int, gates: bool, tile: tuple[int, int, int, int]) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    rows = [40, 40] if gates else [24, 20]
    columns = 640 if inputs <= SPREAD_ROWS else 576
    weights = [quantize(torch.randn(count, columns) / 24) for count in rows]
    x, low, up = torch.randn(inputs, columns).half(), torch.randn(inputs, 32).half(), torch.randn(sum(rows), 16).half()
    arguments: Any = (None, None, low, up / 4, "silu" if gates else "", 1.0, 0.25, torch.float16)
    given = Tile(*tile)
    ours = decode_linear_triton.decode_linear(x, *parts(weights), *arguments, tile=given)
    assert error(ours, decode_linear_reference(x, *parts(weights), *arguments).double()) < 8e-4


@pytest.mark.parametrize("inputs", [2, 9])
@pytest.mark.parametrize("rank", [16, 32, 128])
def test_kernel_takes_every_rank(rank: int, inputs: int) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    weights = [quantize(torch.randn(count, 128) / 12) for count in (24, 8)]
    x, low, up = torch.randn(inputs, 128).half(), torch.randn(inputs, 2 * rank).half(), torch.randn(32, rank).half()
    arguments: Any = (None, None, low, up / 4, "", 1.0, 1.0, torch.float16)
    ours = decode_linear_triton.decode_linear(x, *parts(weights), *arguments)
    assert error(ours, decode_linear_reference(x, *parts(weights), *arguments).double()) < 8e-4


def test_rows_of_x_do_not_change_each_other() -> None:
    """Two rows share the tensor cores' columns, and one has them alone."""
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    weights = [quantize(torch.randn(40, 1408) / 36)]
    x = torch.randn(2, 1408).half()
    x[1, 7] = float("nan")
    arguments: Any = (None, None, None, None, "", 1.0, 1.0, torch.float16)
    both = decode_linear_triton.decode_linear(x, *parts(weights), *arguments)
    alone = decode_linear_triton.decode_linear(x[:1], *parts(weights), *arguments)
    assert torch.equal(both[:1], alone)
    assert both[1].isnan().all()


@pytest.mark.parametrize(("inputs", "rows", "columns"), [(1, 40, 2048), (2, 136, 640), (2, 136, 576), (5, 24, 320)])
def test_kernel_gates_as_the_reference_does(inputs: int, rows: int, columns: int) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_linear_triton

    torch.manual_seed(0)
    weights = [quantize(torch.randn(rows, columns) / columns**0.5) for _ in range(2)]
    x, low, up = torch.randn(inputs, columns).half(), torch.randn(inputs, 32).half(), torch.randn(2 * rows, 16).half()
    arguments: Any = (None, None, low, up / 4, "silu", 1.0, 0.25, torch.float16)
    ours = decode_linear_triton.decode_linear(x, *parts(weights), *arguments)
    expected = decode_linear_reference(x, *parts(weights), *arguments)
    assert ours.shape == (inputs, rows)
    assert error(ours, expected.double()) < 6e-4


def test_operator_on_the_cpu_is_the_layers_one_by_one() -> None:
    torch.manual_seed(0)
    weights = [quantize(torch.randn(rows, 128)) for rows in (24, 8)]
    x, residual = torch.randn(2, 128), torch.randn(2, 32)
    ours = decode_linear(x, *parts(weights), residual=residual, dtype=torch.float32)
    expected = torch.cat([torch.nn.functional.linear(x, weight.dequantize(torch.float32)) for weight in weights], 1)
    torch.testing.assert_close(ours, expected + residual)
    assert not serves(x.device, weights[0].codebook, 64, [24, 8], 128)


def test_operator_passes_opcheck() -> None:
    weights = [quantize(torch.randn(24, 64)), quantize(torch.randn(24, 64))]
    for activation in ("", "silu"):
        arguments = (torch.randn(3, 64), *parts(weights), None, None, None, None, activation, 1.0, 1.0, torch.float32)
        if activation:
            arguments = (arguments[0].half(), *arguments[1:])
        torch.library.opcheck(
            torch.ops.fourfold.decode_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
