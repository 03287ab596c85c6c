"""An activation and its low-rank product beside it: the operator and its kernel against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fourfold.kernels.low_rank_beside import fill_low_rank_, low_rank_beside

pytest.importorskip("triton")

from fourfold.kernels import low_rank_beside_triton as kernels
from fourfold.kernels.launching import Tile

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}
SHAPES = [(77, 256, 16), (130, 200, 5), (1, 128, 33), (64, 64, 64)]


def operands(rows: int, width: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(activation, projection), both parts of larger tensors."""
    return torch.randn(rows, width + 8).to(dtype)[:, :width], torch.randn(rank, width + 3).to(dtype)[:, 3:]


def check(x: Tensor, projection: Tensor, extended: Tensor, low: Tensor) -> None:
    width = x.shape[1]
    product = x.double() @ projection.double().T
    assert torch.equal(extended[:, :width], x)
    assert torch.equal(extended[:, width:], low)
    assert low.is_contiguous()
    assert float((low.double() - product).norm() / product.norm()) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("tile", [Tile(16, 64, 4), Tile(64, 128, 4)])
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
def test_the_kernels_product_equals_float64(rows: int, width: int, rank: int, tile: Tile) -> None:
    # fp16: the interpreter's products of bf16 are wrong.
    x, projection = operands(rows, width, rank, torch.float16)
    memory = torch.full((rows, width + rank + 9), torch.nan, dtype=x.dtype)
    extended = memory[:, : width + rank]
    check(x, projection, extended, kernels.low_rank_beside(x, projection, extended, tile))
    extended[:, width:] = torch.nan
    low = kernels.low_rank_beside(extended[:, :width], projection, extended, tile, in_place=True)
    check(x, projection, extended, low)
    assert memory[:, width + rank :].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
def test_the_operator_keeps_the_product_twice(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    x, projection = operands(rows, width, rank, dtype)
    extended, low = low_rank_beside(x, projection)
    check(x, projection, extended, low)
    extended[:, width:] = torch.nan
    again = fill_low_rank_(extended, width, projection)
    check(x, projection, extended, again)
    assert torch.equal(again, low)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_product_alone_keeps_no_activation_alive(rows: int) -> None:
    _, low = low_rank_beside(*operands(rows, 24, 3, torch.float32))
    assert low.shape == (rows, 3)
    assert low.untyped_storage().nbytes() == low.nbytes


def test_a_trace_is_not_fixed_to_one_number_of_rows() -> None:
    traced = make_fx(low_rank_beside, tracing_mode="symbolic")(*operands(7, 24, 3, torch.float32))
    call = next(node for node in traced.graph.nodes if node.target == torch.ops.fourfold.low_rank_beside.default)
    assert all(isinstance(value.shape[0], torch.SymInt) for value in call.meta["val"])
    assert all(value.shape[0].node.expr.is_symbol for value in call.meta["val"])


def test_the_operators_are_registered_as_pytorch_asks() -> None:
    x, projection = operands(5, 24, 3, torch.float32)
    torch.library.opcheck(torch.ops.fourfold.low_rank_beside.default, (x, projection))
    extended = torch.randn(5, 27)
    torch.library.opcheck(torch.ops.fourfold.fill_low_rank_.default, (extended, 24, projection))
