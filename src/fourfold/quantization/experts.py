"""Experts of mixture models that are held as one 3-D parameter [experts, out, in], quantized in place.

The module keeps its own forward: the parameter is replaced by its codes, and a parametrization
(torch.nn.utils.parametrize) gives the dequantized tensor to whoever reads the attribute. It is dequantized once a
forward of the module, however often it is read there. Autograd keeps the dense tensor until the backward pass, so train
such models with gradient checkpointing: then at most one layer's experts are dense at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fourfold.quantization.layout import STATE_SUFFIXES, from_state_dict, is_quantized
from fourfold.quantization.tensor import QuantizedTensor

__all__ = ["expert_parameters", "is_parametrized", "quantized_parameters", "set_quantized_parameter"]


class DequantizedParameter(nn.Module):
    """The parametrization: codes in, the dense tensor out."""

    def __init__(self, tensor: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.rest = tensor
        self.dtype = dtype
        self.dense: Tensor | None = None
        self.is_caching = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DequantizedParameter:
        super()._apply(fn, recurse)
        # The scales are moved, but never rounded; what is rounded is the dense tensor, to the model's new dtype.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.rest.device)).dtype
        self.rest = self.rest.map_tensors(lambda tensor: tensor.to(fn(tensor).device))
        return self

    def quantized(self, codes: Tensor) -> QuantizedTensor:
        """The quantized tensor whose codes are the parameter's."""
        return replace(self.rest, codes=codes)

    def forward(self, codes: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense
        dense = self.quantized(codes.data).dequantize(self.dtype)
        if self.is_caching:
            self.dense = dense
        return dense

    def right_inverse(self, dense: Tensor) -> Tensor:
        """Called when the parametrization is registered, with the codes themselves."""
        return dense


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that are matrices of several experts: three dimensions, and not a convolution's."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1 and parameter.is_floating_point()
    }


def set_quantized_parameter(
    module: nn.Module, name: str, tensor: QuantizedTensor, dtype: torch.dtype | None = None
) -> None:
    """Make `module.name` read as the dequantized `tensor`, in `dtype` (default: the tensor's)."""
    if is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    if not quantized_parameters(module):
        module.register_forward_pre_hook(_start_caching)
        module.register_forward_hook(_stop_caching, always_call=True)
        module.register_state_dict_post_hook(_name_as_unparametrized)
        module.register_load_state_dict_pre_hook(_load_as_parametrized)
    setattr(module, name, nn.Parameter(tensor.codes, requires_grad=False))
    # An empty slice instead of the codes: they are the parameter's.
    step = DequantizedParameter(replace(tensor, codes=tensor.codes[:0]), dtype or tensor.dtype)
    parametrize.register_parametrization(module, name, step, unsafe=True)


def is_parametrized(module: nn.Module, name: str) -> bool:
    """Whether `module.name` is a quantized parameter."""
    return parametrize.is_parametrized(module, name)


def quantized_parameters(module: nn.Module) -> dict[str, QuantizedTensor]:
    """The module's own quantized parameters, by name."""
    return {
        name: step.quantized(parameter.original.data)
        for name, parameter in getattr(module, "parametrizations", {}).items()
        for step in _steps(module, name)
    }


def _steps(module: nn.Module, name: str) -> list[DequantizedParameter]:
    return [step for step in module.parametrizations[name] if isinstance(step, DequantizedParameter)]  # type: ignore[index]


def _all_steps(module: nn.Module) -> list[DequantizedParameter]:
    return [step for name in getattr(module, "parametrizations", {}) for step in _steps(module, name)]


def _start_caching(module: nn.Module, args: Any) -> None:
    for step in _all_steps(module):
        step.is_caching = True


def _stop_caching(module: nn.Module, args: Any, output: Any) -> None:
    for step in _all_steps(module):
        step.is_caching, step.dense = False, None


def _name_as_unparametrized(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, tensor in quantized_parameters(module).items():
        state.pop(f"{prefix}parametrizations.{name}.original", None)
        state.update(tensor.state_dict(prefix + name))


def _load_as_parametrized(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, current in quantized_parameters(module).items():
        key = prefix + name
        if not is_quantized(state, key):
            continue
        loaded = from_state_dict(state, key)
        for step in _steps(module, name):
            step.rest = replace(loaded, codes=loaded.codes[:0]).to(current.device)
        state[f"{prefix}parametrizations.{name}.original"] = state.pop(key)
        for suffix in STATE_SUFFIXES:
            state.pop(f"{key}.{suffix}", None)
