"""x + low @ up in one pass."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.low_rank import add_low_rank, add_low_rank_reference
from fourfold.kernels.low_rank_triton import add_low_rank as add_low_rank_triton


def operands(dtype: torch.dtype, rank: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(77, 200 + rank, dtype=torch.float32).to(dtype).to(device)
    x, low = wide[:, :200], wide[:, 200:]
    up = torch.randn(200, rank, dtype=torch.float32).to(dtype).to(device).T
    return x, low, up


@pytest.mark.parametrize("rank", [1, 16, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_the_kernel_equals_float64(dtype: torch.dtype, rank: int) -> None:
    x, low, up = operands(dtype, rank)
    exact = x.double() + low.double() @ up.double()
    for result in (add_low_rank_triton(x, low, up), add_low_rank_reference(x, low, up)):
        assert result.is_contiguous()
        assert (result.double() - exact).norm() / exact.norm() < {torch.float32: 1e-6, torch.float16: 4e-4}[dtype]


def test_float64_stays_exact() -> None:
    x, low, up = (operand.double() for operand in operands(torch.float32, 4))
    torch.testing.assert_close(add_low_rank(x, low, up), x + low @ up)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16, 48, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_it_is_no_further_from_float64_than_the_reference(dtype: torch.dtype, rank: int) -> None:
    x, low, up = operands(dtype, rank, "cuda")
    exact = x.double() + low.double() @ up.double()
    errors = [
        float((result.double() - exact).norm() / exact.norm())
        for result in (add_low_rank(x, low, up), add_low_rank_reference(x, low, up))
    ]
    assert errors[0] <= errors[1] * 1.01 + 1e-7
