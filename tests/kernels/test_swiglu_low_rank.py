"""The kernels that multiply the gated activation as they compute it: against the reference, and float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fourfold.kernels import swiglu
from fourfold.kernels.low_rank import low_rank_grad

pytest.importorskip("triton")

from fourfold.kernels import swiglu_low_rank_triton as kernels

TILES = {"short": kernels.SHORT, "long": kernels.LONG, "many ranks": kernels.MANY_RANKS}
# fp16: the interpreter's products of bf16 are wrong.
TOLERANCE = 1e-3
# No powers of two.
SCALINGS = (0.3, 5.7)


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def strided(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Random rows whose stride is larger than their length."""
    return torch.randn(rows, columns + 16, dtype=torch.float64).to(dtype)[:, :columns]


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "rank"), [((19, 200), 16), ((35, 600), 33), ((3, 33), 1), ((2, 7200), 64)])
def test_the_product_beside_the_activation_equals_the_reference(
    shape: tuple[int, int], rank: int, activation: str
) -> None:
    rows, width = shape
    gate_up, projection = strided(rows, 2 * width), strided(rank, width)
    out = kernels.swiglu_product(gate_up, projection, activation)
    expected = swiglu.swiglu_reference(gate_up, projection, activation)
    assert (out.shape, out.stride()) == (expected.shape, expected.stride())
    assert relative_error(out[:, :width], expected[:, :width]) < TOLERANCE
    assert relative_error(out[:, width:], out[:, :width].double() @ projection.double().T) < TOLERANCE


def test_a_row_is_the_same_among_any_other_rows() -> None:
    gate_up, projection = strided(37, 2 * 7200), strided(16, 7200)
    out = kernels.swiglu_product(gate_up, projection)
    # The first rows of a tile, as alone: NumPy's product, which the interpreter takes, depends on a row's place in it.
    assert torch.equal(kernels.swiglu_product(gate_up[16:19], projection), out[16:19])


class Inputs(NamedTuple):
    """What is summed; gate_up_ext has room for as many columns as all ranks are."""

    gate_up_ext: Tensor
    grad: Tensor
    low: Tensor | None
    gate_rank: int
    grad_low: Tensor | None

    @classmethod
    def random(cls, rows: int, width: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
        gate, up, down = ranks
        gate_up_ext = strided(rows, 2 * width + sum(ranks), dtype)
        gate_up_ext[:, 2 * width :] = torch.nan
        low, grad_low = (strided(rows, rank, dtype) if rank else None for rank in (gate + up, down))
        return cls(gate_up_ext, strided(rows, width, dtype), low, gate, grad_low)

    def copy(self, dtype: torch.dtype) -> Inputs:
        low, grad_low = (None if each is None else each.to(dtype) for each in (self.low, self.grad_low))
        return Inputs(
            self.gate_up_ext.to(dtype, copy=True), self.grad.to(dtype, copy=True), low, self.gate_rank, grad_low
        )


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((19, 200), (16, 16, 16)), ((300, 70), (8, 3, 64)), ((390, 33), (0, 5, 0)), ((3, 130), (33, 0, 1))],
)
@pytest.mark.parametrize("tile", TILES)
def test_sums_and_gradients_equal_the_reference(
    tile: str, shape: tuple[int, int], ranks: tuple[int, int, int], activation: str
) -> None:
    width = shape[1]
    inputs = Inputs.random(*shape, ranks, torch.float16)
    projection = strided(sum(ranks), 2 * width)
    exact, again = inputs.copy(torch.float64), inputs.copy(torch.float16)
    exact_sums = torch.empty(sum(ranks) * width, dtype=torch.float64)
    swiglu.swiglu_backward_sums_reference_(*exact, exact_sums, False, projection.double(), activation, SCALINGS)
    sums = torch.full((sum(ranks) * width,), torch.nan)
    kernels.swiglu_backward_sums_(*inputs, sums, False, projection, activation, SCALINGS, TILES[tile])
    assert relative_error(inputs.gate_up_ext, exact.gate_up_ext) < TOLERANCE
    assert relative_error(sums, exact_sums) < TOLERANCE
    # They are the products, in fp32, of what was rounded.
    if exact.low is not None:
        gate_rank, gate_up = ranks[0], inputs.gate_up_ext[:, : 2 * width].double()
        products = gate_up.T @ exact.low
        own = torch.cat([SCALINGS[0] * products[:width, :gate_rank], SCALINGS[1] * products[width:, gate_rank:]], dim=1)
        of_gate, of_up, _ = swiglu.split_activation_sums(sums, width, *ranks)
        assert relative_error(torch.cat([of_gate, of_up], dim=1), own) < 2e-6
    # Added to what is there; the same in each run.
    kernels.swiglu_backward_sums_(*again, sums.mul_(2), True, projection, activation, SCALINGS, TILES[tile])
    assert torch.equal(again.gate_up_ext, inputs.gate_up_ext)
    assert relative_error(sums, 3 * exact_sums) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(16, 3, 5), (0, 4, 0), (2, 0, 7)])
def test_the_operator_sums_what_the_gradients_are(dtype: torch.dtype, ranks: tuple[int, int, int]) -> None:
    width = 40
    inputs = Inputs.random(11, width, ranks, dtype)
    plain, again = inputs.copy(dtype), inputs.copy(dtype)
    projection = strided(sum(ranks), 2 * width, dtype)
    swiglu.swiglu_backward_(plain.gate_up_ext, plain.grad, projection)
    gate = ranks[0]
    sums = swiglu.swiglu_backward_sums_(*inputs, projection, scalings=SCALINGS)
    assert torch.equal(inputs.gate_up_ext, plain.gate_up_ext)
    of_gate, of_up, of_down = swiglu.split_activation_sums(sums, width, *ranks)
    if inputs.low is not None:
        products = low_rank_grad(plain.gate_up_ext[:, : 2 * width], inputs.low)
        torch.testing.assert_close(of_gate, SCALINGS[0] * products[:width, :gate])
        torch.testing.assert_close(of_up, SCALINGS[1] * products[width:, gate:])
    if inputs.grad_low is not None:
        torch.testing.assert_close(of_down, low_rank_grad(inputs.grad_low, plain.grad))
    twice = sums.clone()
    assert swiglu.swiglu_backward_sums_(*again, projection, scalings=SCALINGS, out=twice) is twice
    torch.testing.assert_close(twice, 2 * sums)


def test_the_operator_passes_opcheck() -> None:
    low, sums, projection = torch.randn(4, 3), torch.randn(6 * 32), torch.randn(16, 64)
    inputs = (torch.randn(4, 80), torch.randn(4, 32), low, 2, low.clone())
    arguments = (*inputs, sums, True, projection, "silu", SCALINGS)
    torch.library.opcheck(
        torch.ops.fourfold.swiglu_backward_sums_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
