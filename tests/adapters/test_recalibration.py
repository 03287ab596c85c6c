"""Quantizing a base anew with its adapter merged in, within a model and within a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from fourfold import pipeline
from fourfold.adapters.lora import LoraQuantizedLinear
from fourfold.adapters.recalibration import requantize
from fourfold.config import RunConfig
from fourfold.errors import AdapterError, ConfigError
from fourfold.models.loading import load_model
from fourfold.models.preparing import prepare
from fourfold.optimizers import AdamW
from fourfold.quantization.hf_config import FourfoldConfig


def learned(tiny_llama: Path, scale: float, **options: object) -> PeftModel:
    """A model whose adapter has an effect `scale` times the weights'."""
    torch.manual_seed(0)
    base = load_model(tiny_llama, quantization=FourfoldConfig(**options), dtype=torch.float32, device="cpu")
    model = prepare(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for layer in layers(model):
        up = layer.lora_B["default"].weight
        torch.nn.init.normal_(up)
        delta = layer.get_delta_weight("default")
        up.data *= scale * layer.get_base_layer().quantized.dequantize().norm() / delta.norm()
    return model


def layers(model: PeftModel) -> list[LoraQuantizedLinear]:
    return [layer for layer in model.modules() if isinstance(layer, LoraQuantizedLinear)]


def sums(model: PeftModel) -> list[torch.Tensor]:
    return [layer.merged_weight(["default"]).clone() for layer in layers(model)]


def distance(model: PeftModel, before: list[torch.Tensor]) -> float:
    pairs = list(zip(sums(model), before, strict=True))
    with torch.no_grad():
        return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("options", [{}, {"bnb_4bit_quant_type": "int8"}, {"load_in_8bit": True}], ids=str)
def test_the_base_takes_up_the_adapter_and_the_adapter_the_rest(tiny_llama: Path, options: dict[str, object]) -> None:
    model = learned(tiny_llama, 1.0, **options)
    codes = [layer.get_base_layer().quantized.codes.clone() for layer in layers(model)]
    before = sums(model)
    kept = requantize(model)
    assert all(
        not torch.equal(a, b.get_base_layer().quantized.codes) for a, b in zip(codes, layers(model), strict=True)
    )
    assert all(
        b.get_delta_weight("default").norm() < 0.2 * b.get_base_layer().quantized.dequantize().norm()
        for b in layers(model)
    )
    assert distance(model, before) < 0.1
    assert kept > 0.85


def test_what_the_codes_do_not_show_is_kept_by_the_adapter_and_lost_without_it(tiny_llama: Path) -> None:
    kept, zeroed = learned(tiny_llama, 1e-3), learned(tiny_llama, 1e-3)
    before = sums(kept)
    assert requantize(kept) > 0.3
    assert requantize(zeroed, keeps_rest=False) < 0.2
    assert distance(kept, before) < 0.7e-3 < distance(zeroed, before)
    assert all(not layer.lora_B["default"].weight.any() for layer in layers(zeroed))


def test_nothing_learned_changes_nothing_and_random_numbers_are_left_alone(tiny_llama: Path) -> None:
    model = prepare(
        load_model(tiny_llama, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu"), LoraConfig(r=4)
    )
    before = sums(model)
    assert requantize(model) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, sums(model), strict=True))
    first, second = learned(tiny_llama, 0.1), learned(tiny_llama, 0.1)
    torch.manual_seed(5)
    requantize(first, seed=1)
    state = torch.get_rng_state()
    requantize(second, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(sums(first), sums(second), strict=True))


def test_dora_and_a_dense_base_are_refused(tiny_llama: Path) -> None:
    quantized = load_model(tiny_llama, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    with pytest.raises(AdapterError, match="plain LoRA"):
        requantize(prepare(quantized, LoraConfig(r=4, use_dora=True)))
    dense = load_model(tiny_llama, dtype=torch.float32, device="cpu")
    with pytest.raises(AdapterError, match="no layer"):
        requantize(prepare(dense, LoraConfig(r=4)))


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_without_state_starts_anew(bits: int) -> None:
    parameters = [torch.nn.Parameter(torch.ones(8, 512)) for _ in range(2)]
    used, fresh = (AdamW([parameter], lr=0.1, state_bits=bits) for parameter in parameters)
    parameters[0].grad = torch.randn(8, 512)
    used.step()
    used.load_state_dict({"state": {}, "param_groups": used.state_dict()["param_groups"]})
    parameters[0].data.fill_(1.0)
    for parameter, optimizer in zip(parameters, (used, fresh), strict=True):
        parameter.grad = torch.full((8, 512), 0.5)
        optimizer.step()
    assert torch.equal(*parameters)


def test_a_run_that_requantizes_resumes_exactly_and_saves_its_base(
    tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_run(tmp_path, requantize_every=2, max_steps=6, save_steps=3, save_total_limit=None)
    whole = pipeline.train(config)
    output = whole.output_dir
    assert (output / "base" / "config.json").is_file()
    original = load_model(config.model_name_or_path, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    name = "model.layers.0.self_attn.q_proj.weight"
    codes = {
        folder: load_file(folder / "base" / "model.safetensors")[name]
        for folder in (output / "checkpoint-3", output / "checkpoint-6", output)
    }
    assert not torch.equal(codes[output / "checkpoint-3"], original.state_dict()[name])
    assert not torch.equal(codes[output / "checkpoint-3"], codes[output / "checkpoint-6"])
    assert torch.equal(codes[output / "checkpoint-6"], codes[output])
    assert pipeline.evaluate(config)["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=1e-6)
    # From the middle, with the later base out of the way.
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    for folder in ("base", "adapter", "checkpoint-6"):
        shutil.rmtree(output / folder)
    resumed = pipeline.train(config.model_copy(update={"resume_from_checkpoint": "auto"}))
    again = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[key], again[key]) for key in adapter)
    assert torch.equal(load_file(output / "base" / "model.safetensors")[name], codes[output])
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]
    report = pipeline.merge(str(output), tmp_path / "merged")
    assert report.difference.relative_error < 0.02
    with pytest.raises(ConfigError, match="requantize_every"):
        pipeline.merge(str(output), tmp_path / "other", onto="original")
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        output / "base"
    )
