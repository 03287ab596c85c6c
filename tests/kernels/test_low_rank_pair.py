"""Both low-rank products of a gradient in one pass over it: the operator and its kernel against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.low_rank_pair import low_rank_pair_

pytest.importorskip("triton")

from fourfold.kernels import low_rank_pair_triton as kernels

# No powers of two.
SCALINGS = (0.3, 5.7, 1.1)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def operands(
    rows: int, width: int, rank: int, begins: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient with NaN behind it, up, low); rank is of a layer."""
    ranks = rank * (len(begins) + 1)
    extended = new_extended(torch.empty(0, dtype=dtype), rows, width, ranks)
    extended[:, :width] = torch.randn(rows, width)
    extended[:, width:] = torch.nan
    up = torch.zeros(width, ranks + 3, dtype=dtype)[:, :ranks].T
    for layer, (begin, end) in enumerate(zip((0, *begins), (*begins, width), strict=True)):
        up[layer * rank : (layer + 1) * rank, begin:end] = torch.randn(rank, end - begin)
    return extended, up, torch.randn(rows, 40 + ranks).to(dtype)[:, 40:]


def gradients(gradient: Tensor, low: Tensor, begins: tuple[int, ...]) -> Tensor:
    """What the sums are [width, rank], in float64: for each column those with its own layer's ranks."""
    width, rank = gradient.shape[1], low.shape[1] // (len(begins) + 1)
    ends = zip((0, *begins), (*begins, width), strict=True)
    return torch.cat(
        [
            scaling * gradient[:, begin:end].double().T @ low[:, i * rank : (i + 1) * rank].double()
            for i, ((begin, end), scaling) in enumerate(zip(ends, SCALINGS, strict=False))
        ]
    )


SHAPES: list[tuple[int, int, int, tuple[int, ...]]] = [
    (77, 256, 16, ()),
    (130, 200, 5, ()),
    (1, 128, 33, ()),
    (130, 384, 5, (256,)),
    (200, 512, 16, (256, 384)),
]


@pytest.mark.parametrize("block_m", [32, 64])
@pytest.mark.parametrize(("rows", "width", "rank", "begins"), SHAPES)
def test_the_kernels_products_equal_float64(
    rows: int, width: int, rank: int, begins: tuple[int, ...], block_m: int
) -> None:
    # fp16: the interpreter's products of bf16 are wrong.
    extended, up, low = operands(rows, width, rank, begins, torch.float16)
    gradient = extended[:, :width].double()
    tile = kernels.Pass(block_m, 128, 4, 3, programs=8)
    sums = kernels.low_rank_pair_(extended, width, up, low, begins, SCALINGS[: len(begins) + 1], tile)
    products = gradient @ up.double().T
    assert sums.shape == (width, rank)
    assert sums.is_contiguous()
    assert relative_error(sums, gradients(gradient, low, begins)) < 1e-6
    assert relative_error(extended[:, width:], products) < TOLERANCE[torch.float16]
    assert torch.equal(extended[:, :width].double(), gradient)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width", "rank", "begins"), SHAPES)
def test_the_operator_fills_the_columns_and_sums_in_fp32(
    rows: int, width: int, rank: int, begins: tuple[int, ...], dtype: torch.dtype
) -> None:
    extended, up, low = operands(rows, width, rank, begins, dtype)
    gradient = extended[:, :width].double()
    sums = low_rank_pair_(extended, width, up, low, begins, SCALINGS[: len(begins) + 1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == wide
    assert sums.is_contiguous()
    assert relative_error(sums, gradients(gradient, low, begins)) < TOLERANCE[wide]
    assert relative_error(extended[:, width:], gradient @ up.double().T) < TOLERANCE[dtype]
    assert torch.equal(extended[:, :width].double(), gradient)


def test_no_tile_is_taken_within_which_a_layer_begins() -> None:
    device = torch.device("cpu")
    assert kernels.tile_for(6144, 16, (4096, 5120), device) is kernels.SMALL
    assert kernels.tile_for(1000, 16, (), device) is kernels.SMALL
    assert kernels.tile_for(6144, 16, (4096, 5248), device) is None


def test_hopper_takes_the_widest_tile_that_ends_where_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_hopper", lambda _: True)
    device = torch.device("cpu")
    assert kernels.tile_for(6144, 16, (4096, 5120), device) is kernels.WIDE
    assert kernels.tile_for(6144, 17, (4096, 5120), device) is kernels.NARROW
    assert kernels.tile_for(6144, 16, (4096, 5376), device) is kernels.NARROW
    assert kernels.tile_for(2304, 16, (), device) is kernels.NARROW
    assert kernels.tile_for(6144, 16, (4096, 5248), device) is None


@pytest.mark.parametrize("begins", [(), (16, 32)])
def test_the_operator_passes_opcheck(begins: tuple[int, ...]) -> None:
    arguments = (torch.randn(4, 54), 48, torch.randn(6, 48), torch.randn(4, 6), begins, SCALINGS[: len(begins) + 1])
    torch.library.opcheck(
        torch.ops.fourfold.low_rank_pair_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
