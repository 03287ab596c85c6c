"""Low-rank products: the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels import low_rank

pytest.importorskip("triton")

from fourfold.kernels import low_rank_triton
from fourfold.kernels.launching import cdiv, splits_for

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return torch.randn(rows, columns + 16, dtype=torch.float64).to(dtype)[:, :columns]


@pytest.mark.parametrize("rank", [8, 16, 48, 64])
@pytest.mark.parametrize("shape", [(19, 200), (70, 1100), (3, 33)])
# bf16 stands in the tests for a GPU: the interpreter multiplies the bits of bf16 matrices as integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_project_is_the_product(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    x = strided(*shape, dtype)
    a = strided(rank, shape[1], dtype) if rank != 48 else strided(shape[1], rank, dtype).t()
    expected = x.double() @ a.double().T
    for out in (low_rank_triton.project(x, a), low_rank.project(x, a)):
        assert out.dtype == dtype
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("rank", [8, 16, 48, 64])
@pytest.mark.parametrize("shape", [(19, 200), (700, 130), (3, 33)])
# bf16 stands in the tests for a GPU: the interpreter multiplies the bits of bf16 matrices as integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_rank_grad_is_the_product_in_fp32(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    p, q = strided(shape[0], rank, dtype), strided(*shape, dtype)
    expected = p.double().T @ q.double()
    before = torch.randn(rank, shape[1])
    for function in (low_rank_triton.low_rank_grad, low_rank.low_rank_grad):
        out = function(p, q)
        assert out.dtype == torch.float32
        assert relative_error(out, expected) < 1e-6
        summed = before.clone()
        assert function(p, q, summed) is summed
        assert relative_error(summed, expected + before) < 1e-6


def test_references_keep_float64() -> None:
    x, a = torch.randn(5, 24).double(), torch.randn(3, 24).double()
    torch.testing.assert_close(low_rank.project(x, a), x @ a.T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(low_rank.low_rank_grad(x, x), x.T @ x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("num_tiles", [1, 32, 128, 512, 1000])
@pytest.mark.parametrize("num_blocks", [1, 3, 7, 112, 113])
def test_splits_cover_every_block_once(num_tiles: int, num_blocks: int) -> None:
    splits, blocks = splits_for(num_tiles, num_blocks)
    assert splits == cdiv(num_blocks, blocks)
    assert (splits - 1) * blocks < num_blocks <= splits * blocks


def test_operators_pass_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    p, q = torch.randn(4, 16), torch.randn(4, 32)
    torch.library.opcheck(torch.ops.fourfold.project.default, (q, torch.randn(16, 32)), test_utils=checks)
    torch.library.opcheck(torch.ops.fourfold.low_rank_grad.default, (p, q), test_utils=checks)
    torch.library.opcheck(torch.ops.fourfold.low_rank_grad_.default, (torch.zeros(16, 32), p, q), test_utils=checks)
