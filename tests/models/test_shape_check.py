"""What is planned with is what is loaded; where it is not, the part is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from decoders import DECODERS, adapted, decoder
from peft import PeftModel

from fourfold.models.model_shape import ModelShape, model_shape
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
