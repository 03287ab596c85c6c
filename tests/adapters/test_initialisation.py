from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from twins import original_model, quantized_model

from fourfold.adapters.initialisation import changes_base, initialise
from fourfold.adapters.lora import LoraQuantizedLinear, register
from fourfold.errors import AdapterError
from fourfold.quantization.hf_quantizer import quantize_model


def adapted(**options: object) -> PeftModel:
    config = LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": "all-linear", **options})
    return get_peft_model(quantized_model(), register(config))


def originals() -> Callable[[str], Tensor]:
    model = original_model()
    return lambda name: model.get_submodule(name).weight.data


def layers(model: PeftModel) -> Iterator[tuple[str, LoraQuantizedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraQuantizedLinear):
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def errors(model: PeftModel) -> list[tuple[float, float]]:
    """For each layer ||W - (Q + s B A)|| and ||W - Q(W)||, in float64."""
    plain, original = quantized_model(), originals()
    result = []
    for name, layer in layers(model):
        weight = original(name).double()
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        base = layer.get_base_layer().quantized.dequantize(torch.float32).double()
        start = base + layer.scaling["default"] * b @ a
        rounded = plain.get_submodule(name).quantized.dequantize(torch.float32).double()
        result.append((float((weight - start).norm()), float((weight - rounded).norm())))
    return result


METHODS = [("pissa", 1), ("pissa_niter_4", 1), ("loftq", 1), ("loftq", 3)]


@pytest.mark.parametrize(("method", "iterations"), METHODS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_layer_starts_nearer_to_the_original_than_quantizing_alone(
    method: str, iterations: int, use_rslora: bool
) -> None:
    model = adapted(use_rslora=use_rslora)
    initialise(model, method, originals(), loftq_iterations=iterations)
    found = errors(model)
    assert len(found) == 14
    assert all(start < rounded for start, rounded in found)


def test_more_loftq_iterations_come_nearer() -> None:
    once, thrice = adapted(), adapted()
    initialise(once, "loftq", originals(), loftq_iterations=1)
    initialise(thrice, "loftq", originals(), loftq_iterations=3)
    assert sum(start for start, _ in errors(thrice)) < sum(start for start, _ in errors(once))


def test_loftq_takes_the_best_factors_of_the_rank() -> None:
    model = adapted()
    initialise(model, "loftq", originals())
    plain, original = quantized_model(), originals()
    for (name, _), (start, _) in zip(layers(model), errors(model), strict=True):
        lost = original(name) - plain.get_submodule(name).quantized.dequantize(torch.float32)
        best = torch.linalg.svdvals(lost.double())[8:].norm()
        assert start == pytest.approx(float(best), rel=1e-4)


def test_pissa_factors_are_the_leading_singular_directions() -> None:
    model = adapted()
    initialise(model, "pissa", originals())
    name, layer = next(layers(model))
    u, s, v = torch.linalg.svd(originals()(name).double(), full_matrices=False)
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product.double(), u[:, :8] * s[:8] @ v[:8], rtol=1e-4, atol=1e-5)


def test_pissa_without_originals_starts_from_the_dequantized_weights() -> None:
    model = adapted()
    initialise(model, "pissa", None)
    name, layer = next(layers(model))
    before = quantized_model().get_submodule(name).quantized.dequantize(torch.float32)
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert float(torch.linalg.svdvals((before - product).double())[0]) == pytest.approx(
        float(torch.linalg.svdvals(before.double())[8]), rel=1e-3
    )


@pytest.mark.parametrize(("method", "iterations"), METHODS)
def test_changes_base_says_whether_the_codes_differ(method: str, iterations: int) -> None:
    model = adapted()
    initialise(model, method, originals(), loftq_iterations=iterations)
    plain = quantized_model()
    same = [
        torch.equal(layer.get_base_layer().weight, plain.get_submodule(name).weight) for name, layer in layers(model)
    ]
    assert any(same) != changes_base(method, iterations)


@pytest.mark.parametrize("method", [True, False, "gaussian", "eva", None])
def test_other_initialisations_change_no_base(method: object) -> None:
    assert not changes_base(method)


def test_transposed_weights_are_turned_as_the_layer_holds_them() -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))

    source = gpt2()
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=False)
    model = get_peft_model(quantize_model(gpt2()), register(config))
    initialise(model, "loftq", lambda name: source.get_submodule(name).weight.data)
    _, layer = next(layers(model))
    weight = source.transformer.h[0].attn.c_attn.weight.data.T
    start = layer.get_base_layer().quantized.dequantize() + layer.get_delta_weight("default")
    assert float((weight - start).norm()) < float((weight - layer.get_base_layer().quantized.dequantize()).norm())


@pytest.mark.parametrize("method", ["pizza", "pissa_niter_", "pissa_niter_x", "LoftQ"])
def test_unknown_methods_are_refused(method: str) -> None:
    with pytest.raises(AdapterError, match="unknown initialisation"):
        initialise(adapted(), method, originals())


def test_loftq_without_originals_is_refused() -> None:
    with pytest.raises(AdapterError, match="original 16-bit weights"):
        initialise(adapted(), "loftq", None)


def test_rank_above_the_layers_size_is_refused_with_its_name() -> None:
    with pytest.raises(AdapterError, match=r"self_attn\.k_proj[\s\S]*at most 32"):
        initialise(adapted(r=40, target_modules=["k_proj"]), "pissa", originals())


def test_originals_of_another_shape_are_refused_with_their_name() -> None:
    with pytest.raises(AdapterError, match=r"q_proj is another model's"):
        initialise(adapted(), "pissa", lambda name: torch.zeros(3, 3))


def test_a_model_that_is_not_quantized_is_refused() -> None:
    model = get_peft_model(original_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="no layer with an adapter is quantized"):
        initialise(model, "pissa", None)
