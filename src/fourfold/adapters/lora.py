"""The LoRA layer over QuantizedLinear, and how PEFT comes to use it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fourfold.errors import AdapterError
from fourfold.kernels.low_rank import low_rank_grad
from fourfold.quantization.linear import QuantizedLinear, without_autocast

__all__ = ["LoraQuantizedLinear", "is_weight_dependent", "register"]

# Initialisations of PEFT that decompose or train on the base weight, and that `initialise` does not offer.
_UNSUPPORTED_INITIALISATIONS = ("olora", "corda", "mica", "lora_ga")


def register(config: LoraConfig) -> LoraConfig:
    """Make PEFT build LoraQuantizedLinear over QuantizedLinear for this configuration (PEFT's custom-module dispatch).

    PEFT does not save this, so a configuration that was read from disk is registered anew.
    """
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


def is_weight_dependent(init_lora_weights: object) -> bool:
    """Whether an initialisation looks at the base weight: PiSSA and LoftQ, done by `initialise`."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(("pissa", "loftq"))


class LoraQuantizedLinear(PeftLoraLinear):
    """y = x W^T + b + s (x A^T) B^T over a quantized, frozen W.

    A and B are fp32 parameters; the products are computed in the dtype of `x` and summed in fp32, base and adapters, to
    be rounded once (see `QuantizedLinear.forward`). The gradients of A and B leave in fp32. Everything else (which
    adapters are active, switching them off, DoRA, `adapter_names`, what is saved) is PEFT's. Both of the latter add to
    the base layer's rounded output: DoRA by its formula, and `adapter_names` is for inference alone.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if is_weight_dependent(config.init_lora_weights):
            raise AdapterError(
                "this initialisation reads the base weight, which is quantized here",
                found=f"init_lora_weights={config.init_lora_weights!r}",
                hint="make the adapter with fourfold.prepare(model, config, original=CHECKPOINT)",
            )
        method = config.init_lora_weights
        if isinstance(method, str) and method.lower().startswith(_UNSUPPORTED_INITIALISATIONS):
            raise AdapterError(
                "this initialisation needs a base weight that is not quantized",
                found=f"init_lora_weights={method!r}",
                allowed=[True, False, "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_N", "loftq"],
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A streamed weight is elsewhere than its products.
        base = self.get_base_layer()
        if device is None and isinstance(base, QuantizedLinear) and base.streamed is not None:
            device = base.computes_on
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        if config.use_dora:
            return _QuantizedDoraVariant()
        variant: LoraVariant | None = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None:
            raise AdapterError(
                "this variant of LoRA does not work over a quantized weight",
                found=type(variant).__name__,
                allowed="LoRA, rsLoRA and DoRA",
            )
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            mixed: Tensor = self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
            return mixed
        if self.disable_adapters or self.merged:
            base: Tensor = self.base_layer(x, *args, **kwargs)
            return base
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_variant = [name in self.lora_variant for name in names]
        num_summed = is_variant.index(True) if True in is_variant else len(names)
        result: Tensor = self.base_layer(x, *args, **self._low_rank(x, names[:num_summed]), **kwargs)
        # A variant's formula is a function of the base layer's output, which has been rounded: PEFT's, as it is there.
        for name in names[num_summed:]:
            if name in self.lora_variant:
                wide = x.to(self.lora_A[name].weight.dtype)
                result = self.lora_variant[name].forward(self, active_adapter=name, x=wide, result=result)
                result = result.to(x.dtype)
            else:
                result = _added(result, **self._low_rank(x, [name]))
        return result

    def _low_rank(self, x: Tensor, names: list[str]) -> dict[str, Any]:
        """What QuantizedLinear sums for these adapters, as its arguments: they are one of their joint rank."""
        if not names:
            return {}
        x = x.to(self.get_base_layer().product_dtype(x))
        lows, ups, scalings = [], [], []
        for name in names:
            lora_b = self.lora_B[name]
            lows.append(_Down.apply(self.lora_dropout[name](x), self.lora_A[name].weight))
            ups.append(lora_b.weight)
            scalings.append(self.scaling[name])
            if lora_b.bias is not None:
                # One more rank, whose x A^T is one.
                lows.append(lows[-1].new_ones(*x.shape[:-1], 1))
                ups.append(lora_b.bias[:, None])
                scalings.append(self.scaling[name])
        if len(lows) == 1:
            return {"low": lows[0], "lora_b": ups[0], "scaling": scalings[0]}
        scaled = [up * scaling for up, scaling in zip(ups, scalings, strict=True)]
        return {"low": torch.cat(lows, dim=-1), "lora_b": torch.cat(scaled, dim=1)}

    def merged_weight(self, adapter_names: list[str], dtype: torch.dtype | None = None) -> Tensor:
        """W with the adapters merged in: [out, in] in `dtype` (default: the model's).

        W is dequantized in that dtype, as training saw it; the sum is formed in fp32 and rounded once.
        """
        base: QuantizedLinear = self.get_base_layer()
        weight = base.read().dequantize(dtype or base.compute_dtype)
        merged = weight.float()
        for name in adapter_names:
            delta = self.get_delta_weight(name).float()
            if name in self.lora_variant:
                magnitude = self.lora_magnitude_vector[name].weight.float()
                norm = torch.linalg.norm(weight.float() + delta, dim=1)
                merged = (magnitude / norm)[:, None] * (merged + delta)
            else:
                merged += delta
        return merged.to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put an ordinary 16-bit layer with the adapters merged in the place of the quantized one.

        Requantizing the sum would lose most of what was learned; `unmerge` brings the quantized layer back as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if self.merged:
            raise AdapterError(
                "adapters are merged already",
                found=self.merged_adapters,
                hint="unmerge, then merge all at once",
            )
        quantized: QuantizedLinear = self.get_base_layer()
        weight = self.merged_weight(names)
        if safe_merge and not torch.isfinite(weight).all():
            raise AdapterError("the merged weight is not finite", found=f"adapters {names}")
        dense = quantized.dense(weight.dtype)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        for name in names:
            bias = self.lora_B[name].bias
            if bias is not None:
                old = 0 if dense.bias is None else dense.bias.data
                dense.bias = nn.Parameter((old + self.scaling[name] * bias.data).to(weight.dtype), False)
        # In a list, so that it is not a submodule: it must not appear in the merged model's state dict.
        self._unmerged_base = [quantized]
        self.base_layer = dense
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Bring back the quantized layer."""
        if self.merged:
            self.base_layer = self._unmerged_base.pop()
            self.merged_adapters.clear()

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return "lora." + text.removeprefix("lora.")


class _Down(torch.autograd.Function):
    """x A^T in the dtype of x, with the gradient of A summed and returned in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor) -> Tensor:
        ctx.save_for_backward(x, lora_a)
        with without_autocast(x.device.type):
            return x @ lora_a.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_low: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, lora_a = ctx.saved_tensors
        grad_x = grad_a = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ lora_a.to(grad_low.dtype)
        if ctx.needs_input_grad[1]:
            flat = grad_low.reshape(-1, grad_low.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_a = low_rank_grad(*flat).to(lora_a.dtype)
        return grad_x, grad_a


def _added(result: Tensor, low: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Tensor:
    """`result` with an adapter's product added in fp32, rounded to the dtype of `result`."""
    wide = torch.promote_types(low.dtype, lora_b.dtype)
    with without_autocast(low.device.type):
        return (result + scaling * low.to(wide) @ lora_b.to(wide).T).to(result.dtype)


class _QuantizedDoraLayer(DoraLinearLayer):
    """PEFT's DoRA over the dequantized weight."""

    def update_layer(self, *, base_layer: nn.Module, **kwargs: Any) -> None:
        super().update_layer(base_layer=_dense(base_layer, torch.float32), **kwargs)

    def forward(self, x: Tensor, *, base_layer: nn.Module, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, base_layer=_dense(base_layer, x.dtype), **kwargs)
        return result


class _QuantizedDoraVariant(DoraLinearVariant):
    @staticmethod
    def init(module: LoraQuantizedLinear, adapter_name: str, **_: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = _QuantizedDoraLayer(fan_in_fan_out=False)
        layer.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer


def _dense(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    return layer.dense(dtype) if isinstance(layer, QuantizedLinear) else layer
