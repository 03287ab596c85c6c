"""Lion and Adafactor on a GPU; AdamW in test_adamw_on_gpu.py, paged state in test_paged_on_gpu.py."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
import transformers.optimization
from torch import Tensor, nn

from fourfold.kernels.optimizer import optimizer_step_reference
from fourfold.kernels.optimizer_state import Hyperparameters
from fourfold.optimizers import Adafactor, Lion

pytestmark = pytest.mark.gpu

SHAPES = [(16, 4096), (1024, 16), (3, 2111), (33,), (16, 100)]
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.5}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for param in params:
        noise = torch.randn(param.shape, generator=generator, device="cuda")
        param.grad = (param.detach().float() + noise).to(param.dtype)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    ours, theirs = (torch.cat([each.detach().double().flatten() for each in tensors]) for tensors in (found, wanted))
    return float((ours - theirs).norm() / theirs.norm())


def share_apart(found: list[nn.Parameter], wanted: list[nn.Parameter]) -> float:
    """Of all elements; a direction within a rounding of 0 may go either way, which is two steps of 1e-3."""
    pairs = zip(found, wanted, strict=True)
    return float(torch.cat([((a - b).abs() > 1e-3).float().flatten() for a, b in pairs]).mean())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lions_kernel_equals_the_reference(dtype: torch.dtype, bits: int) -> None:
    ours, wanted = parameters(dtype), parameters(dtype)
    optimizer, other = (Lion(params, **SETTINGS, state_bits=bits, max_grad_norm=10.0) for params in (ours, wanted))
    for step in range(5):
        give_gradients(ours, step)
        optimizer.step()
        give_gradients(wanted, step)
        flat = other._flat()
        with torch.no_grad():
            groups = [Hyperparameters(1e-3, 0.9, 0.99, 0.0, 0.5)]
            optimizer_step_reference(flat, [param.grad for param in flat.params], groups, 10.0, None)
    assert distance([optimizer.grad_norm], [other.grad_norm]) < 1e-6
    assert share_apart(ours, wanted) < 2e-3
    for param, before in zip(ours, wanted, strict=True):
        for name, value in optimizer.state[param].items():
            expected = other.state[before][name]
            if value.dtype == torch.uint8:
                assert (value != expected).float().mean() < 0.02
            elif dtype == torch.float32:
                assert distance([value], [expected]) < 1e-3


def test_lions_8_bit_numbers_are_those_of_bitsandbytes_step_by_step() -> None:
    ours, wanted = parameters(), parameters()
    optimizer, theirs = Lion(ours, **SETTINGS, state_bits=8), bitsandbytes.optim.Lion8bit(wanted, **SETTINGS)
    for step in range(10):
        give_gradients(wanted, step)
        for param, other in zip(ours, wanted, strict=True):
            param.grad = other.grad.clone()
        optimizer.step()
        theirs.step()
        assert share_apart(ours, wanted) < 1e-3
        for param, other in zip(ours, wanted, strict=True):
            state, want = optimizer.state[param], theirs.state[other]
            names = {"state1": "state1", "absmax1": "absmax1"} if "state1" in state else {"exp_avg": "state1"}
            for name, its in names.items():
                if state[name].dtype == torch.uint8:
                    assert (state[name] != want[its]).float().mean() < 0.05
                else:
                    torch.testing.assert_close(state[name], want[its].view_as(state[name]), rtol=1e-4, atol=1e-6)
                state[name].copy_(want[its].view_as(state[name]))
            param.data.copy_(other.data)


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_20_steps_of_adafactor_are_those_of_transformers(scale_parameter: bool) -> None:
    ours, wanted, start = parameters(), parameters(), parameters()
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "scale_parameter": scale_parameter}
    optimizer = Adafactor(ours, **settings, max_grad_norm=5.0)
    theirs = transformers.optimization.Adafactor(wanted, **settings, relative_step=False)
    for step in range(20):
        give_gradients(ours, step)
        optimizer.step()
        give_gradients(wanted, step)
        nn.utils.clip_grad_norm_(wanted, 5.0)
        theirs.step()
    moved = [[p - before for p, before in zip(params, start, strict=True)] for params in (ours, wanted)]
    assert distance(*moved) < 1e-4


@pytest.mark.parametrize("make", [Lion, Adafactor])
@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_nothing_in_a_step_waits_and_a_bad_one_changes_nothing(make: type[Any], loss: float) -> None:
    params = parameters()
    optimizer = make(params, **SETTINGS, max_grad_norm=1.0)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    give_gradients(params, 2)
    optimizer.watched_loss = torch.tensor(loss, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = [torch.equal(param, was) for param, was in zip(params, before, strict=True)]
    assert all(same) if loss != 1.0 else not any(same)
    if loss != 1.0:
        for param, state in zip(params, states, strict=True):
            assert all(torch.equal(optimizer.state[param][name], value) for name, value in state.items())
