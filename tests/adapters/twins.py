"""Tiny models, quantized and dense, with the same weights."""

from __future__ import annotations

import copy
import functools

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model
from fourfold.quantization.linear import QuantizedLinear

VOCAB = 96


def _config(attention_bias: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        pad_token_id=0,
        attention_bias=attention_bias,
        initializer_range=0.1,
    )


@functools.cache
def _state(dtype: torch.dtype, seed: int, attention_bias: bool) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(_config(attention_bias)).to(dtype).state_dict()


def original_model(dtype: torch.dtype = torch.float32, seed: int = 0, attention_bias: bool = False) -> PreTrainedModel:
    model = LlamaForCausalLM(_config(attention_bias)).to(dtype)
    model.load_state_dict(_state(dtype, seed, attention_bias))
    return model.eval()


def quantized_model(dtype: torch.dtype = torch.float32, seed: int = 0, attention_bias: bool = False) -> PreTrainedModel:
    return quantize_model(original_model(dtype, seed, attention_bias), FourfoldConfig())


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model whose weights are the quantized one's, dequantized."""
    twin = LlamaForCausalLM(copy.deepcopy(model.config)).to(model.dtype).eval()
    twin.config.quantization_config = None
    del twin.config.quantization_config
    for name, module in twin.named_modules():
        source = model.get_submodule(name)
        if isinstance(source, QuantizedLinear):
            module.weight.data = source.quantized.dequantize(model.dtype)
            if source.bias is not None:
                module.bias.data = source.bias.data.clone()
        else:
            for key, parameter in module.named_parameters(recurse=False):
                parameter.data = getattr(source, key).data.clone()
    return twin


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def randomise(model: PeftModel, seed: int = 3, scale: float = 0.1) -> PeftModel:
    """Give every adapter weight a value, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * scale
        elif "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator).to(parameter)
    return model


def copy_adapters(source: PeftModel, target: PeftModel) -> None:
    """The same values under the same names; fails if there is any other name."""
    values = {name: value for name, value in source.state_dict().items() if "lora_" in name}
    wanted = {name for name in target.state_dict() if "lora_" in name}
    assert set(values) == wanted
    target.load_state_dict(values, strict=False)
