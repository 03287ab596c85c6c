"""The product of few rows with a 4-bit weight: the kernel, interpreted, against float64 and the reference."""

from __future__ import annotations

import pytest
import torch
from few_rows import error, parts
from torch._subclasses import FakeTensorMode

from fourfold.kernels import small_batch
from fourfold.kernels.small_batch import matmul_4bit, matmul_4bit_reference, serves
from fourfold.kernels.small_batch_tiles import TILES
from fourfold.quantization.tensor import quantize


# Every tile; rows and columns that fill none; columns shared among warps, and, in some, among programs. Blocks of 128
# are shared out among the lanes only where they fill the rows.
@pytest.mark.parametrize(
    ("inputs", "rows", "columns", "tile"),
    [
        (1, 72, 64, 0),
        (5, 40, 8192, 1),
        (16, 40, 320, 2),
        (9, 20, 8192, 3),
        (17, 130, 192, 4),
        (32, 136, 2048, 5),
        (33, 40, 1088, 6),
        (64, 128, 1024, 6),
    ],
)
@pytest.mark.parametrize(("format", "block_size", "double_quant"), [("nf4", 64, True), ("fp4", 128, False)])
def test_kernel_is_as_near_to_float64_as_its_output_can_be(
    inputs: int, rows: int, columns: int, tile: int, format: str, block_size: int, double_quant: bool
) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import small_batch_triton

    torch.manual_seed(0)
    weight = quantize(torch.randn(rows, columns), format, block_size, double_quant)
    x, bias = torch.randn(inputs, columns).half(), torch.randn(rows).half()
    exact = x.double() @ weight.dequantize(torch.float16).double().T + bias.double()
    ours = small_batch_triton.matmul(x, *parts(weight), bias, TILES[tile])
    assert ours.shape == exact.shape
    assert error(ours, exact) < 3e-4
    assert error(small_batch_triton.matmul(x, *parts(weight), None, TILES[tile]), exact - bias.double()) < 3e-4


@pytest.mark.parametrize("inputs", [4, 16, 32, 64])
@pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (128, False), (256, True)])
def test_weights_are_those_of_dequantize(inputs: int, block_size: int, double_quant: bool) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import small_batch_triton

    torch.manual_seed(0)
    weight = quantize(torch.randn(20, 1024), "nf4", block_size, double_quant)
    # Codes that begin between two words, and rows of x with a gap.
    codes, *others = parts(weight)
    codes = torch.cat([codes[:1], codes])[1:]
    columns = torch.randperm(1024)[:inputs]
    x = torch.zeros(inputs, 1032, dtype=torch.float16)[:, :1024]
    x[torch.arange(inputs), columns] = 1
    ours = small_batch_triton.matmul(x, codes, *others)
    assert torch.equal(ours, weight.dequantize(torch.float16)[:, columns].T)


def test_operator_on_the_cpu_is_dequantize_and_multiply() -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(24, 64))
    x, bias = torch.randn(2, 3, 64), torch.randn(24)
    expected = torch.nn.functional.linear(x, weight.dequantize(torch.float32), bias)
    assert torch.equal(matmul_4bit(x, *parts(weight), bias), expected)
    assert torch.equal(matmul_4bit_reference(x, *parts(weight), bias), expected)
    assert not serves(x, weight.codebook, 64, 256, 24)


def test_operator_passes_opcheck() -> None:
    weight = quantize(torch.randn(24, 64))
    torch.library.opcheck(
        torch.ops.fourfold.matmul_4bit.default, (torch.randn(3, 64), *parts(weight), None), test_utils="test_schema"
    )
    torch.library.opcheck(
        torch.ops.fourfold.matmul_4bit.default,
        (torch.randn(3, 64), *parts(weight), torch.randn(24)),
        test_utils="test_faketensor",
    )


@pytest.mark.parametrize("stride", [0, 2])
def test_bias_may_have_any_stride(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(small_batch, "serves", lambda *_: True)
    torch.manual_seed(0)
    weight = quantize(torch.randn(40, 64))
    x, bias = torch.randn(3, 64).half(), torch.randn(80).half().as_strided([40], [stride])
    expected = matmul_4bit_reference(x, *parts(weight), bias)
    torch.testing.assert_close(small_batch._on_gpu(x, *parts(weight), bias), expected, rtol=2e-3, atol=2e-3)


def test_products_whose_offsets_need_more_than_32_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batch, "triton_refuses", lambda _: None)
    with FakeTensorMode():
        codebook = torch.empty(16)
        for columns, rows, is_served in (
            (4096, 2**19 - 1, True),
            (4096, 2**19, False),
            # Few rows, whose x has as many elements as W has not.
            (2**24 - 64, 8, True),
            (2**24, 8, False),
        ):
            x = torch.empty(64, columns, dtype=torch.bfloat16, device="cuda")
            assert serves(x, codebook, 64, 256, rows) == is_served
