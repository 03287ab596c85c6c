"""LLM.int8() on a GPU against bitsandbytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from fourfold.kernels.vectorwise import int8_product, matmul_vectorwise, quantize_rows
from fourfold.quantization.linear import QuantizedLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "shape"), [(1, (64, 128)), (17, (123, 136)), (300, (256, 576)), (33, (50, 77))])
def test_int8_products_are_exact_whatever_the_shape(rows: int, shape: tuple[int, int]) -> None:
    x = torch.randint(-127, 128, (rows, shape[1]), dtype=torch.int8)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    found = int8_product(x.cuda(), weight.cuda())[:rows, : shape[0]]
    assert torch.equal(found.cpu().long(), x.long() @ weight.long().t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40, 513])
def test_a_layer_and_its_gradient_are_bitsandbytes(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(512, 384).to(dtype)
    theirs = bnb.nn.Linear8bitLt(512, 384, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cuda")
    theirs.bias.data = theirs.bias.data.to(dtype)
    ours = QuantizedLinear.from_linear(linear.cuda(), format="llm_int8")
    x = torch.randn(1, tokens, 512, device="cuda").clamp(-4, 4).to(dtype)
    x[..., [3, 77]] = 20
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [theirs(inputs[0]), ours(inputs[1])]
    weights = torch.randn(384, device="cuda", dtype=dtype)
    for out in outs:
        (out * weights).sum().backward()
    step = 2e-2 if dtype == torch.bfloat16 else 4e-3
    for found, expected in zip((outs[1], inputs[1].grad), (outs[0], inputs[0].grad), strict=True):
        assert (found.float() - expected.float()).norm() < step * expected.float().norm()


def test_the_gpu_computes_what_the_cpu_does() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(70, 256).bfloat16(), torch.randn(96).bfloat16()
    x[:, 5] = 30
    low, up = torch.randn(70, 8).bfloat16(), torch.randn(96, 8).bfloat16()
    parts = (x, *quantize_rows(torch.randn(96, 256)), 6.0, bias, low, up)
    on_gpu = matmul_vectorwise(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in parts))
    torch.testing.assert_close(on_gpu.cpu(), matmul_vectorwise(*parts), rtol=1e-2, atol=1e-2)
