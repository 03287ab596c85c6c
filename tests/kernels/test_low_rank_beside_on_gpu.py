"""An activation and its low-rank product beside it, on a GPU at shapes of real models, against float64."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels import low_rank_beside_triton as kernels
from fourfold.kernels.launching import Tile
from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.low_rank_beside import fill_low_rank_, low_rank_beside

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [5, 16, 48, 64, 96])
@pytest.mark.parametrize(("rows", "width"), [(8192, 4096), (2048, 2048), (1030, 2300), (7, 1536)])
def test_the_product_equals_float64_and_is_the_same_again(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width, device="cuda").to(dtype)
    projection = new_extended(x, rank, width, rank).normal_()[:, :width]
    # Leaves NaN in the memory that the next allocations get, so that an element that is not written shows.
    poison = torch.full_like(new_extended(x, rows, width, rank), torch.nan)
    del poison
    extended, low = low_rank_beside(x, projection)
    product = x.double() @ projection.double().T
    assert torch.equal(extended[:, :width], x)
    assert torch.equal(extended[:, width:], low)
    assert float((low.double() - product).norm() / product.norm()) < TOLERANCE[dtype]
    assert torch.equal(low_rank_beside(x, projection)[1], low)
    extended[:, width:] = torch.nan
    assert torch.equal(fill_low_rank_(extended, width, projection), low)
    assert torch.equal(extended[:, :width], x)
    assert torch.equal(extended[:, width:], low)


@pytest.mark.parametrize("tile", [kernels.TALL, kernels.SHORT])
def test_a_rows_product_is_the_same_among_other_rows(tile: Tile) -> None:
    x = torch.randn(5000, 4096, device="cuda", dtype=torch.bfloat16)
    projection = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)

    def low(rows: torch.Tensor) -> torch.Tensor:
        return kernels.low_rank_beside(rows, projection, new_extended(rows, len(rows), 4096, 16), tile)

    assert torch.equal(low(x)[:100], low(x[:100]))
