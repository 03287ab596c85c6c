"""The kernels of the fused block on a GPU, at shapes of real models, against the references in float64."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison, relative_error
from pairwise import pairwise
from torch import Tensor

from fourfold.kernels import low_rank, norm, rotary, swiglu

pytestmark = pytest.mark.gpu

# Results are rounded once or twice to a dtype: half its epsilon is the most that one rounding changes a number.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2048, 4096), (333, 576), (77, 2050), (5, 33)]
WIDE_SHAPES = [(2048, 14336), (333, 1536), (77, 2050), (5, 33)]
RANKS = [0, 16, 48, 96]


def strided(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return (torch.randn(rows, columns + 16, device="cuda") * scale).to(dtype)[:, :columns]


def projection_of(rank: int, width: int, dtype: torch.dtype) -> Tensor | None:
    """Rows of a wide buffer, or for a rank of 48 a transposed view of columns."""
    if rank == 0:
        return None
    scale = width**-0.5
    return strided(rank, width, dtype, scale) if rank != 48 else strided(width, rank, dtype, scale).t()


def check_extended(out: Tensor, exact: Tensor, width: int, dtype: torch.dtype) -> None:
    assert out.shape == exact.shape
    assert relative_error(out[:, :width], exact[:, :width]) < TOLERANCE[dtype]
    if out.shape[1] > width:
        assert relative_error(out[:, width:], exact[:, width:]) < max(2 * TOLERANCE[dtype], 1e-5)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    poison()


@pytest.mark.parametrize(("dtype", "shape", "rank"), pairwise(DTYPES, SHAPES, RANKS))
def test_norm(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    x, grad, residual = (strided(*shape, dtype) for _ in range(3))
    weight = torch.randn(shape[1], device="cuda").to(dtype)
    out, rstd = norm.rms_norm(x, weight, 1e-6, rank)
    _, exact_rstd = norm.rms_norm_reference(x.double(), weight.double(), 1e-6)
    assert relative_error(rstd, exact_rstd) < 1e-6
    assert out.shape == (shape[0], shape[1] + rank)
    normed = out[:, : shape[1]]
    assert relative_error(normed, norm.rms_norm_reference(x, weight, 1e-6)[0]) < TOLERANCE[dtype]
    for residual_grad in (residual, None):
        result = norm.rms_norm_backward(grad, x, weight, rstd, residual_grad)
        exact = norm.rms_norm_backward(*double(grad, x, weight, exact_rstd, residual_grad))  # type: ignore[arg-type]
        assert relative_error(result, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "shape", "rank", "activation"), pairwise(DTYPES, WIDE_SHAPES, RANKS, swiglu.ACTIVATIONS)
)
def test_swiglu(dtype: torch.dtype, shape: tuple[int, int], rank: int, activation: str) -> None:
    rows, width = shape
    gate_up = strided(rows, 2 * width, dtype)
    projection = projection_of(rank, width, dtype)
    out = swiglu.swiglu(gate_up, projection, activation)
    check_extended(out, swiglu.swiglu_reference(gate_up, projection, activation), width, dtype)


@pytest.mark.parametrize(
    ("dtype", "shape", "rank", "activation"), pairwise(DTYPES, WIDE_SHAPES, RANKS, swiglu.ACTIVATIONS)
)
def test_swiglu_backward(dtype: torch.dtype, shape: tuple[int, int], rank: int, activation: str) -> None:
    rows, width = shape
    extended, grad = strided(rows, 2 * width + rank, dtype), strided(rows, width, dtype)
    extended[:, 2 * width :] = torch.nan
    projection = projection_of(rank, 2 * width, dtype)
    exact, exact_grad = extended.double(), grad.double()
    swiglu.swiglu_backward_reference_(exact, exact_grad, *double(projection), activation)
    swiglu.swiglu_backward_(extended, grad, projection, activation)
    assert relative_error(grad, exact_grad) < 2 * TOLERANCE[dtype]
    check_extended(extended, exact, 2 * width, dtype)


@pytest.mark.parametrize(
    ("dtype", "shape", "ranks", "activation"),
    pairwise(
        DTYPES,
        [*WIDE_SHAPES, (4500, 1030)],
        [(16, 16, 16), (8, 3, 0), (0, 5, 20), (64, 0, 33), (0, 0, 16), (16, 96, 16)],
        swiglu.ACTIVATIONS,
    ),
)
def test_swiglu_backward_sums(
    dtype: torch.dtype, shape: tuple[int, int], ranks: tuple[int, int, int], activation: str
) -> None:
    (rows, width), (gate, up, down), scalings = shape, ranks, (0.3, 5.7)
    extended, grad = strided(rows, 2 * width + 16, dtype), strided(rows, width, dtype)
    extended[:, 2 * width :] = torch.nan
    low, grad_low = (strided(rows, rank, dtype) if rank else None for rank in (gate + up, down))
    projection = projection_of(16, 2 * width, dtype)
    exact, exact_y = extended.double(), grad.double()
    exact_sums = swiglu.swiglu_backward_sums_(
        exact, exact_y, *double(low), gate, *double(grad_low), *double(projection), activation, scalings
    )
    again = extended.clone(), grad.clone()
    sums = swiglu.swiglu_backward_sums_(extended, grad, low, gate, grad_low, projection, activation, scalings)
    assert sums.dtype == torch.float32
    check_extended(extended, exact, 2 * width, dtype)
    assert relative_error(sums, exact_sums) < max(2 * TOLERANCE[dtype], 1e-5)
    if low is not None:
        # They are the products of what was rounded, in fp32.
        products = extended[:, : 2 * width].double().T @ low.double()
        own = torch.cat([scalings[0] * products[:width, :gate], scalings[1] * products[width:, gate:]], dim=1)
        of_gate, of_up, _ = swiglu.split_activation_sums(sums, width, *ranks)
        assert relative_error(torch.cat([of_gate, of_up], dim=1), own) < 2e-5
    twice = sums.clone()
    swiglu.swiglu_backward_sums_(*again, low, gate, grad_low, projection, activation, scalings, out=twice)
    assert torch.equal(again[0], extended)
    assert relative_error(twice, 2 * exact_sums) < max(2 * TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_swiglu_of_a_token_is_the_same_among_any_others(rank: int) -> None:
    gate_up, projection = strided(2100, 2 * 14336, torch.bfloat16), projection_of(rank, 14336, torch.bfloat16)
    out = swiglu.swiglu(gate_up, projection)
    assert torch.equal(swiglu.swiglu(gate_up[:1050], projection), out[:1050])


@pytest.mark.parametrize(
    ("dtype", "layout", "norms", "room"),
    pairwise(
        DTYPES,
        [((32, 8), 128, 128), ((9, 3), 64, 64), ((7, 1), 40, 40), ((6, 2), 96, 48), ((4, 4), 64, 0)],
        [False, True],
        [0, 16, 48],
    ),
)
def test_rotary(dtype: torch.dtype, layout: tuple[tuple[int, int], int, int], norms: bool, room: int) -> None:
    heads, head_dim, rotary_dim = layout
    positions, rows = 333, 999
    width = (heads[0] + 2 * heads[1]) * head_dim
    qkv, bias = strided(rows, width, dtype), torch.randn(width, device="cuda").to(dtype)
    cos = sin = None
    if rotary_dim:
        turns = torch.outer(
            torch.arange(positions, device="cuda"), 1e4 ** -torch.arange(0, 1, 2 / rotary_dim, device="cuda")
        )
        cos, sin = (function(torch.cat([turns, turns], dim=1)).to(dtype) for function in (torch.cos, torch.sin))
    weights = [torch.randn(head_dim, device="cuda").to(dtype) if norms else None for _ in range(2)]
    arguments = (cos, sin, *heads, bias, *weights, 1e-6)
    expected = rotary.rotary_reference(qkv, *arguments)
    assert relative_error(rotary.rotary(qkv, *arguments), expected) < TOLERANCE[dtype]
    parts = [strided(rows, count * head_dim, dtype) for count in (heads[0], heads[1], heads[1])]
    out = rotary.rotary_backward(*parts, qkv if norms else None, *arguments, room)
    wide = (*double(cos, sin), *heads, *double(bias, *weights), 1e-6)
    exact = rotary.rotary_backward_reference(*double(*parts), qkv.double() if norms else None, *wide)  # type: ignore
    assert out.shape == (rows, width + room)
    assert relative_error(out[:, :width], exact) < TOLERANCE[dtype]
    if not norms:
        rotary.rotary_(qkv, cos, sin, *heads, bias)
        assert relative_error(qkv, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "shape", "rank"),
    pairwise(DTYPES, [(8192, 4096), (2048, 14336), (1000, 576), (77, 2056), (5, 40)], [8, 16, 48]),
)
def test_low_rank(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    x, p = strided(*shape, dtype), strided(shape[0], rank, dtype)
    projection = projection_of(rank, shape[1], dtype)
    check_extended(low_rank.extend(x, projection), low_rank.extend(x.double(), *double(projection)), shape[1], dtype)
    exact = p.double().T @ x.double()
    grad = low_rank.low_rank_grad(p, x)
    assert grad.dtype == torch.float32
    assert relative_error(grad, exact) < 1e-5
    assert torch.equal(low_rank.low_rank_grad(p, x), grad)
    assert relative_error(low_rank.low_rank_grad(x, p), exact.T) < 1e-5
    out = torch.randn_like(grad)
    before = out.clone()
    assert low_rank.low_rank_grad(p, x, out) is out
    assert relative_error(out, before + exact) < 1e-5


def test_rows_past_two_to_the_31_elements_are_addressed() -> None:
    rows, width = (1 << 31) // 28672 + 500, 28672
    gate_up = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    last = gate_up[-100:].clone()
    out = swiglu.swiglu(gate_up, projection_of(16, width // 2, torch.bfloat16))
    expected = swiglu.swiglu_reference(last)
    assert relative_error(out[-100:, : width // 2], expected) < TOLERANCE[torch.bfloat16]
