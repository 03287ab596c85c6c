"""What is planned with is what is loaded; where it is not, the part is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import DECODERS, adapted, decoder
from peft import LoraConfig, PeftModel

from fourfold.models.followed_layer import followed_shape
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.preparing import prepare
from fourfold.models.shape_check import shape_differences
from fourfold.models.streaming import stream_base
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model


def pair(name: str, quantization: FourfoldConfig | None, *, fused: bool = False) -> tuple[ModelShape, PeftModel]:
    model = decoder(name, quantized=False)
    shape = model_shape(model.config, quantization, 4)
    if quantization is not None:
        model = quantize_model(model, quantization)
    return shape, adapted(model, fused=fused, task_type="CAUSAL_LM")


def followed_pair(name: str, quantization: FourfoldConfig | None, **options: Any) -> tuple[ModelShape, PeftModel]:
    model = decoder(name, quantized=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    shape = followed_shape(model.config, quantization, lora, torch.float32)
    return shape, prepare(model if quantization is None else quantize_model(model, quantization), lora, fused=False)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_loaded_is_what_was_planned(name: str, quantized: bool, fused: bool) -> None:
    shape, model = pair(name, FourfoldConfig() if quantized else None, fused=fused)
    assert list(shape_differences(shape, model)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_quant_type": "int8"},
        {"bnb_4bit_use_double_quant": False, "bnb_4bit_blocksize": 128},
        {"quantize_embeddings": True},
        {"modules_to_not_convert": ["down_proj"]},
    ],
)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa-tied", "llama-odd"])
def test_however_it_is_quantized(name: str, options: dict[str, Any]) -> None:
    shape, model = pair(name, FourfoldConfig(**options))
    assert list(shape_differences(shape, model)) == []


GENERIC: list[dict[str, Any]] = [
    {"lora_dropout": 0.1},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"], "use_dora": True},
]


@pytest.mark.parametrize("options", GENERIC, ids=["dropout", "dora", "head-trained", "embedding-trained"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa-tied", "qwen3-head-norms"])
def test_what_takes_the_generic_path_is_what_was_planned(name: str, quantized: bool, options: dict[str, Any]) -> None:
    assert list(shape_differences(*followed_pair(name, FourfoldConfig() if quantized else None, **options))) == []


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa-tied"])
def test_a_quantized_embedding_is_counted_where_layers_are_followed(name: str) -> None:
    quantization = FourfoldConfig(quantize_embeddings=True)
    assert list(shape_differences(*followed_pair(name, quantization, lora_dropout=0.1))) == []


def test_an_adapter_without_its_magnitudes_is_not_what_was_planned() -> None:
    shape, _ = followed_pair("llama-gqa", FourfoldConfig(), use_dora=True)
    _, model = followed_pair("llama-gqa", FourfoldConfig(), lora_dropout=0.1)
    differences = [str(one) for one in shape_differences(shape, model)]
    assert "adapter matrices: planned 42, found 28" in differences


def test_a_quantized_head_is_counted() -> None:
    shape, model = pair("llama-odd", FourfoldConfig(quantize_lm_head=True))
    assert list(shape_differences(shape, model)) == []


def test_a_base_that_streams_is_the_same_model() -> None:
    shape, model = pair("llama-gqa", FourfoldConfig())
    stream_base(model, "cpu")
    assert list(shape_differences(shape, model)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda shape: {"blocks": shape.blocks * 2}, "layers: planned 4, found 2"),
        (lambda shape: {"num_parameters": 100}, "weights of the base: planned 100, found "),
        (lambda shape: {"num_quantized": 1000}, "quantized weights: planned 1,000, found "),
        (lambda shape: {"code_bytes": 10 * shape.code_bytes}, "bytes of quantized weights: planned "),
        (lambda shape: {"adapter_shapes": shape.adapter_shapes[:-1]}, "adapter matrices: planned 27, found 28"),
        (lambda shape: {"adapter_shapes": ((4, 64),) * 28}, "weights of the adapter: planned 7,168, found "),
    ],
)
def test_the_part_that_differs_is_named(changes: Any, said: str) -> None:
    shape, model = pair("llama-gqa", FourfoldConfig())
    differences = [str(one) for one in shape_differences(replace(shape, **changes(shape)), model)]
    assert any(one.startswith(said) for one in differences), differences
