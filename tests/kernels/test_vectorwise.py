"""LLM.int8() against bitsandbytes' operators and fp64."""

from __future__ import annotations

import bitsandbytes  # noqa: F401  # registers the operators
import pytest
import torch
from torch import Tensor

from fourfold.kernels.vectorwise import (
    dequantize_rows,
    int8_product,
    matmul_vectorwise,
    outlier_columns,
    quantize_rows,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_outliers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Whole columns beyond the threshold, so that nothing in them decides a row's scale."""
    x = normal(rows, columns, dtype=dtype).clamp_(-4, 4)
    x[:, [1, columns - 2]] = x[:, [1, columns - 2]].sign() * 40
    return x


def distance(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 123), (64, 256), (1, 1)], ids=str)
def test_rows_are_quantized_and_dequantized_as_bitsandbytes_does_it(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    codes, absmax = quantize_rows(x)
    theirs, their_absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone())
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, their_absmax)
    dense = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(dequantize_rows(codes, absmax, torch.float32), dense, rtol=3e-7, atol=0)


def test_a_row_of_zeros_and_one_of_the_smallest_numbers_stay_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-40, -1e-45], [3e38, -3e38]])
    codes, absmax = quantize_rows(x)
    assert codes[0].tolist() == [0, 0]
    assert codes[2].tolist() == [127, -127]
    assert dequantize_rows(codes, absmax, torch.float32).isfinite().all()


def test_int8_products_are_exact() -> None:
    x, weight = (torch.randint(-127, 128, (rows, 577), dtype=torch.int8) for rows in (5, 123))
    assert torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_bitsandbytes_with_its_outlier_columns(dtype: torch.dtype) -> None:
    x, (codes, absmax) = with_outliers(33, 256, dtype), quantize_rows(normal(96, 256, seed=1))
    bias = normal(96, dtype=dtype, seed=2)
    their_codes, their_scales, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), 6.0)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, their_codes, codes, their_scales, absmax, columns, bias)
    assert outlier_columns(x, 6.0).tolist() == columns.tolist() == [1, 254]
    ours = matmul_vectorwise(x, codes, absmax, 6.0, bias)
    exact = x.double() @ dequantize_rows(codes, absmax, torch.float32).double().t() + bias.double()
    # Theirs rounds the int8 part before the outliers are added.
    assert distance(ours, theirs) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert distance(ours, exact) <= distance(theirs, exact) * 1.01


def test_outlier_columns_keep_the_error_of_the_others_small() -> None:
    x, (codes, absmax) = with_outliers(64, 512, torch.float32), quantize_rows(normal(128, 512, seed=1))
    exact = x.double() @ dequantize_rows(codes, absmax, torch.float32).double().t()
    kept, rounded = (distance(matmul_vectorwise(x, codes, absmax, threshold), exact) for threshold in (6.0, 0.0))
    assert kept < 0.005 < 3 * kept < rounded


def test_the_low_rank_product_is_summed_before_it_is_rounded() -> None:
    # Each is less than half a unit in the last place of what it is added to, and yet moves the mean.
    x, (codes, absmax) = normal(64, 64, dtype=torch.bfloat16), quantize_rows(normal(256, 64, seed=1))
    low, up = torch.ones(64, 1, dtype=torch.bfloat16), torch.full((256, 1), 1e-3, dtype=torch.bfloat16)
    base = matmul_vectorwise(x, codes, absmax, 6.0)
    moved = matmul_vectorwise(x, codes, absmax, 6.0, None, low, up).double() - base.double()
    assert moved.mean() == pytest.approx(1e-3, rel=0.2)
    wide = matmul_vectorwise(x.float(), codes, absmax, 6.0, None, low.float(), up.float())
    assert distance(matmul_vectorwise(x, codes, absmax, 6.0, None, low, up), wide) < 3e-3


def test_no_tokens_give_no_rows_and_numbers_that_are_not_finite_go_through() -> None:
    codes, absmax = quantize_rows(normal(8, 16))
    assert matmul_vectorwise(torch.empty(2, 0, 16), codes, absmax, 6.0).shape == (2, 0, 8)
    x = normal(3, 16)
    x[1, 2] = torch.nan
    assert matmul_vectorwise(x, codes, absmax, 6.0)[1].isnan().all()
