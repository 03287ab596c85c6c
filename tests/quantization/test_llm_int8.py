"""LLM.int8() as the base of a model: layers, checkpoints, adapters, merging, planning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import CheckpointError, QuantizationError
from fourfold.models.followed_layer import followed_shape
from fourfold.models.loading import load_model
from fourfold.models.preparing import prepare
from fourfold.models.shape_check import shape_differences
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.inspection import inspect_checkpoint
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import quantize

INT8 = FourfoldConfig(load_in_8bit=True)
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> PreTrainedModel:
    return load_model(tiny_llama, quantization=INT8, dtype=torch.float32, device="cpu")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def test_a_layer_and_its_gradient_are_bitsandbytes() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).half()
    ours = QuantizedLinear.from_linear(linear, format="llm_int8")
    x = torch.randn(2, 5, 64).half()
    x[..., 3] = 20
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    state = MatmulLtState()
    state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data)
    state.threshold, state.has_fp16_weights = 6.0, False
    theirs = MatMul8bitLt.apply(inputs[0], linear.weight.data, None, linear.bias.data, state)
    mine = ours(inputs[1])
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)
    weights = torch.randn(48).half()
    for out in (theirs, mine):
        (out * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=2e-3, atol=2e-3)
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    assert (mine - exact).norm() < 0.02 * exact.norm()


def test_all_linear_layers_but_the_head_are_int8_and_the_logits_stay_close(
    loaded: PreTrainedModel, tiny_llama: Path
) -> None:
    layers = {name: one for name, one in loaded.named_modules() if isinstance(one, QuantizedLinear)}
    assert len(layers) == 14
    assert all(one.weight.dtype == torch.int8 for one in layers.values())
    dense = logits(load_model(tiny_llama, dtype=torch.float32, device="cpu"))
    assert (logits(loaded) - dense).norm() < 0.02 * dense.norm()


def test_a_checkpoint_comes_back_bit_for_bit_and_is_bitsandbytes_own(loaded: PreTrainedModel, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    read = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(logits(read), logits(loaded))
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["load_in_8bit"], entry["llm_int8_threshold"]) == ("bitsandbytes", True, 6.0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    # bitsandbytes does not round the input on a CPU that is not trained on.
    torch.testing.assert_close(logits(theirs), logits(loaded), rtol=0, atol=0.02)
    found = inspect_checkpoint(tmp_path).total
    assert (found.format, round(found.bits_per_weight, 2)) == ("llm_int8", 8.44)


def test_checkpoints_of_bitsandbytes_are_read(tiny_llama: Path, loaded: PreTrainedModel, tmp_path: Path) -> None:
    entry = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)
    AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=entry, device_map="cpu", dtype=torch.float16
    ).save_pretrained(tmp_path)
    read = load_model(tmp_path, dtype=torch.float32, device="cpu")
    ours, theirs = loaded.model.layers[1].mlp.up_proj.quantized, read.model.layers[1].mlp.up_proj.quantized
    assert theirs.outlier_threshold == 5.0
    # They round to fp16 first.
    assert (ours.codes != theirs.codes).float().mean() < 0.02
    torch.testing.assert_close(ours.scales.dequantize(), theirs.scales.dequantize(), rtol=1e-3, atol=0)


def test_a_checkpoint_that_lacks_scales_or_has_others_is_refused(loaded: PreTrainedModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    loaded.save_pretrained(tmp_path)
    entries = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.SCB"
    save_file(entries | {key: entries[key][:-1].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit each other"):
        load_model(tmp_path, dtype=torch.float32, device="cpu")


def test_moving_and_load_state_dict_keep_scales_and_threshold() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(16, 8), format="llm_int8", outlier_threshold=4.0)
    other = QuantizedLinear.from_linear(nn.Linear(16, 8), format="llm_int8", outlier_threshold=3.0)
    other.load_state_dict(layer.to(torch.bfloat16).state_dict())
    assert torch.equal(other.quantized.codes, layer.quantized.codes)
    assert torch.equal(other.quantized.scales.dequantize(), layer.quantized.scales.dequantize())
    assert layer.quantized.scales.dequantize().dtype == torch.float32
    assert (layer.quantized.outlier_threshold, other.quantized.outlier_threshold) == (4.0, 3.0)
    with pytest.raises(RuntimeError, match="SCB"):
        other.load_state_dict({"weight": layer.weight, "bias": layer.bias})


def test_gradients_of_an_adapter_are_those_over_bitsandbytes_dequantized_weight(tiny_llama: Path) -> None:
    torch.manual_seed(0)
    model = load_model(tiny_llama, quantization=INT8, dtype=torch.float32, device="cpu")
    adapted = prepare(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    # The same adapter over the dequantized weight, its input not rounded: what rounding it does to gradients is small.
    grads = {name: one.grad.clone() for name, one in adapted.named_parameters() if one.grad is not None}
    assert len(grads) == 28
    for module in adapted.modules():
        if isinstance(getattr(module, "base_layer", None), QuantizedLinear):
            module.base_layer.quantized = replace(module.base_layer.quantized, outlier_threshold=None)
    adapted.zero_grad()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: one.grad for name, one in adapted.named_parameters() if one.grad is not None}
    assert all((grads[name] - found[name]).norm() < 0.1 * found[name].norm() for name in grads)


def test_the_plan_describes_the_model_that_is_loaded(tiny_llama: Path, loaded: PreTrainedModel) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    shape = followed_shape(loaded.config, INT8, lora, torch.float32)
    model = load_model(tiny_llama, quantization=INT8, dtype=torch.float32, device="cpu")
    assert list(shape_differences(shape, prepare(model, lora))) == []


def test_a_run_trains_saves_merges_and_answers(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_run(tmp_path, load_in_8bit=True, lora_dropout=0.1, save_steps=4)
    run = pipeline.train(config)
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 0.1
    assert "load_in_8bit" in (run.output_dir / "README.md").read_text()
    assert pipeline.evaluate(config)["eval_loss"] == pytest.approx(run.metrics["eval_loss"])
    # What is merged does not round its inputs.
    report = pipeline.merge(str(run.output_dir), tmp_path / "merged", bound=0.1)
    assert 0.001 < report.difference.relative_error < 0.1
    assert list(pipeline.chat(str(run.output_dir), max_new_tokens=3).reply([{"role": "user", "content": "Anna"}]))


@pytest.mark.parametrize("option", [{"calibration": "mse"}, {"rounding": "stochastic"}, {"outlier_threshold": -1.0}])
def test_what_the_format_does_not_know_is_refused(option: dict[str, object]) -> None:
    with pytest.raises(QuantizationError):
        quantize(torch.ones(2, 2), "llm_int8", **option)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="has no bnb_4bit_quant_type"):
        FourfoldConfig(load_in_8bit=True, bnb_4bit_quant_type="fp4")
    with pytest.raises(QuantizationError, match="no rows"):
        quantize(torch.ones(3), "llm_int8")
