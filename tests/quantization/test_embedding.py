"""Quantized embeddings, and output heads that share their codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fourfold
from fourfold.errors import QuantizationError
from fourfold.export.merging import merge_adapter
from fourfold.models.size import model_size
from fourfold.quantization.embedding import QuantizedEmbedding
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import quantize


def llama(*, tied: bool, hidden_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def embedding(rows: int, dim: int, name: str, double_quant: bool) -> QuantizedEmbedding:
    layer = QuantizedEmbedding(rows, dim, number_format=name, dtype=torch.float32)
    layer.quantized = quantize(torch.randn(rows, dim), name, 64, double_quant)
    return layer


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("dim", [64, 192, 48, 33])
def test_rows_are_those_of_the_dequantized_table(dim: int, name: str, double_quant: bool) -> None:
    layer = embedding(50, dim, name, double_quant)
    table = layer.quantized.dequantize()
    for ids in (torch.tensor([[3, 49, 0], [7, 7, 1]]), torch.tensor(5), torch.empty(0, dtype=torch.long)):
        assert torch.equal(layer(ids), nn.functional.embedding(ids, table))


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_answers_as_its_dequantized_twin_and_survives_saving(tied: bool, tmp_path: Path) -> None:
    llama(tied=tied).save_pretrained(tmp_path / "dense")
    options = {"quantization": FourfoldConfig(quantize_embeddings=True), "dtype": torch.float32}
    model = fourfold.load_model(tmp_path / "dense", **options)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear) == tied
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "quantized")
    entry = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "fourfold"
    again = fourfold.load_model(tmp_path / "quantized", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    if tied:
        assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    twin = LlamaForCausalLM(llama(tied=tied).config).eval()
    twin.load_state_dict(model.hf_quantizer.dequantize(again, torch.float32).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_memory_is_quantized_as_a_loaded_one(tied: bool, tmp_path: Path) -> None:
    dense = llama(tied=tied)
    dense.save_pretrained(tmp_path)
    config = FourfoldConfig(quantize_embeddings=True)
    ids = torch.arange(12)[None]
    loaded = fourfold.load_model(tmp_path, quantization=config, dtype=torch.float32)
    quantized = fourfold.quantize_model(dense.eval(), config)
    with torch.no_grad():
        assert torch.equal(quantized(ids).logits, loaded(ids).logits)
    assert model_size(quantized) == model_size(loaded)


def test_a_shared_head_is_counted_once() -> None:
    model = fourfold.quantize_model(llama(tied=True), FourfoldConfig(quantize_embeddings=True))
    twin = llama(tied=True)
    assert model_size(model).num_parameters == sum(parameter.numel() for parameter in twin.parameters())
    assert model_size(model).bits_per_quantized_weight < 4.2


def test_adapters_train_and_merge_over_a_quantized_embedding() -> None:
    model = fourfold.quantize_model(llama(tied=True), FourfoldConfig(quantize_embeddings=True))
    adapted = fourfold.prepare(model, LoraConfig(r=4, task_type="CAUSAL_LM"))
    adapted.enable_input_require_grads()
    ids = torch.arange(20).view(2, 10)
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0
            parameter.data.add_(parameter.grad)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        merged = merge_adapter(adapted, torch.float32)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(merged.get_input_embeddings()) is nn.Embedding
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()


def test_moving_to_another_dtype_leaves_the_scales() -> None:
    layer = embedding(20, 64, "nf4", True)
    before = layer.quantized.dequantize()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.quantized.dequantize(), before)


def test_a_head_that_shares_its_weight_says_which_option_quantizes_both(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match="quantize_embeddings=True"):
        fourfold.load_model(tmp_path, quantization=FourfoldConfig(quantize_lm_head=True))


def test_an_embedding_that_scales_its_rows_is_refused_by_name() -> None:
    class Scaled(nn.Embedding):
        pass

    model = llama(tied=False)
    model.set_input_embeddings(Scaled(200, 64))
    with pytest.raises(QuantizationError, match=r"model\.embed_tokens does more than look up rows"):
        fourfold.quantize_model(model, FourfoldConfig(quantize_embeddings=True))


def test_plain_from_pretrained_takes_the_option_too(tmp_path: Path) -> None:
    llama(tied=False).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FourfoldConfig(quantize_embeddings=True, quantize_lm_head=True)
    )
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    assert not any(type(module) in (nn.Linear, nn.Embedding) for module in model.modules())
