"""QuantizedLinear against float64 arithmetic on the dequantized weight."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourfold.quantization.formats import FORMATS
from fourfold.quantization.linear import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of inputs, products and sums: a few units in the last place.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, **options: object) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(100, 30, bias=bias, dtype=dtype), **options)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(100,), (5, 100), (2, 3, 100), (0, 100)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_backward_are_those_of_the_dequantized_weight(
    name: str, dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    quantized = layer(bias, dtype, format=name)
    weight = quantized.quantized.dequantize(torch.float32).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    reference_x = x.detach().double().requires_grad_()
    reference_bias = quantized.bias.detach().double().requires_grad_() if bias else None
    expected = nn.functional.linear(reference_x, weight, reference_bias)
    result = quantized(x)
    assert result.dtype == dtype
    assert result.shape == expected.shape
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    result.backward(gradient)
    expected.backward(gradient.double())
    assert quantized.weight.grad is None
    if not x.numel():
        assert x.grad.shape == x.shape
        return
    assert relative_error(result, expected) < TOLERANCES[dtype]
    assert relative_error(x.grad, reference_x.grad) < TOLERANCES[dtype]
    if bias:
        assert relative_error(quantized.bias.grad, reference_bias.grad) < TOLERANCES[dtype]


def test_autocast_computes_in_its_own_dtype() -> None:
    quantized = layer()
    x = torch.randn(4, 100, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = quantized(x)
        expected = quantized.dense()(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    assert relative_error(result, expected.double()) < TOLERANCES[torch.bfloat16]
    result.sum().backward()
    assert x.grad.dtype == torch.float32


def test_no_dense_weight_is_kept_for_the_backward_pass() -> None:
    quantized = layer()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = quantized(torch.randn(4, 100, requires_grad=True))
    held = quantized.quantized
    function_state = vars(result.grad_fn)
    assert all(tensor.numel() < held.num_elements for tensor in kept)
    assert not [value for value in function_state.values() if isinstance(value, Tensor)]
    assert function_state["layer"] is quantized


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_the_module_rounds_no_scale(dtype: torch.dtype) -> None:
    for double_quant in (False, True):
        quantized = layer(double_quant=double_quant)
        expected = quantized.quantized.dequantize(torch.float32)
        quantized.to(dtype).to(torch.float64).to(dtype)
        assert quantized.bias.dtype == dtype
        assert torch.equal(quantized.quantized.dequantize(torch.float32), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_state_dict_goes_through_safetensors_and_back(name: str, assign: bool, tmp_path: Path) -> None:
    source = layer(format=name, block_size=128)
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    target = QuantizedLinear(100, 30, number_format=name, device="meta" if assign else None)
    target.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
    x = torch.randn(3, 100)
    assert torch.equal(target(x), source(x))
    assert target.quantized.block_size == 128


def test_loading_copies() -> None:
    source, target = layer(), layer(format="fp4")
    state = source.state_dict()
    expected = source.quantized.dequantize()
    target.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(target.quantized.dequantize(), expected)


def test_codes_without_their_state_are_refused_by_key() -> None:
    state = layer().state_dict()
    del state["weight.quant_state.bitsandbytes__nf4"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.quant_state\.bitsandbytes__nf4"):
        layer().load_state_dict(state)


def test_a_deep_copy_is_independent() -> None:
    source = layer()
    other = copy.deepcopy(source)
    expected = source.quantized.dequantize()
    source.weight.data.zero_()
    assert torch.equal(other.quantized.dequantize(), expected)


def test_dense_is_an_ordinary_layer_in_the_models_dtype() -> None:
    quantized = layer(dtype=torch.bfloat16)
    dense = quantized.dense()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, quantized.quantized.dequantize(torch.bfloat16))
    assert torch.equal(dense.bias, quantized.bias)
