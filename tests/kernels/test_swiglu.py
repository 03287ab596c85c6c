"""The gated activation: the reference against Transformers and autograd, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from fourfold.kernels import swiglu

pytest.importorskip("triton")

from fourfold.kernels import swiglu_triton

# The interpreter cuts fp32 off to bf16 where a GPU rounds it, twice on the way.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return torch.randn(rows, columns + 16, dtype=torch.float64).to(dtype)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("activation", "hidden_act"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_reference_equals_transformers(dtype: torch.dtype, activation: str, hidden_act: str) -> None:
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2, hidden_act=hidden_act)
    mlp = LlamaMLP(config).to(dtype)
    x = torch.randn(9, 24, dtype=dtype)
    gate_up = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=1).detach()
    out = mlp.down_proj(swiglu.swiglu(gate_up, None, activation))
    exact = dtype == torch.bfloat16
    torch.testing.assert_close(out, mlp(x), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
def test_reference_gradient_equals_autograd(activation: str) -> None:
    rows, width = 5, 24
    gate_up = torch.randn(rows, 2 * width, dtype=torch.float64, requires_grad=True)
    grad, projection = torch.randn(rows, width).double(), torch.randn(32, 2 * width).double()
    y = swiglu.swiglu_reference(gate_up, None, activation)
    y.backward(grad)
    extended = torch.cat([gate_up.detach(), torch.full((rows, 32), torch.nan)], dim=1)
    swiglu.swiglu_backward_(extended, grad, projection, activation)
    torch.testing.assert_close(grad, y.detach())
    torch.testing.assert_close(extended[:, : 2 * width], gate_up.grad)
    torch.testing.assert_close(extended[:, 2 * width :], gate_up.grad @ projection.T)


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("shape", [(19, 200), (35, 600), (3, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_reference(shape: tuple[int, int], rank: int, dtype: torch.dtype, activation: str) -> None:
    rows, width = shape
    gate_up = strided(rows, 2 * width, dtype)
    projection = (strided(rank, width, dtype) if rank != 48 else strided(width, rank, dtype).t()) if rank else None
    out = swiglu_triton.swiglu(gate_up, projection, activation)
    expected = swiglu.swiglu_reference(gate_up, projection, activation)
    assert out.shape == expected.shape
    assert relative_error(out[:, :width], expected[:, :width]) < TOLERANCE[dtype]
    if rank:
        assert relative_error(out[:, width:], expected[:, width:]) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("shape", [(19, 200), (35, 600), (3, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_kernel_equals_reference(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, activation: str
) -> None:
    rows, width = shape
    extended, grad = strided(rows, 2 * width + rank, dtype), strided(rows, width, dtype)
    extended[:, 2 * width :] = torch.nan
    projection = strided(2 * width, rank, dtype).t() if rank else None
    expected, expected_grad = extended.clone(), grad.clone()
    swiglu.swiglu_backward_reference_(expected, expected_grad, projection, activation)
    swiglu_triton.swiglu_backward_(extended, grad, projection, activation)
    assert relative_error(grad, expected_grad) < TOLERANCE[dtype]
    assert relative_error(extended[:, : 2 * width], expected[:, : 2 * width]) < TOLERANCE[dtype]
    if rank:
        assert relative_error(extended[:, 2 * width :], expected[:, 2 * width :]) < TOLERANCE[dtype]


def test_operators_pass_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    gate_up, projection = torch.randn(4, 64), torch.randn(16, 32)
    torch.library.opcheck(torch.ops.fourfold.swiglu.default, (gate_up, projection), test_utils=checks)
    arguments = (torch.randn(4, 80), torch.randn(4, 32), torch.randn(16, 64))
    torch.library.opcheck(torch.ops.fourfold.swiglu_backward_.default, arguments, test_utils=checks)
