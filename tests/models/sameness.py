"""Two models that nobody can tell apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def assert_same_tensor(one: Tensor, other: Tensor, name: str) -> None:
    assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape), name
    assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def sharing(model: nn.Module) -> list[set[str]]:
    """Names of parameters and buffers that are one tensor."""
    names: dict[tuple[int, int], set[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if tensor.numel():
            names.setdefault((tensor.data_ptr(), tensor.numel()), set()).add(name)
    return sorted((group for group in names.values() if len(group) > 1), key=sorted)


def assert_same_model(one: Any, other: Any) -> None:
    """By every bit of their tensors, and by all that modules, parameters and configurations say of themselves."""
    assert type(one) is type(other)
    state, other_state = one.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    for name in state:
        assert_same_tensor(state[name], other_state[name], name)
    buffers, other_buffers = dict(one.named_buffers()), dict(other.named_buffers())
    assert list(buffers) == list(other_buffers)
    for name in buffers:
        assert_same_tensor(buffers[name], other_buffers[name], name)
    assert sharing(one) == sharing(other)
    parameters, other_parameters = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(parameters) == list(other_parameters)
    for name, parameter in parameters.items():
        assert parameter.requires_grad == other_parameters[name].requires_grad, name
        assert vars(parameter).keys() == vars(other_parameters[name]).keys(), name
    modules, other_modules = dict(one.named_modules()), dict(other.named_modules())
    assert list(modules) == list(other_modules)
    for name, module in modules.items():
        assert type(module).__name__ == type(other_modules[name]).__name__, name
        assert vars(module).keys() == vars(other_modules[name]).keys(), name
        assert module.training == other_modules[name].training, name
        assert getattr(module, "name_or_path", None) == getattr(other_modules[name], "name_or_path", None), name
    assert one.config.to_dict() == other.config.to_dict()
    assert one.config.name_or_path == other.config.name_or_path
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert vars(one.generation_config).keys() == vars(other.generation_config).keys()
    quantizer, other_quantizer = getattr(one, "hf_quantizer", None), getattr(other, "hf_quantizer", None)
    assert type(quantizer) is type(other_quantizer)
    if quantizer is not None:
        assert quantizer.quantization_config.to_dict() == other_quantizer.quantization_config.to_dict()
        assert quantizer.pre_quantized == other_quantizer.pre_quantized
        assert quantizer.tied_head == other_quantizer.tied_head
