"""Training steps of small models on the CPU, with every allocation of PyTorch's, as its profiler saw them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from fourfold.data import supervised_positions
from fourfold.memory.footprint import LIBRARY_BYTES, Footprint, Step, footprint
from fourfold.models.followed_layer import followed_shape
from fourfold.models.preparing import prepare
from fourfold.optimizers import AdamW
from fourfold.optimizers.footprint import state_bytes
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model
from fourfold.quantization.linear import QuantizedLinear
from fourfold.training.loss import supervised_cross_entropy

BATCH, SEQ = 4, 128


def measured_peak(config: Any, quantized: bool, lora: LoraConfig | None, checkpoints: bool, accumulation: int) -> int:
    """Bytes of a step in fp32: parameters, scales and state, and on top of them the highest moment of the allocator."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if quantized:
        quantize_model(base, FourfoldConfig())
    model: nn.Module = base if lora is None else prepare(base, lora, fused=False)
    if checkpoints:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=1e-5)
    ids = torch.randint(3, config.vocab_size, (BATCH, SEQ))
    positions = supervised_positions(torch.zeros(BATCH, SEQ, dtype=torch.int64))

    def step() -> None:
        for _ in range(accumulation):
            hidden = base.base_model(input_ids=ids, use_cache=False)[0]
            loss = supervised_cross_entropy(hidden, ids, base.get_output_embeddings(), positions).loss_sum
            del hidden
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # state is laid out
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    height = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        height += event.nbytes()
        highest = max(highest, height)
    scales = [module.scales.num_bytes for module in model.modules() if isinstance(module, QuantizedLinear)]
    state = state_bytes("adamw", 32, [parameter.shape for parameter in trained])
    return sum(parameter.nbytes for parameter in model.parameters()) + sum(scales) + state + highest


def foretold(config: Any, quantized: bool, lora: LoraConfig | None, checkpoints: bool, accumulation: int) -> Footprint:
    """The footprint of the same step; take `LIBRARY_BYTES` off its peak, which no CPU has."""
    shape = followed_shape(config, FourfoldConfig() if quantized else None, lora, torch.float32)
    policies = ["full" if checkpoints else "none"] * len(shape.blocks)
    state = state_bytes("adamw", 32, shape.adapter_shapes)
    return footprint(shape, Step(BATCH, SEQ, policies, optimizer_bytes=state, accumulation=accumulation))


__all__ = ["BATCH", "LIBRARY_BYTES", "SEQ", "foretold", "measured_peak"]
