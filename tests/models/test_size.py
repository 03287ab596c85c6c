from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.models.loading import load_model
from fourfold.models.size import model_size
from fourfold.quantization.hf_config import FourfoldConfig


def test_a_dense_model_counts_as_torch_does(tiny_llama) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    size = model_size(model)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.num_bytes == 4 * size.num_parameters == 2 * size.num_bytes_16bit
    assert (size.num_quantized, size.bits_per_quantized_weight, size.formats) == (0, None, [])
    assert len(size.lines()) == 1


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_model_counts_codes_and_scales(tiny_llama, double_quant) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    config = FourfoldConfig(bnb_4bit_use_double_quant=double_quant)
    size = model_size(load_model(tiny_llama, quantization=config, dtype=torch.bfloat16, device="cpu"))
    quantized = sum(module.weight.numel() for name, module in dense.named_modules() if name.endswith("_proj"))
    assert (size.num_parameters, size.num_quantized) == (dense.num_parameters(), quantized)
    assert size.num_bytes_16bit == sum(parameter.nbytes for parameter in dense.parameters())
    # 4 bits a code; one fp32 scale, or one byte and its share of the nested scales, to 64 weights; and the tables.
    assert 0 <= size.bits_per_quantized_weight - (4.127 if double_quant else 4.5) < 2.5
    assert size.formats == ["nf4"]
    assert "nf4" in size.lines()[1]


def test_a_shared_weight_counts_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert model_size(model).num_parameters == 16
