"""The gradient of LoRA's A: the operator and its kernel against float64, and against the norm folded into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.grad_a import grad_a, grad_a_reference
from fourfold.kernels.norm import rms_norm

pytest.importorskip("triton")

from fourfold.kernels import grad_a_triton as kernels
from fourfold.kernels.shares_triton import Pass

# The product with rstd is rounded to the inputs' dtype.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows whose stride is larger than their length, NaN between them."""
    out = torch.full((rows, columns + 16), torch.nan, dtype=dtype)
    out[:, :columns] = torch.randn(rows, columns)
    return out[:, :columns]


@pytest.mark.parametrize(("rows", "width", "rank"), [(77, 256, 16), (130, 200, 5), (1, 128, 33), (300, 300, 64)])
@pytest.mark.parametrize(("block_m", "wide_first"), [(32, False), (64, True)])
def test_the_kernels_sums_equal_float64(rows: int, width: int, rank: int, block_m: int, wide_first: bool) -> None:
    # fp16: the interpreter's products of bf16 are wrong.
    x, grad_low = strided(rows, width, torch.float16), strided(rows, rank, torch.float16)
    tile = Pass(block_m, 128, 4, 3, programs=8, wide_first=wide_first)
    sums = kernels.grad_a(grad_low, x, tile=tile)
    exact = grad_low.double().T @ x.double()
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    assert relative_error(sums, exact) < 1e-6
    rstd, norm = torch.rand(rows) + 0.5, torch.randn(width).half()
    normed = kernels.grad_a(grad_low, x, rstd, norm, sums, tile)
    scaled = (grad_low.float() * rstd[:, None]).half().double()
    assert relative_error(normed, sums.double() + scaled.T @ x.double() * norm) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 16, 48, 130])
def test_a_norm_before_the_layer_is_folded_into_its_sums(dtype: torch.dtype, rank: int) -> None:
    rows, width = 60, 200
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad_low = strided(rows, width, dtype), strided(rows, rank, dtype)
    norm = torch.randn(width).to(dtype)
    rstd = rms_norm(x, norm, 1e-6)[1]
    sums = None
    for part in (slice(0, 13), slice(13, rows)):
        sums = grad_a(grad_low[part], x[part], rstd[part], norm, sums)
    assert sums is not None
    assert sums.dtype == wide
    normed = rms_norm(x.double(), norm.double(), 1e-6)[0]
    assert relative_error(sums, grad_low.double().T @ normed) < TOLERANCE[dtype]
    plain = grad_a(grad_low, x)
    assert relative_error(plain, grad_low.double().T @ x.double()) < TOLERANCE[wide]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "grad_size"), [(1e-3, 100.0), (0.02, 3000.0), (100.0, 1e-4)])
def test_tokens_far_from_one_in_size_leave_no_dtypes_range(dtype: torch.dtype, size: float, grad_size: float) -> None:
    x, grad_low = (torch.randn(60, 200) * size).to(dtype), (torch.randn(60, 16) * grad_size).to(dtype)
    norm = torch.ones(200, dtype=dtype)
    sums = grad_a(grad_low, x, rms_norm(x, norm, 1e-6)[1], norm)
    normed = rms_norm(x.double(), norm.double(), 1e-6)[0]
    assert relative_error(sums, grad_low.double().T @ normed) < TOLERANCE[dtype]


def test_what_was_summed_before_is_left_as_it_is() -> None:
    before = torch.randn(3, 8)
    kept = before.clone()
    grad_a_reference(torch.randn(5, 3), torch.randn(5, 8), before=before)
    assert torch.equal(before, kept)


def test_tiles_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert kernels.tile_for(16, device) is kernels.SMALL
    monkeypatch.setattr(kernels, "is_hopper", lambda _: True)
    assert kernels.tile_for(16, device) is kernels.WIDE
    assert kernels.tile_for(17, device) is kernels.NARROW


@pytest.mark.parametrize("is_normed", [False, True])
def test_the_operator_passes_opcheck(is_normed: bool) -> None:
    rest = (torch.rand(4), torch.randn(6), torch.randn(3, 6)) if is_normed else ()
    torch.library.opcheck(
        torch.ops.fourfold.grad_a.default,
        (torch.randn(4, 3), torch.randn(4, 6), *rest),
        test_utils=("test_schema", "test_faketensor"),
    )
