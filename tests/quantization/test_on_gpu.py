"""The same numbers on a GPU as on the CPU, and as bitsandbytes' CUDA kernels give."""

from __future__ import annotations

import pytest
import torch

from fourfold.quantization.layout import from_state_dict
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import quantize

pytestmark = pytest.mark.gpu

SHAPES = ((576, 192), (77, 33), (1000, 640), (4096, 1024))


@pytest.mark.parametrize(
    ("name", "nested", "dtype"),
    [
        ("nf4", True, torch.float32),
        ("nf4", True, torch.bfloat16),
        ("nf4", True, torch.float16),
        ("nf4", False, torch.bfloat16),
        ("fp4", True, torch.bfloat16),
        ("fp4", False, torch.float32),
    ],
)
def test_dequantize_on_the_gpu_is_bit_equal_to_bitsandbytes(name: str, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        weight = torch.randn(shape, device="cuda").to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=nested)
        entries = {"w": codes} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
        ours = from_state_dict(entries, "w").dequantize()
        theirs = functional.dequantize_4bit(codes, state).view(shape)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_fresh_codes_on_the_gpu_agree_with_bitsandbytes_and_with_the_cpu(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # bf16 weights over their absmax fall on FP4's thresholds (7/12) more often than the bound allows, and there
    # bitsandbytes' CUDA constants (0.583333) are below them.
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16 if name == "nf4" else torch.float32)
    ours = quantize(weight, name, 64, double_quant=False)
    theirs, _ = functional.quantize_4bit(weight, blocksize=64, quant_type=name)
    on_cpu = quantize(weight.cpu(), name, 64, double_quant=False)
    # Compared by value: FP4 has two codes for zero.
    values = ours.codebook[ours.format.unpack(ours.codes, weight.numel()).int()]
    for other in (theirs, on_cpu.codes.cuda()):
        different = values != ours.codebook[ours.format.unpack(other, weight.numel()).int()]
        assert different.float().mean() < 1e-5


def test_quantized_linear_moves_to_the_gpu_with_its_scales_and_back() -> None:
    linear = torch.nn.Linear(192, 64)
    layer = QuantizedLinear.from_linear(linear)
    expected = layer.quantized.dequantize()
    layer.to("cuda", torch.bfloat16)
    assert layer.quantized.device.type == "cuda"
    assert torch.equal(layer.cpu().quantized.dequantize(), expected)


def test_quantized_linear_agrees_with_float64_on_the_gpu() -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(1024, 512)).cuda()
    x = torch.randn(4, 33, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().square().sum().backward()
    x64 = x.detach().double().requires_grad_()
    reference = torch.nn.functional.linear(x64, layer.quantized.dequantize(torch.float32).double(), layer.bias.double())
    reference.square().sum().backward()
    assert (out.double() - reference).norm() / reference.norm() < 6e-3
    assert (x.grad.double() - x64.grad).norm() / x64.grad.norm() < 1e-2
