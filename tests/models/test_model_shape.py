"""A model's shape from its configuration, against the model."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, adapted, decoder
from transformers import GPT2Config

from fourfold.models.families import default_target_modules
from fourfold.models.model_shape import model_shape
from fourfold.models.size import model_size
from fourfold.quantization.hf_config import FourfoldConfig


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("quantized", [True, False])
def test_weights_are_counted_as_in_the_model(name: str, quantized: bool) -> None:
    model = decoder(name, torch.bfloat16, quantized=quantized)
    size = model_size(model)
    shape = model_shape(model.config, FourfoldConfig() if quantized else None, 4)
    assert (shape.num_parameters, shape.num_quantized) == (size.num_parameters, size.num_quantized)
    assert shape.code_bytes + shape.scale_bytes + 2 * shape.num_dense == size.num_bytes


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "down_proj"], r".*\.1\.mlp\.(gate|up)_proj"])
def test_adapters_are_counted_as_peft_puts_them_on(name: str, targets: list[str] | str | None) -> None:
    model = decoder(name, quantized=True)
    shape = model_shape(model.config, FourfoldConfig(), 4, targets)
    wanted = targets or default_target_modules(model.config.model_type)
    prepared = adapted(model, fused=False, target_modules=wanted, task_type="CAUSAL_LM")
    trained = [tuple(value.shape) for value in prepared.parameters() if value.requires_grad]
    assert sorted(shape.adapter_shapes) == sorted(trained)


def test_quantized_heads_and_other_formats_are_counted() -> None:
    model = decoder("llama-gqa", quantized=False)
    plain = model_shape(model.config, FourfoldConfig(), 4)
    options = {"bnb_4bit_quant_type": "int8", "bnb_4bit_use_double_quant": False, "quantize_lm_head": True}
    wide = model_shape(model.config, FourfoldConfig(**options), 4)
    assert wide.head_is_quantized
    assert not plain.head_is_quantized
    assert wide.num_quantized == plain.num_quantized + 64 * 96
    assert wide.code_bytes == wide.num_quantized
    assert wide.scale_bytes == 4 * wide.num_quantized // 64


def test_a_family_without_a_fused_block_has_weights_and_no_blocks() -> None:
    shape = model_shape(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50), FourfoldConfig(), 2)
    assert not shape.is_fused
    assert shape.blocks == ()
    assert shape.num_quantized == 2 * 12 * 32 * 32
