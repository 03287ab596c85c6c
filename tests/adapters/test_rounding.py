"""An adapter's product is summed with its layer's before the output is rounded to 16 bits.

A 16-bit output is a multiple of its unit in the last place. An adapter that starts from B = 0 moves it by less than
half of that for many steps: added to the rounded output that is nothing at all, added before it is kept on average.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from twins import copy_adapters, dense_twin, quantized_model, randomise, tokens

from fourfold.adapters.lora import LoraQuantizedLinear, register
from fourfold.models.preparing import prepare
from fourfold.quantization.linear import QuantizedLinear

# B's size for which most products are below half a unit in the last place of a bf16 output.
SMALL = 3e-6


def config(**options: Any) -> LoraConfig:
    return register(LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **options}))


def make_layer(dtype: torch.dtype = torch.bfloat16, bias: bool = False, **options: Any) -> LoraQuantizedLinear:
    torch.manual_seed(2)
    base = QuantizedLinear.from_linear(nn.Linear(128, 96, bias=bias, dtype=dtype))
    layer = LoraQuantizedLinear(base, "default", config(**options), r=8, lora_alpha=16)
    layer.lora_A.float(), layer.lora_B.float()
    fill(layer, "default", SMALL)
    return layer


def fill(layer: LoraQuantizedLinear, name: str, scale: float) -> None:
    nn.init.normal_(layer.lora_A[name].weight)
    nn.init.normal_(layer.lora_B[name].weight, std=scale)
    if layer.lora_B[name].bias is not None:
        nn.init.normal_(layer.lora_B[name].bias, std=scale)


def base_output(layer: LoraQuantizedLinear, x: Tensor) -> Tensor:
    """x W^T + b in float64, W as x's products see it."""
    base = layer.get_base_layer()
    out = x.double() @ base.quantized.dequantize(x.dtype).double().T
    return out if base.bias is None else out + base.bias.double()


def product(layer: LoraQuantizedLinear, x: Tensor, name: str = "default") -> Tensor:
    """What an adapter adds, in float64."""
    b = layer.lora_B[name]
    low = x.double() @ layer.lora_A[name].weight.double().T
    return layer.scaling[name] * nn.functional.linear(
        low, b.weight.double(), None if b.bias is None else b.bias.double()
    )


def share(moved: Tensor, delta: Tensor) -> float:
    """How much of `delta` there is in `moved`: the slope of the one over the other."""
    return float(((moved.double() * delta).sum() / delta.square().sum()).detach())


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"use_rslora": True}, {"lora_bias": True}, {"lora_bias": True, "bias": True}],
    ids=["lora", "biased", "rslora", "lora_bias", "lora_bias over a bias"],
)
def test_a_product_smaller_than_the_outputs_rounding_moves_the_output_by_its_size(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    x = torch.randn(512, 128).bfloat16()
    base, delta = base_output(layer, x), product(layer, x)
    assert layer.scaling["default"] == pytest.approx(16 / 8**0.5 if "use_rslora" in options else 2)
    assert share(layer(x) - base, delta) == pytest.approx(1, abs=0.1)
    # What a sum of two rounded products keeps of it.
    assert share((base.bfloat16() + delta.bfloat16()) - base, delta) < 0.6


def test_a_small_adapter_is_not_lost_beside_a_large_one() -> None:
    layer = make_layer()
    layer.update_layer("second", 4, 8, config(r=4))
    layer.lora_A.float(), layer.lora_B.float()
    fill(layer, "second", SMALL)
    fill(layer, "default", 0.03)
    layer.set_adapter(["default", "second"])
    x = torch.randn(4096, 128).bfloat16()
    with_it, delta = layer(x).double(), product(layer, x, "second")
    nn.init.zeros_(layer.lora_B["second"].weight)
    assert delta.abs().mean() < 2.0**-9 * product(layer, x).abs().mean()
    assert share(with_it - layer(x).double(), delta) == pytest.approx(1, abs=0.25)


def test_under_autocast_the_output_moves_by_the_products_size_too() -> None:
    layer = make_layer(torch.float32)
    x = torch.randn(512, 128).bfloat16()
    base, delta = base_output(layer, x), product(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.float())
    assert out.dtype == torch.bfloat16
    assert share(out - base, delta) == pytest.approx(1, abs=0.1)


def test_dropout_sees_each_adapters_own_input_and_its_product_is_kept() -> None:
    layer = make_layer(lora_dropout=0.5)
    x = torch.randn(512, 128).bfloat16()
    torch.manual_seed(4)
    out = layer(x)
    torch.manual_seed(4)
    dropped = layer.lora_dropout["default"](x)
    assert share(out - base_output(layer, x), product(layer, dropped)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("scale", "bias"), [(SMALL, False), (0.03, False), (SMALL, True), (0.03, True)])
def test_the_output_is_no_further_from_float64_than_a_sum_of_rounded_products(scale: float, bias: bool) -> None:
    layer = make_layer(bias=bias)
    fill(layer, "default", scale)
    x = torch.randn(512, 128).bfloat16()
    low = x @ layer.lora_A["default"].weight.bfloat16().T
    separate = layer.get_base_layer()(x) + (low * 2) @ layer.lora_B["default"].weight.bfloat16().T
    exact = base_output(layer, x) + product(layer, x)
    assert (layer(x).double() - exact).norm() <= (separate.double() - exact).norm() * 1.001


def test_an_adapter_that_is_dora_adds_to_the_rounded_output_as_pefts_does() -> None:
    """And plain adapters beside it keep their place in the sum."""
    model = quantized_model()
    configs = {"default": config(), "dora": config(use_dora=True), "last": config(r=4)}
    reference = get_peft_model(dense_twin(model), configs["default"])
    ours = prepare(model, configs["default"])
    for name in ("dora", "last"):
        reference.add_adapter(name, configs[name])
        ours.add_adapter(name, register(configs[name]))
    copy_adapters(randomise(ours), reference)
    for order in (["default", "dora"], ["dora", "last"], ["default", "last", "dora"], ["default", "dora", "last"]):
        outputs, gradients = [], []
        for each in (ours.eval(), reference.eval()):
            each.base_model.set_adapter(order)
            each.zero_grad()
            outputs.append(each(input_ids=tokens(), labels=tokens()))
            outputs[-1].loss.backward()
            gradients.append({key: p.grad for key, p in each.named_parameters() if p.grad is not None})
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
        assert gradients[0].keys() == gradients[1].keys()
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_two_adapters_of_a_float64_layer_agree_with_autograd(options: dict[str, Any], bias: bool) -> None:
    layer = make_layer(torch.float32, bias=bias, **options).double()
    layer.update_layer("second", 4, 8, config(r=4, **options))
    layer.double()
    fill(layer, "second", 0.1)
    fill(layer, "default", 0.1)
    layer.set_adapter(["default", "second"])
    x = torch.randn(2, 7, 128, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for name, p in layer.named_parameters() if "lora" in name)]
    upstream = torch.randn(2, 7, 96, dtype=torch.float64)
    torch.manual_seed(4)
    out = layer(x)
    torch.manual_seed(4)
    expected = base_output(layer, x)
    for name in ("default", "second"):
        expected = expected + product(layer, layer.lora_dropout[name](x), name)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert len(leaves) == 1 + 2 * (3 if "lora_bias" in options else 2)
    pairs = zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    )
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_a_layers_own_bias_is_trained_in_its_dtype() -> None:
    layer = make_layer(bias=True)
    layer.get_base_layer().bias.requires_grad_()
    layer(torch.randn(5, 128).bfloat16()).sum().backward()
    assert torch.equal(layer.get_base_layer().bias.grad, torch.full((96,), 5.0, dtype=torch.bfloat16))


def test_no_rows_give_no_rows() -> None:
    layer = make_layer()
    x = torch.randn(2, 0, 128).bfloat16().requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert out.shape == (2, 0, 96)
    assert layer.lora_B["default"].weight.grad.count_nonzero() == 0


def test_a_hook_on_the_base_layer_still_runs() -> None:
    layer, seen = make_layer(), []
    layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(torch.randn(3, 128).bfloat16())
    assert seen == [(3, 96)]
