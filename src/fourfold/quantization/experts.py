"""Experts of mixture models that are held as one 3-D parameter [experts, out, in], quantized in place.

The module keeps its own forward: the parameter is replaced by its codes, and a parametrization
(torch.nn.utils.parametrize) gives the dequantized tensor to whoever reads the attribute. It is dequantized once a
forward of the module, however often it is read there. Autograd keeps the dense tensor until the backward pass, so train
such models with gradient checkpointing: then at most one layer's experts are dense at a time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fourfold.quantization.tensor import QuantizedTensor

__all__ = ["expert_parameters", "is_parametrized", "quantized_parameters", "set_quantized_parameter"]


class DequantizedParameter(nn.Module):
    """The parametrization: codes in, the dense tensor out."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.rest = tensor
        self.dense: Tensor | None = None
        self.is_caching = False

    def quantized(self, codes: Tensor) -> QuantizedTensor:
        """The quantized tensor whose codes are the parameter's."""
        rest = self.rest if self.rest.device == codes.device else self.rest.to(codes.device)
        return QuantizedTensor(codes, rest.scales, rest.codebook, rest.format, rest.block_size, rest.shape, rest.dtype)

    def forward(self, codes: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense
        dense = self.quantized(codes.data).dequantize()
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


def set_quantized_parameter(module: nn.Module, name: str, tensor: QuantizedTensor) -> None:
    """Make `module.name` read as the dequantized `tensor`."""
    if is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    setattr(module, name, nn.Parameter(tensor.codes, requires_grad=False))
    step = DequantizedParameter(
        QuantizedTensor(
            tensor.codes[:0],
            tensor.scales,
            tensor.codebook,
            tensor.format,
            tensor.block_size,
            tensor.shape,
            tensor.dtype,
        )
    )
    parametrize.register_parametrization(module, name, step, unsafe=True)
    module.register_forward_pre_hook(_start_caching)
    module.register_forward_hook(_stop_caching, always_call=True)
    module.register_state_dict_post_hook(_name_as_unparametrized)


def is_parametrized(module: nn.Module, name: str) -> bool:
    """Whether `module.name` is a quantized parameter."""
    return parametrize.is_parametrized(module, name)


def quantized_parameters(module: nn.Module) -> dict[str, QuantizedTensor]:
    """The module's own quantized parameters, by name."""
    return {
        name: step.quantized(steps.original.data)
        for name, steps in getattr(module, "parametrizations", {}).items()
        for step in steps
        if isinstance(step, DequantizedParameter)
    }


def _steps(module: nn.Module) -> list[DequantizedParameter]:
    return [
        step
        for steps in getattr(module, "parametrizations", {}).values()
        for step in steps
        if isinstance(step, DequantizedParameter)
    ]


def _start_caching(module: nn.Module, args: Any) -> None:
    for step in _steps(module):
        step.is_caching = True


def _stop_caching(module: nn.Module, args: Any, output: Any) -> None:
    for step in _steps(module):
        step.is_caching, step.dense = False, None


def _name_as_unparametrized(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, tensor in quantized_parameters(module).items():
        state.pop(f"{prefix}parametrizations.{name}.original", None)
        state.update(tensor.state_dict(prefix + name))
