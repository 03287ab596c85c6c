"""Quantizing a base anew with what its adapter has learned: between steps of a run, so that the adapter is free again.

Of each layer with an adapter, W being the dequantized base,

    Q' = quantize(W + s B A),    s B' A' = the best of rank r of (W + s B A) - dequantize(Q').

As ReLoRA does it (https://arxiv.org/abs/2307.05695), the base takes up what was learned, so that the sum over a run
may have any rank. But a quantized base takes up only what moves a weight past the middle between two codes, and most of
what an adapter learns does not: it would be lost with the adapter. So the new adapter is what the base did not take up,
as in LoftQ (https://arxiv.org/abs/2310.08659), and not zero.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from fourfold.adapters.initialisation import decompose
from fourfold.adapters.lora import LoraQuantizedLinear
from fourfold.errors import AdapterError
from fourfold.quantization.linear import QuantizedLinear

__all__ = ["requantize"]

# Subspace iterations of the randomised decomposition; more change the product by less than a thousandth.
_ITERATIONS = 8


@torch.no_grad()
def requantize(
    model: PeftModel,
    *,
    seed: int = 0,
    calibration: str = "absmax",
    keeps_rest: bool = True,
    adapter_name: str = "default",
) -> float:
    """Merge an adapter into its quantized base, quantize that again, and leave the rest to the adapter.

    Layers whose base is not quantized keep their adapter as it is. Graphs of fused blocks are the caller's to drop, and
    so is the state of an optimizer, which belongs to the former A and B. Random numbers are drawn aside: what the run
    draws next is as it was, and alike in all processes.

    Args:
        model: The model; a base that streams, and DoRA, are refused.
        seed: Of the decomposition.
        calibration: As for `quantize`, of integer formats.
        keeps_rest: False: the rest is thrown away, and the adapter starts from zero, as in ReLoRA.
        adapter_name: The adapter.

    Returns:
        What is kept of the sum W + s B A: 1 - ||lost|| / ||s B A|| over all layers; 1 where nothing was learned. Below
        0 where quantizing anew moved weights by more than the adapter had.

    Raises:
        AdapterError: No layer with an adapter is quantized, or the adapter is no plain LoRA.
        ConfigError: The base streams.
        QuantizationError: A merged weight that is not finite.
    """
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraQuantizedLinear) and adapter_name in layer.lora_A
    ]
    if not layers:
        raise AdapterError("no layer with an adapter is quantized", hint="load the base in 4 bits, or in 8")
    variants = [name for name, layer in layers if adapter_name in layer.lora_variant or layer.lora_bias[adapter_name]]
    if variants:
        raise AdapterError(
            "only plain LoRA is merged into a quantized base", found=f"DoRA or lora_bias on {variants[0]}"
        )
    learned = lost = 0.0
    devices = sorted({layer.lora_A[adapter_name].weight.device.index for _, layer in layers if _is_cuda(layer)})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for name, layer in layers:
            moved, missing = _requantize_layer(name, layer, adapter_name, calibration, keeps_rest)
            learned, lost = learned + moved, lost + missing
    return 1.0 - (lost / learned) ** 0.5 if learned else 1.0


def _is_cuda(layer: LoraLayer) -> bool:
    return any(weight.is_cuda for weight in layer.parameters())


def _requantize_layer(
    name: str, layer: LoraQuantizedLinear, adapter_name: str, calibration: str, keeps_rest: bool
) -> tuple[float, float]:
    """The squared norms of what the adapter was, and of what of it is lost."""
    base: QuantizedLinear = layer.get_base_layer()
    lora_a, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    delta: Tensor = layer.get_delta_weight(adapter_name).float()
    if not delta.any():
        return 0.0, 0.0
    target = base.quantized.dequantize(torch.float32) + delta
    base.quantized = base.quantized.requantize(target, calibration=calibration, name=name)
    rest = target - base.quantized.dequantize(torch.float32)
    if keeps_rest:
        rank, root = layer.r[adapter_name], layer.scaling[adapter_name] ** 0.5
        factors = decompose(rest, rank, _ITERATIONS)
        lora_a.data.copy_(factors[0] / root)
        lora_b.data.copy_(factors[1] / root)
        rest = rest - factors[1] @ factors[0]
    else:
        layer.reset_lora_parameters(adapter_name, True)
    return float(delta.square().sum()), float(rest.square().sum())
