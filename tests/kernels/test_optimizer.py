"""The Triton kernels, interpreted, against the PyTorch reference; the reference itself in tests/optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourfold.kernels.optimizer import optimizer_step_reference
from fourfold.kernels.optimizer_state import MOMENTS, Entry, Hyperparameters, OptimizerState, lay_out
from fourfold.optimizers.maps import state_maps

pytest.importorskip("triton", reason="Triton is for Linux")
if torch.cuda.is_available():
    pytest.skip("compiled kernels are tested in tests/optimizers/test_adamw_on_gpu.py", allow_module_level=True)

from nearest_codes import nearest_codes, thresholds, wanted_codes

from fourfold.kernels.optimizer_triton import FINISH_BLOCK, ROW, finish_kernel, optimizer_step_triton

GROUPS = [Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.1), Hyperparameters(3e-3, 0.8, 0.95, 1e-6, 0.0)]
# Whole chunks, a short last block, less than a block, and one that never gets a gradient.
SHAPES = [(16, 256), (3, 1111), (5,), (2100,)]
# Triton's interpreter cuts to bf16 where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


def made(
    dtype: torch.dtype, bits: int, rule: str = "adamw", paged: tuple[bool, ...] = (False,) * 4, page_bytes: int = 0
) -> OptimizerState:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    entries = [Entry(p, i % 2, bits if p.numel() >= 256 else 32, paged[i]) for i, p in enumerate(params)]
    return lay_out(entries, state_maps(torch.device("cpu")), rule, page_bytes)


def gradients(state: OptimizerState, step: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(100 + step)
    grads: list[Tensor | None] = [
        (torch.randn(p.shape, generator=generator) * 10 ** (-index)).to(p.dtype) for index, p in enumerate(state.params)
    ]
    missing = next(index for index, param in enumerate(state.params) if param.shape == (2100,))
    grads[missing] = None
    return grads


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", MOMENTS)
def test_kernels_equal_the_reference(rule: str, dtype: torch.dtype, bits: int) -> None:
    ours, wanted = made(dtype, bits, rule), made(dtype, bits, rule)
    for step in range(3):
        for state, run in ((ours, optimizer_step_triton), (wanted, optimizer_step_reference)):
            run(state, gradients(state, step), GROUPS, 1.0, torch.tensor(0.5))
        assert distance(ours.norm, wanted.norm) < 1e-6
        assert distance(ours.scale, wanted.scale) < 1e-6
    assert torch.equal(ours.steps, wanted.steps)
    assert sorted(ours.steps.tolist()) == [0.0, 3.0, 3.0, 3.0]
    for index, param in enumerate(ours.params):
        assert distance(param, wanted.params[index]) < TOLERANCE[dtype]
        for name, view in ours.views(index).items():
            want = wanted.views(index)[name]
            if view.dtype == torch.uint8:
                assert (view != want).float().mean() < 1e-2
            else:
                assert distance(view, want) < 2e-6


@pytest.mark.parametrize("page_bytes", [0, 40_000, 1 << 20])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("paged", [(True,) * 4, (False, True, True, False)])
@pytest.mark.parametrize("rule", MOMENTS)
def test_paged_numbers_are_the_resident_ones_bit_for_bit(
    rule: str, paged: tuple[bool, ...], bits: int, page_bytes: int
) -> None:
    """Pages of one chunk, which split parameters; of some; and one for all."""
    paged_state, resident = made(torch.float32, bits, rule, paged, page_bytes), made(torch.float32, bits, rule)
    assert paged_state.pager is not None
    for step in range(3):
        for slot in paged_state.pager.slots:
            slot.memory.fill_(255)  # NaN
        for state in (resident, paged_state):
            optimizer_step_triton(state, gradients(state, step), GROUPS, 1.0, None)
    assert torch.equal(paged_state.norm, resident.norm)
    for index, param in enumerate(resident.params):
        assert torch.equal(paged_state.params[index], param)
        for name, view in resident.views(index).items():
            assert torch.equal(paged_state.views(index)[name], view)


def test_pages_cover_every_chunk_once_and_are_no_larger_than_asked() -> None:
    state = made(torch.float32, 8, paged=(True,) * 4, page_bytes=10_000)
    for pack in state.packs:
        chunks = [page.first_chunk + at for page in pack.pages for at in range(page.num_chunks)]
        assert chunks == list(range(pack.first_chunk, pack.first_chunk + pack.num_chunks))
        assert all(sum(part.nbytes for part in page.home) <= 10_000 for page in pack.pages)
    assert sum(len(pack.pages) for pack in state.packs) > len(state.packs)


def test_short_blocks_take_nothing_from_beyond_their_end_and_write_nothing_there() -> None:
    """Scales as well as codes, where a block's largest moment shrinks, is zero, or is a neighbour's."""
    sizes = [5, 300, 2048 + 7, 256, 2049]

    def fresh() -> OptimizerState:
        return lay_out([Entry(torch.ones(size), 0, 8) for size in sizes], state_maps(torch.device("cpu")))

    ours, wanted = fresh(), fresh()
    first = [torch.randn(size) for size in sizes]
    first[3].zero_()
    for grads in (first, [-4 * grad for grad in first], [*(grad * 1e-3 for grad in first[:4]), None]):
        for state, run in ((ours, optimizer_step_triton), (wanted, optimizer_step_reference)):
            run(state, grads, GROUPS, None, None)
        for index in range(len(sizes)):
            for name, view in ours.views(index).items():
                want = wanted.views(index)[name]
                if view.dtype == torch.uint8:
                    assert (view.int() - want.int()).abs().max() <= 1
                    assert (view != want).sum() <= 2
                else:
                    torch.testing.assert_close(view, want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("num_partials", [1, 4 * FINISH_BLOCK - 1, 12 * FINISH_BLOCK + 5])
def test_the_norm_is_of_all_chunks(num_partials: int) -> None:
    state = made(torch.float32, 8)
    count = len(state.params)
    partials, hyper = torch.rand(num_partials), torch.tensor(GROUPS, dtype=torch.float64)
    addresses, rows = torch.zeros(2 * count, dtype=torch.int64), torch.empty(count * ROW)
    finish_kernel[(1,)](
        *(partials, num_partials, None, math.inf, addresses, state.table, hyper, state.steps, rows),
        *(state.norm, state.scale, count, False, FINISH_BLOCK),
    )
    assert distance(state.norm, partials.double().sum().sqrt()) < 1e-6


def test_unaligned_tensors_are_updated_too() -> None:
    storage = torch.randn(4 * 256 + 1)
    aligned, unaligned = storage[1:].clone(), storage[1:]
    assert unaligned.data_ptr() % 16
    states = [lay_out([Entry(p, 0, 8)], state_maps(p.device)) for p in (aligned, unaligned)]
    grad = torch.randn(4 * 256)
    for state in states:
        optimizer_step_triton(state, [grad], GROUPS, None, None)
    assert torch.equal(aligned, unaligned)
    assert float(states[0].scale) == 1.0


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("bad", "loss"), [(math.nan, 0.5), (math.inf, 0.5), (None, math.nan), (None, -math.inf)])
@pytest.mark.parametrize("run", [optimizer_step_triton, optimizer_step_reference])
@pytest.mark.parametrize("rule", MOMENTS)
def test_step_that_is_not_finite_changes_nothing(rule: str, run, bad: float | None, loss: float, bits: int) -> None:
    state = made(torch.float32, bits, rule)
    run(state, gradients(state, 0), GROUPS, 1.0, None)
    before = [(p.clone(), {k: v.clone() for k, v in state.views(i).items()}) for i, p in enumerate(state.params)]
    grads = gradients(state, 1)
    if bad is not None:
        grads[0].view(-1)[-1] = bad
    run(state, grads, GROUPS, 1.0, torch.tensor(loss))
    assert state.scale == -1
    assert bool(state.norm.isfinite()) is (bad is None)
    for index, (param, views) in enumerate(before):
        assert torch.equal(state.params[index], param)
        assert all(torch.equal(state.views(index)[name], view) for name, view in views.items())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_on_both_sides_of_every_threshold_and_point(signed: bool) -> None:
    table = thresholds(torch.device("cpu"), signed)
    points = state_maps(torch.device("cpu"))[0 if signed else 1]
    # The 300 numbers of fp32 on each side; neighbours in fp32 are neighbours as integers.
    centres = torch.cat([table[:-1], points[points != 0]]).view(torch.int32)
    around = (centres[:, None] + torch.arange(-300, 301, dtype=torch.int32)).view(torch.float32).flatten()
    values = torch.cat([around, torch.linspace(-1, 1, 200_001), torch.logspace(-45, 0, 100_001), torch.zeros(1)])
    values = torch.cat([values, -values]).clamp(-1.0 if signed else 0.0, 1.0)
    assert torch.equal(nearest_codes(values, table, signed), wanted_codes(values, table))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_points_are_their_own(signed: bool) -> None:
    points = state_maps(torch.device("cpu"))[0 if signed else 1]
    codes = nearest_codes(points, thresholds(points.device, signed), signed)
    assert codes.tolist() == list(range(256))


def test_scale_of_one_ulp_too_much_keeps_the_extreme_codes() -> None:
    beyond = 1 + 2.0**-22
    for signed in (True, False):
        table = thresholds(torch.device("cpu"), signed)
        values = torch.tensor([-beyond if signed else 0.0, beyond])
        assert nearest_codes(values, table, signed).tolist() == [0, 255]


def test_code_of_zero_is_what_the_kernel_reads_beyond_the_end() -> None:
    assert [int((points == 0).nonzero()) for points in state_maps(torch.device("cpu"))] == [127, 0]
