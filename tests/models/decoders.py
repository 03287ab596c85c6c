"""Tiny random decoders of every family that has a fused block, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING
from twins import randomise

from fourfold.models.preparing import prepare
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model

VOCAB = 96
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
}
# name -> (model type, what it has that others have not)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    # Blocks of 64 straddle rows, and no size is a multiple of 16.
    "llama-odd": (
        "llama",
        {
            "hidden_size": 72,
            "intermediate_size": 108,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 24,
        },
    ),
    "qwen2-biases": ("qwen2", {}),
    "qwen3-head-norms": ("qwen3", {}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "smollm3-no-rope": ("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
}


def decoder(
    name: str, dtype: torch.dtype = torch.float32, *, quantized: bool = True, device: str = "cpu", **changes: Any
) -> PreTrainedModel:
    """A model whose norms and biases are random, too; by a name of `DECODERS`, or a model type."""
    model_type, own = DECODERS.get(name, (name, {}))
    config = CONFIG_MAPPING[model_type](**{**SIZES, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.data.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.data.normal_(std=0.5)
    # float64 is no dtype to quantize from.
    model = model.to(torch.float32 if dtype == torch.float64 else dtype).to(device)
    return (quantize_model(model, FourfoldConfig()) if quantized else model).to(dtype)


def adapted(model: PreTrainedModel, *, fused: bool, recompute: Any = None, r: int = 4, **lora: Any) -> PeftModel:
    """With adapters as if they had been trained."""
    config = LoraConfig(**{"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, **lora})
    prepared = prepare(model, config, fused=fused, recompute=recompute)
    return randomise(prepared, scale=0.05)


def ids(batch: int = 2, length: int = 11, device: str = "cpu") -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7)).to(device)


def loss_and_grads(
    model: PeftModel, call: Callable[[PeftModel], Tensor] | None = None, **inputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy over all tokens, and the gradient of each adapter matrix, in float64."""
    model.train()
    model.zero_grad(set_to_none=True)
    inputs = inputs or {"input_ids": ids(device=str(model.device))}
    labels = inputs.pop("labels", inputs["input_ids"])
    logits = model(**inputs, use_cache=False).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    grads = {name: value.grad.double() for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), grads


def distance(values: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """||values - reference|| / ||reference|| over all of them."""
    assert values.keys() == reference.keys()
    error = sum(float((values[name] - reference[name]).square().sum()) for name in reference)
    size = sum(float(value.square().sum()) for value in reference.values())
    return (error / size) ** 0.5
