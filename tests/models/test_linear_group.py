"""The extended weight of a group, however its linears are held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fourfold.models.linear_group import AdaptedLinear, Adapter, LinearGroup, LowRankSums
from fourfold.quantization.linear import QuantizedLinear

COLUMNS, ROWS, RANKS = 64, (24, 8, 8), (3, 0, 2)
GROUPS = {
    "nf4": ("nf4", "nf4", "nf4"),
    "one dense": ("nf4", None, "nf4"),
    "two formats": ("nf4", "nf4", "int8"),
    "dense": (None, None, None),
}


def linears(formats: tuple[str | None, ...]) -> list[AdaptedLinear]:
    torch.manual_seed(0)
    made = []
    for rows, rank, format in zip(ROWS, RANKS, formats, strict=True):
        dense = nn.Linear(COLUMNS, rows, bias=False)
        a, b = nn.Parameter(torch.randn(rank, COLUMNS)), nn.Parameter(torch.randn(rows, rank))
        base = dense if format is None else QuantizedLinear.from_linear(dense, format=format)
        made.append(AdaptedLinear(base, (Adapter(a, b, 0.5 + rows),) if rank else ()))
    return made


def dense_weight(linear: AdaptedLinear) -> Tensor:
    base = linear.base
    return base.quantized.dequantize() if isinstance(base, QuantizedLinear) else base.weight.detach()


@pytest.mark.parametrize("name", GROUPS)
def test_the_extended_weight_is_weights_adapters_and_zeros_in_their_places(name: str) -> None:
    group = LinearGroup(*linears(GROUPS[name]))
    weight = group.expand(torch.empty(0))
    assert torch.equal(weight.backward[: weight.rows], torch.cat([dense_weight(linear) for linear in group.linears]))
    assert weight.down is not None
    assert weight.up is not None
    expected_down, expected_up = torch.zeros(group.rank, COLUMNS), torch.zeros(group.rank, sum(ROWS))
    row = rank_row = 0
    for linear, rows in zip(group.linears, ROWS, strict=True):
        for adapter in linear.adapters:
            ranks = slice(rank_row, rank_row + adapter.rank)
            expected_down[ranks] = adapter.lora_a.detach()
            expected_up[ranks, row : row + rows] = (adapter.lora_b.detach() * adapter.scaling).T
            rank_row += adapter.rank
        row += rows
    assert torch.equal(weight.down, expected_down)
    assert torch.equal(weight.up, expected_up)


def test_rows_of_the_extended_weight_are_aligned_to_cache_lines() -> None:
    weight = LinearGroup(*linears(GROUPS["nf4"])).expand(torch.empty(0, dtype=torch.bfloat16))
    assert weight.data.shape == (40 + 16, COLUMNS + 16)
    assert weight.data.stride() == (128, 1)


def test_layers_of_a_group_begin_where_all_ranks_are_alike_and_none_is_padding() -> None:
    def begins(*ranks: int) -> tuple[int, ...]:
        made = []
        for rows, rank in zip(ROWS, ranks, strict=False):
            a, b = nn.Parameter(torch.randn(rank, COLUMNS)), nn.Parameter(torch.randn(rows, rank))
            made.append(AdaptedLinear(nn.Linear(COLUMNS, rows, bias=False), (Adapter(a, b, 1.0),) if rank else ()))
        return LinearGroup(*made).begins

    assert begins(16, 16, 16) == (24, 32)
    assert begins(8, 8) == (24,)
    assert begins(16) == ()
    assert begins(8, 8, 8) == ()
    assert begins(16, 0, 16) == ()
    assert begins(0, 0, 0) == (24, 32)


@pytest.mark.parametrize("trained", [True, False])
def test_a_gradient_gets_its_columns_whether_or_not_sums_are_wanted(trained: bool) -> None:
    group = LinearGroup(*linears(GROUPS["nf4"]))
    for parameter in group.parameters():
        parameter.requires_grad_(trained)
    weight = group.expand(torch.empty(0))
    grad_x, low = torch.randn(7, 40 + 16), torch.randn(7, 16)
    sums = LowRankSums(group)
    sums.pair(grad_x, weight, low)
    assert weight.up is not None
    torch.testing.assert_close(grad_x[:, 40:], grad_x[:, :40] @ weight.up.T)
    for own, ranks, rows in zip(sums.b, ((0, 3), (3, 3), (3, 5)), ((0, 24), (24, 32), (32, 40)), strict=True):
        expected = grad_x[:, slice(*rows)].T @ low[:, slice(*ranks)]
        assert own is None if not trained else torch.allclose(own, expected, atol=1e-5)


# Of each layer its adapters' ranks, and whose B is trained; the fused sums are the gradients in the first two.
ADAPTERS: list[tuple[tuple[tuple[int, ...], ...], tuple[bool, ...], bool]] = [
    (((16,), (16,), (16,)), (True, True, True), True),
    (((32,),), (True,), True),
    (((16,), (16,), (16,)), (True, False, True), False),
    (((16,), (10, 6), (16,)), (True, True, True), False),
    (((5, 11),), (True,), False),
    (((8,), (8,), (8,)), (True, True, True), False),
    (((8,), (), (3, 1)), (True, True, True), False),
]


@torch.no_grad()
@pytest.mark.parametrize(("ranks", "trained", "are_gradients"), ADAPTERS, ids=str)
def test_gradients_are_contiguous_and_equal_float64(
    ranks: tuple[tuple[int, ...], ...], trained: tuple[bool, ...], are_gradients: bool
) -> None:
    torch.manual_seed(0)
    made = []
    for rows, own, is_trained in zip(ROWS, ranks, trained, strict=False):
        adapters = []
        for index, rank in enumerate(own):
            a = nn.Parameter(torch.randn(rank, COLUMNS))
            b = nn.Parameter(torch.randn(rows, rank), requires_grad=is_trained)
            adapters.append(Adapter(a, b, 0.3 + rows + index))
        made.append(AdaptedLinear(nn.Linear(COLUMNS, rows, bias=False), tuple(adapters)))
    group = LinearGroup(*made)
    weight = group.expand(torch.empty(0))
    assert weight.down is not None
    x, norm = torch.randn(7, COLUMNS), torch.randn(COLUMNS)
    rstd = torch.rsqrt(x.square().mean(dim=1))
    normed = x.double() * rstd[:, None] * norm
    low = (normed @ weight.down.double().T).float()
    grad_x = torch.randn(7, weight.rows + group.rank)
    gradient = grad_x[:, : weight.rows].double()
    sums = LowRankSums(group, norm)
    sums.pair(grad_x, weight, low)
    sums.add_a(x[:3], grad_x[:3, weight.rows :], rstd[:3])
    sums.add_a(x[3:], grad_x[3:, weight.rows :], rstd[3:])
    assert sums.b_are_gradients == are_gradients
    grads = iter(sums.gradients())
    row = 0
    for linear, is_trained in zip(made, trained, strict=True):
        rows = linear.base.out_features
        own = gradient[:, row : row + rows]
        for adapter in linear.adapters:
            grad_a, grad_b = next(grads), next(grads)
            back = adapter.scaling * own @ adapter.lora_b.double()
            torch.testing.assert_close(grad_a, (back.T @ normed).float(), rtol=1e-4, atol=1e-2)
            # Of all adapters' gradients, and of nothing else.
            assert grad_a.untyped_storage().nbytes() == 4 * group.used_ranks * COLUMNS
            if is_trained:
                assert grad_b is not None
                assert grad_b.is_contiguous()
                forth = normed @ adapter.lora_a.double().T
                expected = adapter.scaling * own.T @ forth
                torch.testing.assert_close(grad_b, expected.float(), rtol=1e-4, atol=1e-2)
                wanted = rows * adapter.rank if not are_gradients else weight.rows * linear.rank
                assert grad_b.untyped_storage().nbytes() == 4 * wanted
            else:
                assert grad_b is None
        row += rows
    assert next(grads, None) is None
