"""The sums of a group's adapters on a GPU, at sizes at which a kernel makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fourfold.kernels.low_rank import new_extended
from fourfold.models.linear_group import AdaptedLinear, Adapter, LinearGroup, LowRankSums

pytestmark = pytest.mark.gpu


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 8, 8), (16, 0, 16), (32, 32, 32), (16, 8, 3)], ids=str)
def test_the_gradients_and_the_columns_beside_the_outputs_gradient_equal_float64(ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tokens, columns, dtype = 4099, 1024, torch.bfloat16
    linears = []
    for rows, rank in zip((2048, 512, 512), ranks, strict=True):
        a, b = (nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((rank, columns), (rows, rank)))
        base = nn.Linear(columns, rows, bias=False, device="cuda", dtype=dtype)
        linears.append(AdaptedLinear(base, (Adapter(a, b, 0.3),) if rank else ()))
    group = LinearGroup(*linears)
    weight = group.expand(torch.empty(0, dtype=dtype, device="cuda"))
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
    assert weight.up is not None
    assert weight.down is not None
    low = x @ weight.down.T
    grad_x = new_extended(x, tokens, weight.rows, group.rank).normal_()
    grad_x[:, weight.rows :] = torch.nan
    sums = LowRankSums(group)
    sums.pair(grad_x, weight, low)
    gradient = grad_x[:, : weight.rows].double()
    assert relative_error(grad_x[:, weight.rows :], gradient @ weight.up.double().T) < 4e-3
    sums.add_a(x, grad_x[:, weight.rows :])
    grads = iter(sums.gradients())
    row = rank_row = 0
    for linear in linears:
        rows = linear.base.out_features
        for adapter in linear.adapters:
            grad_a, grad_b = next(grads), next(grads)
            ranks = slice(rank_row, rank_row + adapter.rank)
            assert grad_a is not None
            assert grad_b is not None
            assert grad_b.is_contiguous()
            expected = adapter.scaling * gradient[:, row : row + rows].T @ low[:, ranks].double()
            assert relative_error(grad_b, expected) < 1e-5
            assert relative_error(grad_a, grad_x[:, weight.rows :][:, ranks].double().T @ x.double()) < 1e-5
            rank_row += adapter.rank
        row += rows
