"""Adapters that start from the base weight: PiSSA and LoftQ.

Both want W ~ Q + s B A from the first step on, Q quantized. PiSSA (https://arxiv.org/abs/2404.02948) gives A and B the
leading singular directions of W and quantizes the rest. LoftQ (https://arxiv.org/abs/2310.08659) gives them the leading
directions of what quantizing lost, and with more than one iteration quantizes W - s B A anew each time.

Whenever Q is not simply the quantized W, the adapter belongs to that Q and to no other base: the caller saves it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from fourfold.adapters.lora import LoraQuantizedLinear
from fourfold.errors import AdapterError
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import QuantizedTensor

__all__ = ["changes_base", "decompose", "initialise"]


def changes_base(init_lora_weights: object, loftq_iterations: int = 1) -> bool:
    """Whether this initialisation leaves a base that is not the quantized original."""
    if not isinstance(init_lora_weights, str):
        return False
    return init_lora_weights.startswith("pissa") or (init_lora_weights == "loftq" and loftq_iterations > 1)


def initialise(
    model: PeftModel,
    method: str,
    original: Callable[[str], Tensor] | None,
    *,
    adapter_name: str = "default",
    loftq_iterations: int = 1,
) -> None:
    """Set A, B and where needed the base of every LoRA layer over a quantized base.

    Args:
        model: The model, its adapter freshly made.
        method: "pissa" (exact singular values), "pissa_niter_N" (randomised, N subspace iterations) or "loftq".
        original: Gives the original weight [out, in] of the module of a name in the base model. Without it PiSSA starts
            from the dequantized weight; LoftQ cannot, since what quantizing lost is then unknown.
        adapter_name: The adapter to set.
        loftq_iterations: Alternations of quantizing and decomposing, at least 1.

    Raises:
        AdapterError: An unknown method, LoftQ without the original weights, original weights of another shape, a rank
            above what a layer has, or a model that is not quantized.
    """
    if not re.fullmatch(r"loftq|pissa(_niter_\d+)?", method):
        raise AdapterError(
            "unknown initialisation",
            found=method,
            allowed=["pissa", "pissa_niter_N", "loftq", "gaussian", True],
        )
    if method == "loftq" and original is None:
        raise AdapterError(
            "LoftQ needs the original 16-bit weights",
            hint="load from the 16-bit checkpoint, not from a quantized one",
        )
    layers = [
        (name.removeprefix("base_model.model."), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraQuantizedLinear) and adapter_name in layer.lora_A
    ]
    if not layers:
        raise AdapterError(
            "no layer with an adapter is quantized, and this initialisation is for quantized ones",
            found=f"init_lora_weights={method!r}",
            hint="load the model in 4 bits, or call PEFT's get_peft_model for this initialisation of a 16-bit model",
        )
    for name, layer in layers:
        base: QuantizedLinear = layer.get_base_layer()
        weight = _original_weight(name, base, original)
        rank = layer.r[adapter_name]
        if rank > min(weight.shape):
            raise AdapterError(
                f"{name} has no room for the rank",
                found=f"lora_r={rank}",
                allowed=f"at most {min(weight.shape)}",
            )
        if method == "loftq":
            quantized, factors = (
                base.quantized,
                decompose(weight - base.quantized.dequantize().float(), rank),
            )
            for _ in range(loftq_iterations - 1):
                quantized = _requantize(weight - factors[1] @ factors[0], base.quantized, name)
                factors = decompose(weight - quantized.dequantize().float(), rank)
            if loftq_iterations > 1:
                base.quantized = quantized
        else:
            iterations = int(method.removeprefix("pissa_niter_")) if method != "pissa" else None
            factors = decompose(weight, rank, iterations)
            base.quantized = _requantize(weight - factors[1] @ factors[0], base.quantized, name)
        # The layer computes s B A, so the scale is taken off both factors alike.
        root = layer.scaling[adapter_name] ** 0.5
        layer.lora_A[adapter_name].weight.data.copy_(factors[0] / root)
        layer.lora_B[adapter_name].weight.data.copy_(factors[1] / root)


def _original_weight(name: str, base: QuantizedLinear, original: Callable[[str], Tensor] | None) -> Tensor:
    """fp32 [out, in]: what the layer's weight was before it was quantized, or the best that is known of it."""
    if original is None:
        return base.quantized.dequantize().float()
    weight = original(name)
    if getattr(base, "source_is_transposed", False):
        weight = weight.T
    if weight.shape != base.quantized.shape:
        raise AdapterError(
            f"the original weight of {name} is another model's",
            found=f"shape {tuple(weight.shape)}",
            allowed=f"shape {tuple(base.quantized.shape)}",
        )
    return weight.to(base.weight.device).float()


def decompose(matrix: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], equally long, whose product B A is the best of its rank."""
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, columns = torch.svd_lowrank(matrix, q=rank, niter=iterations)
        right = columns.T
    root = values.sqrt()
    return root[:, None] * right, left * root


def _requantize(weight: Tensor, like: QuantizedTensor, name: str) -> QuantizedTensor:
    """`weight` in the format, block size and dtype of `like`."""
    return like.requantize(weight, name=name)
