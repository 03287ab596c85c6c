"""Both low-rank products of a gradient in one pass over it, on a GPU at shapes of real models, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison, relative_error
from pairwise import pairwise
from torch import Tensor

from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.low_rank_pair import low_rank_pair_, low_rank_pair_reference_

pytestmark = pytest.mark.gpu

# No powers of two.
SCALINGS = (0.3, 5.7, 1.1)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
# Widths, and the columns with which the second and the third layer begin.
LAYERS: list[tuple[int, tuple[int, ...]]] = [(4096, ()), (6144, (4096, 5120)), (3072, (2048, 2560)), (2300, ())]


def operands(
    rows: int, width: int, rank: int, begins: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient with NaN behind it, up, low), strided as in the fused block; rank is of a layer."""
    ranks = rank * (len(begins) + 1)
    like = torch.empty(0, dtype=dtype, device="cuda")
    extended = new_extended(like, rows, width, ranks).normal_()
    extended[:, width:] = torch.nan
    up = new_extended(like, width, 64, ranks).zero_()[:, 64:].T
    for layer, (begin, end) in enumerate(zip((0, *begins), (*begins, width), strict=True)):
        up[layer * rank : (layer + 1) * rank, begin:end].normal_()
    return extended, up, new_extended(like, rows, 64, ranks).normal_()[:, 64:]


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


def check(extended: Tensor, width: int, up: Tensor, low: Tensor, sums: Tensor, begins: tuple[int, ...]) -> None:
    gradient = extended[:, :width].double()
    assert sums.dtype == torch.float32
    assert sums.shape == (width, len(up) // (len(begins) + 1))
    assert sums.is_contiguous()
    assert relative_error(sums, gradients(gradient, low, begins)) < 1e-5
    assert relative_error(extended[:, width:], gradient @ up.double().T) < TOLERANCE[extended.dtype]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("dtype", "rows", "layers", "rank"),
    pairwise([torch.bfloat16, torch.float16, torch.float32], [8192, 4099, 5000, 300], LAYERS, [16, 5, 32, 48]),
)
def test_the_operators_products_equal_float64(
    dtype: torch.dtype, rows: int, layers: tuple[int, tuple[int, ...]], rank: int
) -> None:
    width, begins = layers
    extended, up, low = operands(rows, width, rank, begins, dtype)
    before = extended[:, :width].clone()
    poison()
    scalings = SCALINGS[: len(begins) + 1]
    sums = low_rank_pair_(extended, width, up, low, begins, scalings)
    check(extended, width, up, low, sums, begins)
    assert torch.equal(extended[:, :width], before)
    products = extended[:, width:].clone()
    again = low_rank_pair_(extended, width, up, low, begins, scalings)
    assert torch.equal(again, sums)
    assert torch.equal(extended[:, width:], products)


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "layers"),
    pairwise(["WIDE", "NARROW", "SMALL"], [torch.bfloat16, torch.float16], [4096, 77, 1], LAYERS),
)
def test_each_tile_takes_any_rows(
    name: str, dtype: torch.dtype, rows: int, layers: tuple[int, tuple[int, ...]]
) -> None:
    from fourfold.kernels import low_rank_pair_triton

    if name == "WIDE" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this tile needs compute capability 9.0")
    width, begins = layers
    extended, up, low = operands(rows, width, 16, begins, dtype)
    poison()
    tile = getattr(low_rank_pair_triton, name)
    scalings = SCALINGS[: len(begins) + 1]
    sums = low_rank_pair_triton.low_rank_pair_(extended, width, up, low, begins, scalings, tile)
    check(extended, width, up, low, sums, begins)


def test_rows_past_two_to_the_31_elements_are_addressed() -> None:
    width, begins = 6144, (4096, 5120)
    rows = (1 << 31) // width + 500
    extended, up, low = operands(rows, width, 16, begins, torch.bfloat16)
    sums = low_rank_pair_(extended, width, up, low, begins, SCALINGS)
    last = extended[-100:].clone()
    low_rank_pair_reference_(last, width, up, low[-100:], begins, SCALINGS)
    assert relative_error(extended[-100:, width:], last[:, width:]) < TOLERANCE[torch.bfloat16]
    expected = low_rank_pair_reference_(extended, width, up, low, begins, SCALINGS)
    assert relative_error(sums, expected) < 1e-4
