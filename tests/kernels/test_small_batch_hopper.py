"""The product of few rows on Hopper's tensor cores: the kernels, interpreted, and which products are theirs."""

from __future__ import annotations

import pytest
import torch
from few_rows import error, parts

from fourfold.quantization.tensor import quantize

pytest.importorskip("triton", reason="Triton is for Linux")

from fourfold.kernels import small_batch_hopper_triton as kernels


# Every tile; a row of W more than two programs have, and fewer than one has. In the third the columns are shared among
# programs; in the fourth three programs of two spans each share five spans, so that the last multiplies with zeros; in
# the last one program takes five, more than are loaded ahead.
@pytest.mark.parametrize(
    ("inputs", "rows", "columns", "programs"),
    [
        (5, 40, 256, 264),
        (16, 257, 512, 3),
        (17, 130, 768, 264),
        (50, 130, 1280, 6),
        (64, 128, 512, 1),
        (20, 40, 1280, 1),
    ],
)
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("fp4", False)])
def test_kernels_are_as_near_to_float64_as_their_output_can_be(
    inputs: int,
    rows: int,
    columns: int,
    programs: int,
    format: str,
    double_quant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    torch.manual_seed(0)
    weight = quantize(torch.randn(rows, columns), format, 64, double_quant)
    x, bias = torch.randn(1, inputs, columns).half(), torch.randn(rows).half()
    exact = x.double() @ weight.dequantize(torch.float16).double().T + bias.double()
    ours = kernels.matmul(x, *parts(weight), bias)
    assert ours.shape == exact.shape
    assert error(ours, exact) < 3e-4
    assert error(kernels.matmul(x, *parts(weight)), exact - bias.double()) < 3e-4


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_are_those_of_dequantize(double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(20, 1024), "nf4", 64, double_quant)
    columns = torch.randperm(1024)[:64]
    # Between two words, and with gaps between its rows.
    x = torch.zeros(64 * 1032 + 1, dtype=torch.float16)[1:].view(64, 1032)[:, :1024]
    x[torch.arange(64), columns] = 1
    for inputs in (x, x.contiguous(), torch.cat([x.new_zeros(1), x.flatten()])[1:].view(64, 1024)):
        ours = kernels.matmul(inputs, *parts(weight))
        assert torch.equal(ours, weight.dequantize(torch.float16)[:, columns].T)


@pytest.mark.parametrize(
    ("shape", "splits"),
    [((14336, 4096), 2), ((4096, 14336), 8), ((4096, 4096), 8), ((6144, 4096), 4), ((128256, 4096), 1)],
)
def test_the_shapes_of_an_8b_model_are_shared_out_as_was_measured_best(shape: tuple[int, int], splits: int) -> None:
    assert kernels.shares(*shape).splits == splits


@pytest.mark.parametrize("columns", [256, 768, 2816, 3584, 8960, 11008, 18944, 28672])
def test_every_column_has_one_share_and_no_program_is_without_columns(columns: int) -> None:
    for rows in (512, 1000, 3584, 4096, 18944, 152064):
        splits, spans = kernels.shares(rows, columns)
        assert (splits - 1) * spans * 256 < columns <= splits * spans * 256
        assert splits == 1 or splits * -(-rows // 128) <= 264


def test_what_the_kernel_takes_is_what_it_was_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.empty(9, 512, dtype=torch.bfloat16), torch.empty(512 * 256 + 16, dtype=torch.uint8)
    assert codes.data_ptr() % 16 == 0
    assert not kernels.takes(x, codes, 64, 512)
    monkeypatch.setattr(kernels, "is_hopper", lambda _: True)
    assert kernels.takes(x, codes, 64, 512)
    assert kernels.takes(x[None], codes[16:], 64, 1000)
    assert not kernels.takes(x[:8], codes, 64, 512)
    assert not kernels.takes(x[:, :320], codes, 64, 512)
    assert not kernels.takes(x, codes[4:], 64, 512)
    assert not kernels.takes(x, codes, 128, 512)
    assert not kernels.takes(x, codes, 64, 511)
