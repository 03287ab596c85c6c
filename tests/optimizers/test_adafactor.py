from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.optimization
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourfold.errors import CheckpointError, ConfigError
from fourfold.optimizers import Adafactor, AdamW

SHAPES = [(16, 512), (3, 1111), (33,), (4, 6, 10)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, clip: float | None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = param.detach() + torch.randn(param.shape, generator=generator).to(param.dtype)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    ours, theirs = (torch.cat([each.detach().double().flatten() for each in tensors]) for tensors in (found, wanted))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_20_steps_are_those_of_transformers(clip: float | None, scale_parameter: bool) -> None:
    ours, wanted, start = parameters(), parameters(), parameters()
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "scale_parameter": scale_parameter}
    optimizer = Adafactor(ours, **settings, max_grad_norm=clip)
    theirs = transformers.optimization.Adafactor(wanted, **settings, relative_step=False)
    train(optimizer, ours, range(20), None)
    train(theirs, wanted, range(20), clip)
    moved = [[p - before for p, before in zip(params, start, strict=True)] for params in (ours, wanted)]
    assert distance(*moved) < 1e-5
    for param, other in zip(ours, wanted, strict=True):
        state, want = optimizer.state[param], theirs.state[other]
        assert set(state) == set(want) - {"RMS"}
        for name in set(state) - {"step"}:
            torch.testing.assert_close(state[name], want[name], rtol=1e-5, atol=0)
        assert float(state["step"]) == want["step"]


def test_20_steps_are_those_of_torch() -> None:
    """Whose eps stands elsewhere, and whose lr is at most 1 / sqrt(t): neither matters here."""
    ours, wanted, start = parameters(), parameters(), parameters()
    train(Adafactor(ours, lr=1e-2, scale_parameter=True), ours, range(20), None)
    train(torch.optim.Adafactor(wanted, lr=1e-2), wanted, range(20), None)
    moved = [[p - before for p, before in zip(params, start, strict=True)] for params in (ours, wanted)]
    assert distance(*moved) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_32_bit_state(dtype: torch.dtype) -> None:
    ours, wanted = parameters(dtype), parameters(dtype)
    optimizer = Adafactor(ours, lr=1e-2)
    train(optimizer, ours, range(3), None)
    theirs = transformers.optimization.Adafactor(wanted, lr=1e-2, scale_parameter=False, relative_step=False)
    train(theirs, wanted, range(3), None)
    assert optimizer.state[ours[0]]["exp_avg_sq_row"].dtype == torch.float32
    assert distance(ours, wanted) < torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_step_that_is_not_finite_changes_nothing(spoil: str, at: int) -> None:
    params = parameters()
    optimizer = Adafactor(params, weight_decay=0.1, max_grad_norm=1.0)
    train(optimizer, params, range(at), None)
    optimizer.grad_norm  # noqa: B018  lays the state out
    before = [param.detach().clone() for param in params]
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    if spoil == "gradient":
        params[2].grad[3] = float("nan")
    else:
        optimizer.watched_loss = torch.tensor(float("inf"))
    optimizer.step()
    assert float(optimizer.grad_scale) == -1
    for param, was, state in zip(params, before, states, strict=True):
        assert torch.equal(param, was)
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in state.items())


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    optimizer = Adafactor(params, weight_decay=0.1)
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(params[0], parameters()[0])
    assert [float(optimizer.state[param]["step"]) for param in params] == [0, 1, 1, 1]


def test_state_round_trips_through_safetensors(tmp_path) -> None:
    first, second = parameters(), parameters()
    optimizer, other = Adafactor(first), Adafactor(second, lr=5.0)
    train(optimizer, first, range(3), None)
    saved = optimizer.state_dict()
    save_file({f"{i}.{k}": v for i, s in saved["state"].items() for k, v in s.items()}, tmp_path / "state.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(tmp_path / "state.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    other.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for mine, yours in zip(first, second, strict=True):
        yours.data.copy_(mine)
    train(optimizer, first, range(3, 6), None)
    train(other, second, range(3, 6), None)
    assert all(torch.equal(mine, yours) for mine, yours in zip(first, second, strict=True))


def test_state_of_another_optimizer_is_refused() -> None:
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, range(1), None)
    with pytest.raises(CheckpointError, match="parameter 0 does not fit"):
        Adafactor(parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "keys", [{"lr": -1.0}, {"eps": (0.0, 1e-3)}, {"clip_threshold": 0.0}, {"decay_rate": 0.5}, {"weight_decay": -1.0}]
)
def test_bad_settings_are_refused_by_name(keys: dict) -> None:
    with pytest.raises(ConfigError, match=f"Adafactor: {next(iter(keys))}"):
        Adafactor(parameters(), **keys)
