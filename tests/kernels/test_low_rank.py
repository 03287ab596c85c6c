"""Low-rank products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.low_rank import extend, fill_columns, low_rank_grad

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return torch.randn(rows, columns + 16, dtype=torch.float64).to(dtype)[:, :columns]


@pytest.mark.parametrize("rank", [8, 16, 48])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_columns_behind_a_tensor_are_its_product(dtype: torch.dtype, rank: int) -> None:
    x = strided(19, 200, dtype)
    # Rows of a wide buffer, or a transposed view of columns.
    projection = strided(rank, 200, dtype) if rank != 48 else strided(200, rank, dtype).t()
    extended = extend(x, projection)
    assert extended.stride(0) % 64 == 0
    assert extended.stride(1) == 1
    assert extended.dtype == dtype
    assert torch.equal(extended[:, :200], x)
    assert relative_error(extended[:, 200:], x.double() @ projection.double().T) < TOLERANCE[dtype]
    wider = torch.full((19, 200 + rank), torch.nan, dtype=dtype)
    wider[:, :200] = x
    fill_columns(wider, 200, projection)
    assert torch.equal(wider, extended)


def test_without_a_projection_nothing_is_appended() -> None:
    x = torch.randn(3, 5)
    assert extend(x, None) is x
    assert extend(x.t(), None).is_contiguous()
    fill_columns(x, 5, None)


@pytest.mark.parametrize("rank", [8, 48])
@pytest.mark.parametrize("shape", [(19, 200), (700, 130), (3, 33)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_low_rank_grad_is_the_product_in_fp32(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    p, q = strided(shape[0], rank, dtype), strided(*shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = p.double().T @ q.double()
    out = low_rank_grad(p, q)
    assert out.dtype == wide
    assert relative_error(out, expected) < TOLERANCE[wide]
    before = torch.randn(rank, shape[1], dtype=wide)
    summed = before.clone()
    assert low_rank_grad(p, q, summed) is summed
    assert relative_error(summed, before + expected) < TOLERANCE[wide]
    assert relative_error(low_rank_grad(q, p), expected.T) < TOLERANCE[wide]
