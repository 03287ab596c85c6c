"""Bias, head norms and rotary embedding: the reference against Transformers, the Triton kernels against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fourfold.kernels import rotary

pytest.importorskip("triton")

from fourfold.kernels import rotary_triton

# The interpreter cuts fp32 off to bf16 where a GPU rounds it, three times on the way through a norm and a rotation.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
POSITIONS, BATCH = 5, 3
ROWS = POSITIONS * BATCH


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return torch.randn(rows, columns + 16, dtype=torch.float64).to(dtype)[:, :columns]


def angles(rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = torch.outer(torch.arange(POSITIONS), 10.0 ** -torch.arange(0, 1, 2 / rotary_dim)).double()
    doubled = torch.cat([frequencies, frequencies], dim=1)
    return doubled.cos().to(dtype), doubled.sin().to(dtype)


def as_transformers(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], norms: tuple[Tensor, Tensor] | None, eps: float
) -> Tensor:
    """What Transformers' attention of Llama and Qwen3 does between the projections and the attention."""
    x = qkv.view(BATCH, POSITIONS, heads[0] + 2 * heads[1], -1)
    q, k, v = x.split([heads[0], heads[1], heads[1]], dim=2)
    if norms is not None:
        modules = [Qwen3RMSNorm(x.shape[-1], eps).to(qkv.dtype) for _ in norms]
        for module, weight in zip(modules, norms, strict=True):
            module.weight.data = weight
        q, k = modules[0](q), modules[1](k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None])
    return torch.cat([q.transpose(1, 2), k.transpose(1, 2), v], dim=2).reshape(qkv.shape)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_equals_transformers(dtype: torch.dtype, heads: tuple[int, int], with_norms: bool) -> None:
    qkv = torch.randn(ROWS, (heads[0] + 2 * heads[1]) * 16).to(dtype)
    cos, sin = angles(16, dtype)
    norms = (torch.randn(16).to(dtype), torch.randn(16).to(dtype)) if with_norms else None
    out = rotary.rotary(qkv, cos, sin, *heads, None, *(norms or (None, None)), 1e-6)
    expected = as_transformers(qkv, cos, sin, heads, norms, 1e-6)
    wide_norms = None if norms is None else (norms[0].double(), norms[1].double())
    exact = as_transformers(qkv.double(), cos.double(), sin.double(), heads, wide_norms, 1e-6)
    # Transformers rounds each product of the rotation, the reference their sum.
    assert relative_error(out, exact) <= max(relative_error(expected, exact), 1e-7)
    assert torch.equal(out[:, -heads[1] * 16 :], qkv[:, -heads[1] * 16 :])


CASES: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"norms": True, "bias": True},
    {"norms": True},
    {"rotary_dim": 0},
    {"rotary_dim": 0, "norms": True},
    {"rotary_dim": 12, "norms": True, "bias": True},
    {"head_dim": 40, "heads": (7, 1)},
    {"head_dim": 48, "heads": (10, 5), "rotary_dim": 24},
]


def make_case(
    dtype: torch.dtype,
    head_dim: int = 16,
    heads: tuple[int, int] = (4, 2),
    rotary_dim: int | None = None,
    bias: bool = False,
    norms: bool = False,
) -> tuple[Tensor, tuple[Any, ...]]:
    """qkv, and the arguments behind it."""
    width = (heads[0] + 2 * heads[1]) * head_dim
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    cos, sin = angles(rotary_dim, dtype) if rotary_dim else (None, None)
    weights = [torch.randn(head_dim, dtype=torch.float64).to(dtype) if norms else None for _ in range(2)]
    offset = torch.randn(width, dtype=torch.float64).to(dtype) if bias else None
    return strided(ROWS, width, dtype), (cos, sin, *heads, offset, *weights, 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_gradient_equals_autograd(case: dict[str, Any]) -> None:
    qkv, arguments = make_case(torch.float64, **case)
    leaf = qkv.clone().requires_grad_()
    grad = torch.randn_like(leaf)
    rotary.rotary_reference(leaf, *arguments).backward(grad)
    num_heads, num_kv_heads = arguments[2:4]
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    parts = grad.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)
    out = rotary.rotary_backward(*parts, qkv, *arguments, 16)
    assert leaf.grad is not None
    assert out.shape == (ROWS, qkv.shape[1] + 16)
    torch.testing.assert_close(out[:, :-16], leaf.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    qkv, arguments = make_case(dtype, **case)
    expected = rotary.rotary_reference(qkv, *arguments)
    assert relative_error(rotary_triton.rotary(qkv, *arguments), expected) < TOLERANCE[dtype]
    if not case.get("norms"):
        rotary_triton.rotary_(qkv, *arguments[:5])
        assert relative_error(qkv, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("room", [0, 48])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_kernel_equals_reference(case: dict[str, Any], dtype: torch.dtype, room: int) -> None:
    qkv, arguments = make_case(dtype, **case)
    num_heads, num_kv_heads = arguments[2:4]
    width = qkv.shape[1]
    head_dim = width // (num_heads + 2 * num_kv_heads)
    parts = [strided(ROWS, heads * head_dim, dtype) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    raw = qkv if case.get("norms") else None
    out = rotary_triton.rotary_backward(*parts, raw, *arguments, room)
    expected = rotary.rotary_backward_reference(*parts, raw, *arguments, room)
    assert (out.shape, out.stride()) == (expected.shape, expected.stride())
    assert relative_error(out[:, :width], expected[:, :width]) < TOLERANCE[dtype]


def test_infinite_values_pass_the_rotation_of_their_neighbours() -> None:
    qkv, arguments = make_case(torch.float32)
    qkv[0, -1] = torch.inf
    out = rotary_triton.rotary(qkv, *arguments)
    assert out.isnan().sum() == 0
    assert torch.equal(out[:, -32:], qkv[:, -32:])


def test_operators_pass_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    qkv, arguments = make_case(torch.float32, norms=True, bias=True)
    operators = torch.ops.fourfold
    torch.library.opcheck(operators.rotary.default, (qkv, *arguments), test_utils=checks)
    torch.library.opcheck(operators.rotary_.default, (qkv, *arguments[:5]), test_utils=checks)
    parts = qkv.split([64, 32, 32], dim=1)
    given = (*parts, qkv, *arguments, 16)
    torch.library.opcheck(operators.rotary_backward.default, given, test_utils=checks)
