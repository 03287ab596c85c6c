from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from fourfold.optimizers import AdamW, Lion
from fourfold.optimizers.moments import MomentOptimizer

pytestmark = pytest.mark.gpu

# Odd ones too; with pages of one chunk, some are split over several.
SHAPES = [(16, 4096), (1024, 16), (3, 2111), (33,), (64, 2048)]
RULES = [AdamW, Lion]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.05, "max_grad_norm": 10.0}


def parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for param in params:
        noise = torch.randn(param.shape, generator=generator, device="cuda")
        param.grad = (param.detach().float() + noise).to(param.dtype)


def train(optimizer: MomentOptimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def poison(optimizer: MomentOptimizer) -> None:
    """NaN into the slots, after all that was in them has gone back."""
    flat = optimizer._flat()
    flat.settle()
    torch.cuda.synchronize()
    for slot in flat.pager.slots:
        slot.memory.fill_(255)
    torch.cuda.synchronize()


def assert_same(ours: MomentOptimizer, wanted: MomentOptimizer) -> None:
    for group, other in zip(ours.param_groups, wanted.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group["params"], other["params"], strict=True))
    saved, expected = ours.state_dict()["state"], wanted.state_dict()["state"]
    for number, state in expected.items():
        assert saved[number].keys() == state.keys()
        assert all(torch.equal(saved[number][name].cuda(), value.cuda()) for name, value in state.items())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_bytes", [1, 100_000, 1 << 26])
@pytest.mark.parametrize("resident_bytes", [0, 200_000])
@pytest.mark.parametrize("rule", RULES)
def test_paged_steps_are_the_resident_ones_bit_for_bit(
    rule: type[Any], resident_bytes: int, page_bytes: int, dtype: torch.dtype, bits: int
) -> None:
    ours, wanted = parameters(dtype), parameters(dtype)
    options = {**SETTINGS, "state_bits": bits}
    paged = rule(ours, **options, placement="paged", page_bytes=page_bytes, resident_bytes=resident_bytes)
    resident = rule(wanted, **options)
    for step in range(20):
        if step % 7 == 0:
            poison(paged)
        train(paged, ours, range(step, step + 1))
        train(resident, wanted, range(step, step + 1))
    assert_same(paged, resident)


@pytest.mark.parametrize("bits", [8, 32])
def test_many_large_pages_overlap_without_mixing(bits: int) -> None:
    """Copies that take longer than kernels: a slot taken too early, or brought too early, would show."""
    shapes = [(4096, 4096)] * 3 + [(1000, 4099)]
    ours, wanted = parameters(shapes=shapes), parameters(shapes=shapes)
    paged = AdamW(ours, **SETTINGS, state_bits=bits, placement="paged", page_bytes=1 << 23)
    resident = AdamW(wanted, **SETTINGS, state_bits=bits)
    for params in (ours, wanted):
        give_gradients(params, 0)
    for _ in range(10):  # nothing between the steps, so that each begins while pages of the one before go back
        paged.step()
        resident.step()
    assert_same(paged, resident)


def test_steps_in_another_stream_are_the_same() -> None:
    ours, wanted = parameters(), parameters()
    paged, resident = AdamW(ours, **SETTINGS, placement="paged", page_bytes=1), AdamW(wanted, **SETTINGS)
    stream = torch.cuda.Stream()
    for step in range(6):
        train(resident, wanted, range(step, step + 1))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if step % 2 else torch.cuda.current_stream()):
            train(paged, ours, range(step, step + 1))
        torch.cuda.synchronize()
    assert_same(paged, resident)


def test_nothing_in_a_paged_step_waits_for_the_device() -> None:
    params = parameters()
    optimizer = AdamW(params, **SETTINGS, state_bits=8, placement="paged", page_bytes=1)
    train(optimizer, params, range(2))
    give_gradients(params, 2)
    optimizer.watched_loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_step_that_is_not_finite_changes_nothing(spoil: str) -> None:
    params = parameters()
    optimizer = AdamW(params, **SETTINGS, placement="paged", page_bytes=1)
    train(optimizer, params, range(2))
    before = [param.detach().clone() for param in params]
    states = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer.state_dict()["state"].items()}
    poison(optimizer)
    give_gradients(params, 2)
    if spoil == "gradient":
        params[2].grad.view(-1)[-1] = float("nan")
    optimizer.watched_loss = torch.tensor(float("inf") if spoil == "loss" else 1.0, device="cuda")
    optimizer.step()
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[number][name]) for name, value in state.items())


@pytest.mark.parametrize(("first", "second"), [("paged", "resident"), ("resident", "paged"), ("paged", "paged")])
def test_a_run_goes_on_in_the_other_placement(first: str, second: str) -> None:
    ours, wanted = parameters(), parameters()
    whole = AdamW(wanted, **SETTINGS, state_bits=8)
    train(whole, wanted, range(8))
    before = AdamW(ours, **SETTINGS, state_bits=8, placement=first, page_bytes=1)
    train(before, ours, range(4))
    after = AdamW(ours, **SETTINGS, state_bits=8, placement=second, page_bytes=1)
    after.load_state_dict(before.state_dict())
    train(after, ours, range(4, 8))
    assert_same(after, whole)


def test_moments_are_pinned_on_the_host_and_take_three_pages_of_the_gpu() -> None:
    params = parameters(shapes=[(4096, 4096)])
    give_gradients(params, 0)
    optimizer = AdamW(params, **SETTINGS, placement="paged", page_bytes=1 << 22)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    moments = [value for name, value in optimizer.state[params[0]].items() if name != "step"]
    assert all(value.device.type == "cpu" and value.is_pinned() for value in moments)
    assert torch.cuda.memory_allocated() - before < 3 * (1 << 22) + (1 << 20)


def test_memory_is_let_go_while_pages_are_on_their_way() -> None:
    for _ in range(5):
        params = parameters(shapes=[(2048, 4096)])
        optimizer = AdamW(params, **SETTINGS, placement="paged", page_bytes=1 << 22)
        train(optimizer, params, range(2))
        del optimizer
        gc.collect()
    torch.cuda.synchronize()
    assert all(param.isfinite().all() for param in params)


def test_room_that_is_left_is_taken_when_asked_for() -> None:
    params = parameters()
    optimizer = AdamW(params, **SETTINGS, placement="paged", resident_bytes=None)
    train(optimizer, params, range(1))
    assert not any(kind.paged for kind in optimizer._flat().kinds)
