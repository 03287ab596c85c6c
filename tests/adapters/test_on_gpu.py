"""LoRA over a quantized layer on a GPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from fourfold.adapters.lora import LoraQuantizedLinear, register
from fourfold.quantization.linear import QuantizedLinear

pytestmark = pytest.mark.gpu


def make_layer(dtype: torch.dtype, bias: bool = True, scale: float = 0.05, **options: bool) -> LoraQuantizedLinear:
    torch.manual_seed(0)
    base = QuantizedLinear.from_linear(nn.Linear(256, 384, bias=bias, device="cuda", dtype=dtype))
    config = register(LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], **options))
    layer = LoraQuantizedLinear(base, "default", config, r=16, lora_alpha=32).cuda()
    layer.lora_A.float(), layer.lora_B.float()
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor["default"].weight, std=scale)
    return layer


def in_float64(layer: LoraQuantizedLinear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The layer's output, and x, A, B, which it is a function of."""
    base = layer.get_base_layer()
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out = wide[0] @ base.quantized.dequantize(x.dtype).double().T + 2.0 * (wide[0] @ wide[1].T) @ wide[2].T
    return out if base.bias is None else out + base.bias.double(), wide


@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_output_and_gradients_agree_with_float64_and_those_of_a_and_b_are_fp32(rows: int, bias: bool) -> None:
    layer = make_layer(torch.bfloat16, bias)
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_out = torch.randn(rows, 384, device="cuda", dtype=torch.bfloat16)
    out = layer(x)
    out.backward(grad_out)
    expected, wide = in_float64(layer, x)
    expected.backward(grad_out.double())
    assert (out.double() - expected).norm() / expected.norm() < 3e-3
    ours = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for tensor, reference, bound in zip(ours, wide, (1e-2, 6e-3, 6e-3), strict=True):
        assert (tensor.grad.double() - reference.grad).norm() / reference.grad.norm() < bound
    assert ours[1].grad.dtype == ours[2].grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapters_small_product_moves_the_output_by_its_size(rows: int, dtype: torch.dtype) -> None:
    layer = make_layer(dtype, bias=False, scale=2e-3)
    x = torch.randn(rows, 256, device="cuda", dtype=dtype)
    base = x.double() @ layer.get_base_layer().quantized.dequantize(dtype).double().T
    delta = in_float64(layer, x)[0].detach() - base
    moved = layer(x).detach().double() - base
    # Below half a unit in the last place of most outputs; their rounding is noise, which averages out.
    assert delta.abs().mean() < 2.0**-9 * base.abs().mean()
    kept = float((moved * delta).sum() / delta.square().sum())
    assert kept == pytest.approx(1, abs=0.1 if rows > 64 else 0.4)


@pytest.mark.parametrize("rows", [1, 16, 64, 65])
def test_generating_agrees_with_float64(rows: int) -> None:
    layer = make_layer(torch.bfloat16).eval()
    x = torch.randn(1, rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        out = layer(x)
    expected = in_float64(layer, x)[0]
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 4e-3
