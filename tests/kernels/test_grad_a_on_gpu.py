"""The gradient of LoRA's A on a GPU at shapes of real models, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison, relative_error
from pairwise import pairwise
from torch import Tensor

from fourfold.kernels.grad_a import grad_a, grad_a_reference
from fourfold.kernels.low_rank import new_extended

pytestmark = pytest.mark.gpu


def operands(rows: int, width: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_low, x, rstd, norm); the first as columns beside a gradient, NaN around it."""
    like = torch.empty(0, dtype=dtype, device="cuda")
    extended = new_extended(like, rows, 64, rank + 8).fill_(torch.nan)
    grad_low = extended[:, 64 : 64 + rank].normal_()
    x = new_extended(like, rows, width, 16).fill_(torch.nan)[:, :width].normal_()
    return grad_low, x, torch.rand(rows, device="cuda") + 0.5, torch.randn(width, device="cuda").to(dtype)


def check(sums: Tensor, grad_low: Tensor, x: Tensor, rstd: Tensor | None, norm: Tensor | None) -> None:
    scaled = grad_low if rstd is None else (grad_low.float() * rstd[:, None]).to(x.dtype)
    exact = scaled.double().T @ x.double()
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    assert relative_error(sums, exact if norm is None else exact * norm.double()) < 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("dtype", "rows", "width", "rank", "is_normed"),
    pairwise(
        [torch.bfloat16, torch.float16, torch.float32],
        [8192, 4099, 2048, 300],
        [4096, 2300, 576],
        [16, 5, 32, 48, 64, 80],
        [True, False],
    ),
)
def test_the_operators_sums_equal_float64(
    dtype: torch.dtype, rows: int, width: int, rank: int, is_normed: bool
) -> None:
    grad_low, x, rstd, norm = operands(rows, width, rank, dtype)
    factors = (rstd, norm) if is_normed else (None, None)
    poison()
    sums = grad_a(grad_low, x, *factors)
    if is_normed and dtype == torch.float16:
        # In fp16 the operator multiplies x by rstd, the kernel grad_low.
        check(sums, grad_low, (x.float() * rstd[:, None]).half(), None, norm)
    else:
        check(sums, grad_low, x, *factors)
    assert torch.equal(grad_a(grad_low, x, *factors), sums)
    assert relative_error(grad_a(grad_low, x, *factors, sums), 2 * sums) < 1e-6


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "width", "rank"),
    pairwise(["WIDE", "NARROW", "SMALL"], [torch.bfloat16, torch.float16], [4096, 77, 1], [4096, 200], [16, 1, 33, 48]),
)
def test_each_tile_takes_any_rows(name: str, dtype: torch.dtype, rows: int, width: int, rank: int) -> None:
    from fourfold.kernels import grad_a_triton

    if name == "WIDE" and (torch.cuda.get_device_capability() != (9, 0) or rank > grad_a_triton.WIDE_RANK):
        pytest.skip("this tile needs compute capability 9.0, and at most 16 ranks")
    operand = operands(rows, width, rank, dtype)
    poison()
    sums = grad_a_triton.grad_a(*operand, tile=getattr(grad_a_triton, name))
    check(sums, *operand)


def test_rows_past_two_to_the_31_elements_are_addressed() -> None:
    width = 16384
    operand = operands((1 << 31) // width + 500, width, 16, torch.bfloat16)
    assert relative_error(grad_a(*operand), grad_a_reference(*operand)) < 1e-4
