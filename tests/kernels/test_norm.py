"""RMSNorm: the reference against Transformers and autograd, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fourfold.kernels import norm

pytest.importorskip("triton")

from fourfold.kernels import norm_triton

# The interpreter cuts fp32 off to bf16 where a GPU rounds it, twice on the way.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return torch.randn(rows, columns + 16, dtype=torch.float64).to(dtype)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_reference_equals_transformers(dtype: torch.dtype) -> None:
    x = torch.randn(7, 96, dtype=dtype)
    module = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(module.weight)
    y, _ = norm.rms_norm(x, module.weight.detach(), 1e-5)
    # Transformers computes in fp32 whatever the dtype, the reference in float64 where it is given that.
    assert relative_error(y, module(x)) <= (1e-6 if dtype == torch.float64 else 0)


def test_reference_gradient_equals_autograd() -> None:
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    weight, grad, residual = torch.randn(40).double(), torch.randn(5, 40).double(), torch.randn(5, 40).double()
    y = torch.nn.functional.rms_norm(x, (40,), weight, 1e-5)
    y.backward(grad)
    assert x.grad is not None
    out, rstd = norm.rms_norm(x.detach(), weight, 1e-5, 16)
    assert out.shape == (5, 56)
    torch.testing.assert_close(out[:, :40], y.detach())
    result = norm.rms_norm_backward(grad, x.detach(), weight, rstd, residual)
    torch.testing.assert_close(result, x.grad + residual)
    given = torch.full((5, 56), torch.nan, dtype=torch.float64)[:, :40]
    assert norm.rms_norm_backward(grad, x.detach(), weight, rstd, residual, given) is given
    assert torch.equal(given, result)


@pytest.mark.parametrize("room", [0, 48])
@pytest.mark.parametrize("shape", [(19, 200), (33, 33), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_reference(shape: tuple[int, int], room: int, dtype: torch.dtype) -> None:
    rows, width = shape
    x, grad, residual = (strided(rows, width, dtype) for _ in range(3))
    weight = torch.randn(width).to(dtype)
    out, rstd = norm_triton.rms_norm(x, weight, 1e-6, room)
    expected, expected_rstd = norm.rms_norm_reference(x, weight, 1e-6, room)
    torch.testing.assert_close(rstd, expected_rstd)
    assert out.shape == expected.shape == (rows, width + room)
    assert relative_error(out[:, :width], expected[:, :width]) < TOLERANCE[dtype]
    for residual_grad in (residual, None):
        # Among columns that are not the norm's to write.
        result, wanted = (torch.full((rows, width + 8), torch.nan, dtype=dtype) for _ in range(2))
        norm_triton.rms_norm_backward(grad, x, weight, rstd, residual_grad, result[:, :width])
        norm.rms_norm_backward_reference(grad, x, weight, rstd, residual_grad, wanted[:, :width])
        assert relative_error(result[:, :width], wanted[:, :width]) < TOLERANCE[dtype]
        assert result[:, width:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_a_sum_is_the_sum_and_its_norm(dtype: torch.dtype) -> None:
    x, y = strided(19, 200, dtype), strided(19, 200, dtype)
    weight = torch.randn(200).to(dtype)
    total = x + y
    expected, expected_rstd = norm.rms_norm(total, weight, 1e-6)
    again, copy = y.clone(), torch.full((19, 208), torch.nan, dtype=dtype)
    out, rstd = norm.add_rms_norm_(x, again, weight, 1e-6, 16, copy[:, :200])
    assert torch.equal(again, total)
    assert torch.equal(copy[:, :200], total)
    assert copy[:, 200:].isnan().all()
    assert torch.equal(out[:, :200], expected)
    for copied in (torch.full((19, 208), torch.nan, dtype=dtype)[:, :200], None):
        by_kernel = y.clone()
        out, rstd = norm_triton.rms_norm(by_kernel, weight, 1e-6, 16, addend=x, copy=copied)
        assert relative_error(by_kernel, total) < TOLERANCE[dtype]
        assert copied is None or torch.equal(copied, by_kernel)
        assert relative_error(out[:, :200], expected) < 2 * TOLERANCE[dtype]
        # The interpreter cuts sums to bf16 off where a GPU rounds them.
        torch.testing.assert_close(rstd, expected_rstd, rtol=5e-3 if dtype == torch.bfloat16 else 1e-3, atol=0)


def test_rows_that_no_kernel_holds_are_refused() -> None:
    assert norm._refusal(torch.empty(1, 16385)) == "no kernel takes rows of more than 16384 numbers"


@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm_", "rms_norm_backward"])
def test_operators_pass_opcheck(operator: str) -> None:
    x, weight = torch.randn(4, 32), torch.randn(32)
    arguments = (x, weight, 1e-6, 16)
    if operator == "rms_norm_backward":
        arguments = (x, x, weight, torch.rand(4), None, torch.empty(4, 32))
    if operator == "add_rms_norm_":
        arguments = (x, torch.randn(4, 32), weight, 1e-6, 16, torch.empty(4, 32))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fourfold, operator).default, arguments, test_utils=checks)
