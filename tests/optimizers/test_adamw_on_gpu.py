from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from fourfold.kernels.optimizer import optimizer_step_reference
from fourfold.kernels.optimizer_state import Hyperparameters
from fourfold.optimizers import AdamW

pytestmark = pytest.mark.gpu

# LoRA's, an odd one, one below a block, and one below the size that has 8-bit state.
SHAPES = [(16, 4096), (1024, 16), (3, 2111), (33,), (16, 100)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for param in params:
        noise = torch.randn(param.shape, generator=generator, device="cuda")
        dtype = torch.promote_types(param.dtype, torch.float32)
        param.grad = (param.detach().to(dtype) + noise).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, clip: float | None = None) -> None:
    for step in range(steps):
        give_gradients(params, step)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    difference = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(found, wanted, strict=True)])
    return float(difference.norm() / torch.cat([b.double().flatten() for b in wanted]).norm())


@pytest.mark.parametrize("clip", [None, 5.0])
def test_32_bit_numbers_are_no_further_from_float64_than_those_of_torch(clip: float | None) -> None:
    ours, theirs, exact = parameters(), parameters(), parameters(torch.float64)
    train(AdamW(ours, **SETTINGS, max_grad_norm=clip), ours, 100)
    train(torch.optim.AdamW(theirs, **SETTINGS, fused=True), theirs, 100, clip)
    train(torch.optim.AdamW(exact, **SETTINGS), exact, 100, clip)
    # Both multiply in orders of their own, so that one is nearer here and the other there.
    assert distance(ours, exact) < 1.5 * distance(theirs, exact)
    assert distance(ours, theirs) < 1e-5


def test_8_bit_numbers_are_those_of_bitsandbytes() -> None:
    ours, wanted, exact, start = parameters(), parameters(), parameters(), parameters()
    train(AdamW(ours, **SETTINGS, state_bits=8), ours, 100)
    train(bitsandbytes.optim.AdamW8bit(wanted, **SETTINGS), wanted, 100)
    train(torch.optim.AdamW(exact, **SETTINGS), exact, 100)

    def moved(params: list[nn.Parameter]) -> list[Tensor]:
        return [param.detach() - before for param, before in zip(params, start, strict=True)]

    cost = distance(moved(exact), moved(wanted))
    assert distance(moved(ours), moved(wanted)) < min(0.5 * cost, 1e-2)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_the_reference(dtype: torch.dtype, bits: int) -> None:
    ours, wanted = parameters(dtype), parameters(dtype)
    optimizer, other = (AdamW(params, **SETTINGS, state_bits=bits, max_grad_norm=10.0) for params in (ours, wanted))
    for step in range(5):
        give_gradients(ours, step)
        optimizer.step()
        give_gradients(wanted, step)
        flat = other._flat()
        with torch.no_grad():
            groups = [Hyperparameters(1e-2, 0.9, 0.99, 1e-8, 0.05)]
            optimizer_step_reference(flat, [param.grad for param in flat.params], groups, 10.0, None)
        for param, before in zip(ours, wanted, strict=True):
            torch.testing.assert_close(optimizer.state[param]["step"], other.state[before]["step"])
    assert distance([optimizer.grad_norm], [other.grad_norm]) < 1e-6
    assert distance(ours, wanted) < (1e-5 if dtype == torch.float32 else 2e-3)
    for param, before in zip(ours, wanted, strict=True):
        for name, value in optimizer.state[param].items():
            if value.dtype == torch.uint8:
                assert (value != other.state[before][name]).float().mean() < 0.02
            elif dtype == torch.float32:
                assert distance([value], [other.state[before][name]]) < 1e-3


def test_nothing_in_a_step_waits_for_the_device() -> None:
    params = parameters()
    optimizer = AdamW(params, **SETTINGS, state_bits=8, max_grad_norm=1.0)
    train(optimizer, params, 2)
    give_gradients(params, 2)
    optimizer.watched_loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_step_that_is_not_finite_changes_nothing(spoil: str, bits: int) -> None:
    params = parameters()
    optimizer = AdamW(params, **SETTINGS, state_bits=bits, max_grad_norm=1.0)
    train(optimizer, params, 2)
    before = [param.detach().clone() for param in params]
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    give_gradients(params, 2)
    if spoil == "gradient":
        params[2].grad.view(-1)[-1] = float("nan")
    optimizer.watched_loss = torch.tensor(float("inf") if spoil == "loss" else 1.0, device="cuda")
    optimizer.step()
    for param, was, state in zip(params, before, states, strict=True):
        assert torch.equal(param, was)
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in state.items())
    assert float(optimizer.grad_scale) == -1


def test_steps_are_the_same_bit_for_bit_each_time() -> None:
    first, second = parameters(), parameters()
    for params in (first, second):
        train(AdamW(params, **SETTINGS, state_bits=8, max_grad_norm=1.0), params, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
