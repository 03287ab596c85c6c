from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from fourfold.errors import ConfigError
from fourfold.optimizers import Lion
from fourfold.optimizers.maps import state_maps

SHAPES = [(16, 512), (3, 2111), (33,), (64, 100)]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.5}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(param.shape, generator=generator) + param.detach().float() for param in params]


def give(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.dtype)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("clip", [None, 5.0])
def test_32_bit_numbers_are_those_of_the_formula_in_float64(clip: float | None) -> None:
    ours = parameters()
    optimizer = Lion(ours, **SETTINGS, max_grad_norm=clip)
    exact = [param.detach().double() for param in ours]
    moments = [torch.zeros_like(param) for param in exact]
    for step in range(30):
        grads = gradients(ours, step)
        give(ours, grads)
        optimizer.step()
        norm = torch.cat([grad.double().flatten() for grad in grads]).norm()
        for param, moment, grad in zip(exact, moments, grads, strict=True):
            scaled = grad.double() * (1.0 if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0))
            param -= 1e-3 * 0.5 * param + 1e-3 * (0.9 * moment + 0.1 * scaled).sign()
            moment.mul_(0.99).add_(scaled, alpha=0.01)
    for param, wanted, moment in zip(ours, exact, moments, strict=True):
        assert set(optimizer.state[param]) == {"step", "exp_avg"}
        assert distance(optimizer.state[param]["exp_avg"], moment) < 1e-6
        # A direction within a rounding of 0 would be off by two steps; there is none.
        assert distance(param, wanted) < 1e-6


@pytest.mark.parametrize("bits", [8, 32])
def test_numbers_are_those_of_bitsandbytes_step_by_step(bits: int) -> None:
    """From one state: each step begins where theirs ended, so that near-ties do not grow apart."""
    ours, wanted = parameters(), parameters()
    optimizer = Lion(ours, **SETTINGS, state_bits=bits)
    theirs = (bitsandbytes.optim.Lion8bit if bits == 8 else bitsandbytes.optim.Lion)(wanted, **SETTINGS)
    for step in range(10):
        grads = gradients(wanted, step)
        give(ours, grads)
        give(wanted, grads)
        optimizer.step()
        theirs.step()
        for param, other in zip(ours, wanted, strict=True):
            state, want = optimizer.state[param], theirs.state[other]
            assert distance(param, other) < 1e-6
            if bits == 8 and param.numel() >= 4096:
                assert set(state) == {"step", "state1", "absmax1"}
                torch.testing.assert_close(state["absmax1"], want["absmax1"])
                # Its code on the CPU takes a neighbour of the nearest code now and then; ours does not.
                assert (state["state1"] != want["state1"]).float().mean() < 0.05
                points = state_maps(param.device).first
                assert distance(points[state["state1"].int()], points[want["state1"].int()]) < 5e-3
                state["state1"].copy_(want["state1"])
                state["absmax1"].copy_(want["absmax1"])
            else:
                torch.testing.assert_close(state["exp_avg"], want["state1"], rtol=1e-5, atol=1e-7)
            param.data.copy_(other.data)


def test_8_bit_steps_go_where_32_bit_ones_do() -> None:
    ours, exact = parameters(), parameters()
    for params, bits in ((ours, 8), (exact, 32)):
        optimizer = Lion(params, **SETTINGS, state_bits=bits)
        for step in range(30):
            give(params, gradients(params, step))
            optimizer.step()
    for param, wanted, start in zip(ours, exact, parameters(), strict=True):
        assert distance(param - start, wanted - start) < 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_32_bit_moments(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = Lion(params, **SETTINGS)
    give(params, gradients(params, 0))
    wanted = [param.detach().float() * (1 - 5e-4) - 1e-3 * param.grad.float().sign() for param in params]
    optimizer.step()
    for param, want in zip(params, wanted, strict=True):
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(param.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("keys", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0}])
def test_bad_settings_are_refused_by_name(keys: dict) -> None:
    with pytest.raises(ConfigError, match=f"Lion: {next(iter(keys))}"):
        Lion(parameters(), **keys)
