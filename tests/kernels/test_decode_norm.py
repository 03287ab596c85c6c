"""The norm before a decode step's linear layers, with x A^T of adapters: kernels, interpreted, and operators."""

from __future__ import annotations

import pytest
import torch
from few_rows import error

from fourfold.kernels.decode_norm import decode_norm, decode_norm_reference, low_products, low_products_reference


@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 128, 0), (3, 72, 5), (2, 4096, 48)])
def test_kernel_norms_and_multiplies_as_the_reference_does(rows: int, width: int, rank: int) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_norm_triton

    torch.manual_seed(0)
    x, weight = torch.randn(rows, width).half(), torch.rand(width).half()
    lora_a = torch.randn(rank, width).half() if rank else None
    ours, low = decode_norm_triton.decode_norm(x, weight, 1e-6, lora_a)
    expected, expected_low = decode_norm_reference(x, weight, 1e-6, lora_a)
    assert error(ours, expected.double()) < 3e-4
    assert low.shape == expected_low.shape
    if lora_a is not None:
        assert error(low, expected.double() @ lora_a.double().T) < 4e-4
        alone = decode_norm_triton.low_products(x, lora_a, 2.0, torch.float16)
        assert error(alone, 2 * x.double() @ lora_a.double().T) < 4e-4
        assert error(low_products_reference(x, lora_a, 2.0, torch.float16), alone.double()) < 4e-4


def test_what_fp16_cannot_hold_becomes_its_largest_number() -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_norm_triton

    x, weight = torch.tensor([[1.0, -1.0]]).bfloat16(), torch.full((2,), 1e6).bfloat16()
    for norm in (decode_norm_triton.decode_norm, decode_norm_reference):
        assert norm(x, weight, 0.0, None)[0].tolist() == [[65504.0, -65504.0]]


def test_operators_pass_opcheck() -> None:
    x, weight, lora_a = torch.randn(2, 64), torch.randn(64), torch.randn(5, 64)
    normed, low = decode_norm(x, weight, 1e-6, lora_a)
    assert error(normed, torch.nn.functional.rms_norm(x, (64,), weight, 1e-6).double()) < 3e-4
    assert error(low_products(normed, lora_a, 1.0, torch.float32), low.double()) < 4e-4
    tests = ("test_schema", "test_faketensor")
    for given in (lora_a, None):
        torch.library.opcheck(torch.ops.fourfold.decode_norm.default, (x, weight, 1e-6, given), test_utils=tests)
    arguments = (normed, lora_a, 1.0, torch.float32)
    torch.library.opcheck(torch.ops.fourfold.low_products.default, arguments, test_utils=tests)
