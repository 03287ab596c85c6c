"""A linear layer whose weight is quantized and frozen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fourfold.errors import ConfigError
from fourfold.kernels.low_rank import beside, low_rank_grad, working_dtype
from fourfold.kernels.small_batch import MAX_ROWS
from fourfold.kernels.vectorwise import matmul_vectorwise
from fourfold.quantization.formats import get_format
from fourfold.quantization.layout import entry_keys, from_state_dict, is_quantized, state_entry
from fourfold.quantization.llm_int8 import DEFAULT_THRESHOLD
from fourfold.quantization.number_format import NumberFormat
from fourfold.quantization.scales import Scales
from fourfold.quantization.tensor import QuantizedTensor, quantize

__all__ = ["QuantizedLinear", "QuantizedWeight", "Streamed", "without_autocast"]


class Streamed(Protocol):
    """A weight that stays in host memory, and comes to the device when it is computed with."""

    @property
    def device(self) -> torch.device:
        """Where it comes to."""

    def read(self) -> QuantizedTensor:
        """The weight there, for work that is launched before the next read of any weight."""


class QuantizedWeight:
    """Mixin of a module whose parameter `weight` holds the codes of a quantized tensor.

    The codes are a uint8 parameter that asks for no gradient, so that everything which walks over parameters (device
    maps, checkpoints, sharding) sees them. The scales are kept beside it: `module.to(dtype)` must not round them.
    """

    number_format: NumberFormat
    _rest: QuantizedTensor | None
    # Shape of the codes, where the scales stand behind them in `weight`.
    _joined: torch.Size | None = None
    _num_scale_bytes = 0
    _joined_bytes = 0
    streamed: Streamed | None = None
    _computes_on: torch.device
    _parameters: dict[str, nn.Parameter | None]

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a quantized tensor; shares memory with the module. Of a streamed weight, in host memory."""
        if self._rest is None:
            raise RuntimeError("the weight has not been loaded yet")
        if self._joined is None:
            return replace(self._rest, codes=self.weight.data)
        held, shape = self.weight.data.view(-1).view(torch.uint8), self._joined
        end = self._joined_bytes
        scales = held[end - self._num_scale_bytes : end]
        return replace(
            self._rest,
            codes=held[: shape.numel()].view(self._rest.codes.dtype).view(shape),
            scales=self._rest.scales.with_bytes(scales),
        )

    @quantized.setter
    def quantized(self, value: QuantizedTensor) -> None:
        self._refuse_streamed()
        self.weight = nn.Parameter(value.codes, requires_grad=False)
        self.set_scales(value)

    def set_scales(self, value: QuantizedTensor) -> None:
        """Take everything but the codes from `value`; the parameter `weight` is the caller's to set."""
        # An empty slice instead of the codes: this object must not keep them alive when the parameter is moved.
        self._rest = replace(value, codes=value.codes[:0])
        self.number_format = value.format

    def join_scales(self, device: torch.device, dtype: torch.dtype = torch.uint8) -> None:
        """Put the scales behind the codes, in the parameter `weight`, for whoever shards that; all else to `device`.

        The weight is the same; only what is saved of the module from now on is not: a state dict wants the two apart.

        Args:
            device: Where all but the parameter goes.
            dtype: As which the parameter shows its bytes [n, 1]; nothing is converted, and nothing may be from then on.
        """
        if self._joined is not None:
            return
        whole = self.quantized
        scales = whole.scales.as_bytes()
        # Kernels load scales by vectors.
        gap = -whole.codes.nbytes % 16
        parts = [whole.codes.view(torch.uint8).view(-1), scales.new_zeros(gap), scales]
        self._joined_bytes = sum(map(len, parts))
        parts.append(scales.new_zeros(-self._joined_bytes % dtype.itemsize))
        # Clones: an empty view would keep all that it is a view of.
        rest = replace(whole, codes=whole.codes[:0].clone(), scales=whole.scales.with_bytes(scales[:0].clone()))
        self.weight = nn.Parameter(torch.cat(parts).view(dtype).view(-1, 1), requires_grad=False)
        self._rest, self._joined, self._num_scale_bytes = rest.to(device), whole.codes.shape, len(scales)

    def stream_from(self, streamed: Streamed) -> None:
        """From here on, compute with what `streamed` gives: the same weight as this module's, which stays."""
        self.streamed, self._computes_on = streamed, streamed.device

    @property
    def computes_on(self) -> torch.device:
        """The device of the products."""
        device: torch.device = self.weight.device if self.streamed is None else self._computes_on
        return device

    def read(self, device: torch.device | None = None) -> QuantizedTensor:
        """The weight to compute with on `device` (default: `computes_on`): `quantized`, or the copy of a streamed one.

        That copy is good for what is launched before the next read of any weight, so it is not to be kept.
        """
        streamed = self.streamed
        return (
            self.quantized if streamed is None or streamed.device != (device or self._computes_on) else streamed.read()
        )

    def _refuse_streamed(self) -> None:
        if self.streamed is not None:
            raise ConfigError("a streamed weight cannot be replaced", hint="change the base before it streams")

    @property
    def scales(self) -> Scales | None:
        return None if self._rest is None else self._rest.scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.streamed is not None:
            # The weight stays; all else, such as a bias, goes along.
            weight, self._parameters["weight"] = self._parameters["weight"], None
            try:
                super()._apply(fn, recurse)  # type: ignore[misc]
            finally:
                self._parameters["weight"] = weight
            self._computes_on = fn(torch.empty(0, device=self._computes_on)).device
            return self
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        if self._rest is not None:

            def move(tensor: Tensor) -> Tensor:
                moved = fn(tensor)
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

            self._rest = self._rest.map_tensors(move)
        return module

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self._rest is not None:
            entries = self.quantized.state_dict(prefix + "weight")
            entries.pop(prefix + "weight")
            destination.update(entries)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        if key in state_dict:
            self._refuse_streamed()
        if is_quantized(state_dict, key):
            threshold = None if self._rest is None else self._rest.outlier_threshold
            loaded = from_state_dict(state_dict, key, DEFAULT_THRESHOLD if threshold is None else threshold)
            if not local_metadata.get("assign_to_params_buffers", False):
                device = self.weight.device
                loaded = loaded.map_tensors(lambda tensor: tensor.to(device, copy=True))
            self.quantized = loaded
        elif key in state_dict and state_dict[key].dtype in (torch.uint8, torch.int8):
            # Codes alone would be read with the scales that happen to be here.
            missing_keys.append(state_entry(key, self.number_format))
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = set(entry_keys(key))
        unexpected_keys[:] = [name for name in unexpected_keys if name not in ours]


class QuantizedLinear(QuantizedWeight, nn.Linear):  # type: ignore[misc]  # the mixin sets `weight` as Linear has it
    """y = x W^T + b, W quantized and frozen: its gradient is never computed, the input's is.

    W is dequantized for the product in the dtype of `x` (under autocast, in autocast's), in the forward and once more
    in the backward pass: between the two only the codes are kept. On a GPU, up to 64 rows of `x` are multiplied with
    the codes themselves. By LLM.int8() they always are, with an input that is rounded to int8 too; its gradient is that
    of the dequantized weight, as if it had not been. It is an `nn.Linear`, so that whatever selects linear layers
    (PEFT's "all-linear") finds it.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias; it stays in floating point.
        number_format: Format of the weight, by name or itself.
        device: Device of the empty parameters, "meta" when a checkpoint will fill them.
        dtype: What the model computes in: dtype of the bias and of `dense`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        number_format: str | NumberFormat = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=False)
        if isinstance(number_format, str):
            number_format = get_format(number_format)
        codes = number_format.empty_codes((out_features, in_features), device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.number_format = number_format
        # What the model computes in: the dtype of `dense`, where it differs from the one the weight came in.
        self.compute_dtype = dtype
        self._rest = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str = "weight", **options: Any) -> QuantizedLinear:
        """Quantize an existing layer; `options` are those of `quantize`."""
        quantized = quantize(linear.weight.data, name=name, **options)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            number_format=quantized.format,
            dtype=linear.weight.dtype,
        )
        layer.quantized = quantized
        layer.bias = linear.bias
        return layer

    def product_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype in which `input` is multiplied, and the output's: autocast's, or else `input`'s own."""
        device_type = input.device.type
        # The meta device, on which models are looked at before they are loaded, knows no autocast.
        is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if is_on else input.dtype

    def forward(
        self, input: Tensor, *, low: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0
    ) -> Tensor:
        """x W^T + b, or with `low` and `lora_b` x W^T + scaling * low lora_b^T + b.

        The low-rank product is part of the sum before it is rounded, see `_AdaptedLinear`. An adapter hands it in, and
        does not add it to the output, for that reason.

        Args:
            input: [..., in_features].
            low: x A^T, [..., rank], in `product_dtype(input)`; None without an adapter.
            lora_b: [out_features, rank], any floating dtype, whose gradient is summed in fp32; None without an adapter.
            scaling: Factor of their product.

        Returns:
            [..., out_features] in `product_dtype(input)`.
        """
        input = input.to(self.product_dtype(input))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        result: Tensor
        if low is None or lora_b is None:
            result = _FrozenLinear.apply(input, bias, self)
            return result
        # Few rows to generate from: the codes are multiplied, and the adapter's product comes after that is rounded.
        few = input.is_cuda and input.numel() <= MAX_ROWS * self.in_features
        after = few and not (self.training or torch.is_grad_enabled())
        result = _AdaptedLinear.apply(input, bias, self, low, lora_b, scaling, after)
        return result

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary layer with the dequantized weight, in `dtype` (default: the model's), where it is computed."""
        dtype = dtype or self.compute_dtype
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, bias=False)
        layer.weight = nn.Parameter(self.read().dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.data.to(layer.weight.dtype), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self._rest is not None:
            text += f", format={self._rest.format.name}, block_size={self._rest.block_size}"
        return text


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b that keeps W quantized between forward and backward.

    Each pass reads the weight from its layer: of a streamed one, what was read before may be another's by then.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        with without_autocast(input.device.type):
            return layer.read(input.device).linear(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ ctx.layer.read(grad_output.device).dequantize(grad_output.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0)
        return grad_input, grad_bias, None


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + scaling * low B^T + b; W stays quantized between the passes, B's gradient is summed and returned in fp32.

    All of it is one sum in fp32, rounded once. Were the low-rank product added to a 16-bit x W^T, a multiple of its
    unit in the last place, what is less than half of that would be lost: all that an adapter learns in its first
    steps, since its B starts from zero. So low and B are columns beside x and W in one product, at the cost of copies;
    to start the product from the low-rank one, as `addmm` does, is no help, since cuBLAS rounds before it adds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        layer: QuantizedLinear,
        low: Tensor,
        lora_b: Tensor,
        scaling: float,
        after: bool,
    ) -> Tensor:
        ctx.save_for_backward(low, lora_b)
        ctx.layer, ctx.scaling = layer, scaling
        weight = layer.read(input.device)
        num_rows, num_columns = weight.shape
        flat, flat_low = input.reshape(-1, num_columns), low.reshape(-1, low.shape[-1])
        with without_autocast(input.device.type):
            up = _scaled(lora_b, scaling, flat.dtype)
            if weight.outlier_threshold is not None:
                sizes = (weight.codes, weight.scales.dequantize(), weight.outlier_threshold)
                out = matmul_vectorwise(flat, *sizes, bias, flat_low, up)
            elif after:
                out = weight.linear(flat, bias).addmm_(flat_low, up.T)
            else:
                x_low, w_up = beside(flat, flat_low), beside(weight.dequantize(flat.dtype), up)
                out = torch.nn.functional.linear(x_low, w_up, bias)
        return out.view(*input.shape[:-1], num_rows)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        low, lora_b = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_bias = grad_low = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ ctx.layer.read(grad_output.device).dequantize(grad_output.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(dim=0)
        if ctx.needs_input_grad[3]:
            grad_low = (grad @ _scaled(lora_b, ctx.scaling, grad.dtype)).view(low.shape)
        if ctx.needs_input_grad[4]:
            grad_b = (low_rank_grad(grad, low.reshape(-1, low.shape[-1])) * ctx.scaling).to(lora_b.dtype)
        return grad_input, grad_bias, None, grad_low, grad_b, None, None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off, on a device that knows it."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _scaled(lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling * lora_b, rounded to `dtype` once."""
    return (lora_b.to(torch.promote_types(lora_b.dtype, working_dtype(dtype))) * scaling).to(dtype)
