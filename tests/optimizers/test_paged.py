"""Paged state through the optimizers' own interface; the pages themselves in tests/kernels/test_optimizer.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fourfold.errors import ConfigError
from fourfold.optimizers import AdamW, Lion
from fourfold.optimizers.moments import MomentOptimizer

SHAPES = [(16, 512), (3, 1111), (33,), (64, 100)]
RULES = [AdamW, Lion]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: MomentOptimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = param.detach() + torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident_bytes", [0, 20_000, None])
@pytest.mark.parametrize("rule", RULES)
def test_20_paged_steps_are_the_resident_ones_bit_for_bit(
    rule: type[Any], resident_bytes: int | None, dtype: torch.dtype, bits: int
) -> None:
    ours, wanted = parameters(dtype), parameters(dtype)
    options = {"lr": 1e-2, "state_bits": bits, "max_grad_norm": 1.0}
    paged = rule(ours, **options, placement="paged", resident_bytes=resident_bytes, page_bytes=1)
    resident = rule(wanted, **options)
    for optimizer, params in ((paged, ours), (resident, wanted)):
        train(optimizer, params, range(20))
    assert all(torch.equal(param, other) for param, other in zip(ours, wanted, strict=True))
    saved, other = paged.state_dict()["state"], resident.state_dict()["state"]
    for number, state in other.items():
        assert saved[number].keys() == state.keys()
        assert all(torch.equal(saved[number][name], value) for name, value in state.items())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("first", "second"), [("paged", "resident"), ("resident", "paged")])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_in_the_other_placement(rule: type[Any], first: str, second: str, bits: int) -> None:
    ours, wanted = parameters(), parameters()
    whole = rule(wanted, state_bits=bits)
    train(whole, wanted, range(8))
    before = rule(ours, state_bits=bits, placement=first, page_bytes=1)
    train(before, ours, range(4))
    after = rule(ours, state_bits=bits, placement=second, page_bytes=1)
    after.load_state_dict(before.state_dict())
    train(after, ours, range(4, 8))
    assert all(torch.equal(param, other) for param, other in zip(ours, wanted, strict=True))


def test_what_stays_resident_is_whole_parameters_within_the_bytes_given() -> None:
    optimizer = AdamW(parameters(), placement="paged", resident_bytes=70_000)
    train(optimizer, optimizer.param_groups[0]["params"], range(1))
    flat = optimizer._flat()
    resident = sum(values.nbytes for kind, (each, _) in flat.moments.items() if not kind.paged for values in each)
    assert 0 < resident <= 70_000
    assert {kind.paged for kind in flat.kinds} == {True, False}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
def test_step_that_is_not_finite_changes_nothing_on_any_page(rule: type[Any], bits: int) -> None:
    params = parameters()
    optimizer = rule(params, state_bits=bits, placement="paged", page_bytes=1)
    train(optimizer, params, range(2))
    before = [param.detach().clone() for param in params]
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    params[3].grad.view(-1)[-1] = float("nan")
    optimizer.step()
    for param, was, state in zip(params, before, states, strict=True):
        assert torch.equal(param, was)
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in state.items())


@pytest.mark.parametrize("keys", [{"placement": "disk"}, {"resident_bytes": -1}, {"page_bytes": 0}])
def test_bad_placements_are_refused_by_name(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        AdamW(parameters(), **keys)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="state_bit"):
        AdamW(parameters(), state_bit=8)
