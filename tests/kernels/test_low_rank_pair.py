"""Both low-rank products of a gradient in one pass over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.low_rank_pair_triton import Pass, low_rank_pair

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")

# The interpreter's product of bf16 tiles is wrong.
DTYPE = torch.float16


def operands(rows: int, width: int, rank: int, begins: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient with NaN behind it, up, low)."""
    torch.manual_seed(0)
    ranks = rank * (len(begins) + 1)
    extended = new_extended(torch.empty(0, dtype=DTYPE), rows, width, ranks)
    extended[:, :width] = torch.randn(rows, width)
    extended[:, width:] = torch.nan
    up = torch.zeros(width, ranks + 3, dtype=DTYPE)[:, :ranks].T
    for layer, (begin, end) in enumerate(zip((0, *begins), (*begins, width), strict=True)):
        up[layer * rank : (layer + 1) * rank, begin:end] = torch.randn(rank, end - begin)
    return extended, up, torch.randn(rows, 40 + ranks).to(DTYPE)[:, 40:]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("block_m", [32, 64])
@pytest.mark.parametrize(
    ("rows", "width", "rank", "begins"),
    [(77, 256, 16, ()), (130, 200, 5, ()), (1, 128, 33, ()), (130, 384, 5, (256,)), (200, 512, 16, (256, 384))],
)
def test_both_products_equal_float64(
    rows: int, width: int, rank: int, begins: tuple[int, ...], block_m: int, add: bool
) -> None:
    extended, up, low = operands(rows, width, rank, begins)
    gradient = extended[:, :width].double()
    all_sums = low.double().T @ gradient
    ends = zip((0, *begins), (*begins, width), strict=True)
    sums = torch.cat([all_sums[i * rank : (i + 1) * rank, begin:end] for i, (begin, end) in enumerate(ends)], dim=1)
    out = torch.randn(rank, width) if add else None
    expected = sums if out is None else sums + out
    result = low_rank_pair(extended, width, up, low, out, begins=begins, tile=Pass(block_m, 128, 4, 3, programs=8))
    products = gradient @ up.double().T
    assert out is None or result is out
    assert (result.double() - expected).norm() / expected.norm() < 1e-6
    assert (extended[:, width:].double() - products).norm() / products.norm() < 4e-4
    assert torch.equal(extended[:, :width].double(), gradient)


def test_layers_that_begin_within_a_tile_are_refused() -> None:
    extended, up, low = operands(8, 256, 4, (64,))
    with pytest.raises(ValueError, match="multiples of 256"):
        low_rank_pair(extended, 256, up, low, begins=(64,))
