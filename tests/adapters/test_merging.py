from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from twins import quantized_model, randomise, tokens

from fourfold.adapters.lora import LoraQuantizedLinear, register
from fourfold.errors import AdapterError
from fourfold.models.preparing import prepare
from fourfold.quantization.linear import QuantizedLinear


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options)
    return randomise(prepare(quantized_model(dtype), config)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


KINDS = [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}]


@pytest.mark.parametrize("options", KINDS, ids=["lora", "rslora", "lora_bias", "dora"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_model_answers_as_the_adapter_does(options: dict[str, Any], safe_merge: bool) -> None:
    model = trained(**options)
    wanted = logits(model)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=2e-5)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "base_layer" in name]
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_have_the_models_dtype(dtype: torch.dtype) -> None:
    model = trained(dtype, lora_bias=True)
    model.merge_adapter()
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name} == {dtype}


def test_merged_weight_is_formed_in_fp32_and_rounded_once() -> None:
    model = trained(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    base = layer.get_base_layer().quantized.dequantize(torch.bfloat16)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = base.double() + layer.scaling["default"] * b @ a
    merged = layer.merged_weight(["default"])
    assert merged.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits, and the fp32 product's own rounding.
    assert float(((merged.double() - exact).abs() / exact.abs()).max()) < 2**-8


@pytest.mark.parametrize("options", KINDS, ids=["lora", "rslora", "lora_bias", "dora"])
def test_unmerge_restores_the_quantized_layers_bit_for_bit(options: dict[str, Any]) -> None:
    model = trained(**options)
    wanted = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    assert any(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith("base_layer"))
    model.unmerge_adapter()
    after = model.state_dict()
    assert set(after) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in after.items())
    assert torch.equal(logits(model), wanted)


def test_a_merged_models_state_dict_holds_no_quantized_entries() -> None:
    model = trained()
    model.merge_adapter()
    assert not [name for name in model.state_dict() if "absmax" in name or "quant_state" in name]


def test_disabling_a_merged_adapter_gives_the_base_models_answers() -> None:
    model = trained()
    with model.disable_adapter():
        wanted = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)


def test_two_adapters_merge_as_they_act_together() -> None:
    model = prepare(quantized_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", register(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"])))
    model = randomise(model).eval()
    model.base_model.set_adapter(["default", "second"])
    wanted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=2e-5)


def test_merging_twice_is_refused() -> None:
    base = QuantizedLinear.from_linear(nn.Linear(16, 16))
    layer = LoraQuantizedLinear(base, "default", LoraConfig(r=2), r=2, lora_alpha=2)
    layer.update_layer("second", 2, 2, LoraConfig(r=2))
    layer.set_adapter(["default", "second"])
    layer.merge(adapter_names=["default"])
    with pytest.raises(AdapterError, match="merged already"):
        layer.merge(adapter_names=["second"])


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing() -> None:
    base = QuantizedLinear.from_linear(nn.Linear(16, 16))
    layer = LoraQuantizedLinear(base, "default", LoraConfig(r=2), r=2, lora_alpha=2)
    layer.lora_B["default"].weight.data.fill_(torch.inf)
    with pytest.raises(AdapterError, match="not finite"):
        layer.merge(safe_merge=True)
    assert layer.get_base_layer() is base
    assert not layer.merged
