"""LoRA over a quantized layer on a GPU."""

from __future__ import annotations

import pytest
import torch

from fourfold.adapters.lora import _LowRank

pytestmark = pytest.mark.gpu


def test_lora_gradients_on_the_gpu_are_fp32_and_agree_with_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lora_a = torch.randn(16, 256, device="cuda").mul_(0.05).requires_grad_()
    lora_b = torch.randn(384, 16, device="cuda").mul_(0.05).requires_grad_()
    grad_out = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16)
    _LowRank.apply(x, lora_a, lora_b, 2.0).backward(grad_out)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, lora_a, lora_b)]
    (2.0 * (wide[0] @ wide[1].T) @ wide[2].T).backward(grad_out.double())
    for ours, reference, bound in zip((x, lora_a, lora_b), wide, (1e-2, 6e-3, 6e-3), strict=True):
        assert (ours.grad.double() - reference.grad).norm() / reference.grad.norm() < bound
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32
