"""The product of few rows on a GPU: against float64, the dense product, and itself."""

from __future__ import annotations

import pytest
import torch
from few_rows import error, parts
from pairwise import pairwise
from torch import Tensor, nn

from fourfold.kernels.small_batch import MAX_ROWS, matmul_4bit
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import QuantizedTensor, quantize

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
# Some of Hopper's own kernel and some of the other, where there are two; with columns shared among programs, and not.
SHAPES = [(1024, 4096), (34048, 512), (500, 4096), (9216, 576)]


def weight_of(shape: tuple[int, int], format: str = "nf4", double_quant: bool = True) -> QuantizedTensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return quantize(torch.randn(shape, device="cuda", dtype=BF16, generator=generator), format, 64, double_quant)


def poison(*sizes: int) -> None:
    """Leave NaN in the memory that the next allocations of these numbers of bytes get."""
    held = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes]
    del held


def check(weight: QuantizedTensor, inputs: int, dtype: torch.dtype, has_bias: bool) -> None:
    rows, columns = weight.shape
    x = torch.randn(1, inputs, columns, device="cuda", dtype=dtype)
    bias = torch.randn(rows, device="cuda", dtype=dtype) if has_bias else None
    dense = weight.dequantize(dtype)
    exact = torch.nn.functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    bound = 1.01 * error(torch.nn.functional.linear(x, dense, bias), exact)
    block_m = 16 if inputs <= 16 else 32 if inputs <= 32 else 64
    # The result, x packed, and what programs that share columns leave.
    poison(2 * exact.numel(), 2 * columns * block_m, *(4 * splits * rows * block_m for splits in (2, 4, 8, 16)))
    ours = weight.linear(x, bias)
    assert ours.shape == exact.shape
    assert error(ours, exact) <= bound
    assert torch.equal(weight.linear(x, bias), ours)


@pytest.mark.parametrize(
    ("inputs", "dtype", "has_bias"),
    pairwise([9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64], [BF16, torch.float16], [False, True]),
)
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (4096, 4096), (6144, 4096)])
def test_linears_of_an_8b_model_are_no_further_from_float64_than_the_dense_product(
    shape: tuple[int, int], inputs: int, dtype: torch.dtype, has_bias: bool
) -> None:
    check(weight_of(shape), inputs, dtype, has_bias)


# Rows that fill no program, columns that fill no share (2816, 11008) or are one program's alone (256 and the first).
@pytest.mark.parametrize(
    ("shape", "inputs", "format", "double_quant", "dtype", "has_bias"),
    pairwise(
        [(33921, 512), (642, 256), (4096, 11008), (3584, 2816), (1000, 2048), (513, 4096), (130, 4096)],
        [9, 24, 40, 64],
        ["nf4", "fp4"],
        [True, False],
        [BF16, torch.float16],
        [False, True],
    ),
)
def test_odd_shapes_and_other_formats_are_no_further_from_float64_than_the_dense_product(
    shape: tuple[int, int], inputs: int, format: str, double_quant: bool, dtype: torch.dtype, has_bias: bool
) -> None:
    check(weight_of(shape, format, double_quant), inputs, dtype, has_bias)


# All numbers of inputs that share a tile share its kernel; the last are too many for one. The first shape takes other
# tiles than the rest.
@pytest.mark.parametrize(
    ("inputs_of_a_tile", "shape", "options", "dtype"),
    pairwise(
        [(1, 5, 8), (9, 16), (17, 32), (33, 64), (65,)],
        [(9000, 576), (4096, 4096), (1000, 576), (72, 14336), (300, 1088), (64, 64)],
        [("nf4", 64, True), ("nf4", 64, False), ("fp4", 128, False), ("nf4", 256, False)],
        [torch.float16, torch.bfloat16],
    ),
)
def test_few_rows_are_multiplied_no_further_from_float64_than_by_the_dense_product(
    inputs_of_a_tile: tuple[int, ...], shape: tuple[int, int], options: tuple[str, int, bool], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    format, block_size, double_quant = options
    linear = nn.Linear(columns, rows, device="cuda", dtype=dtype)
    layer = QuantizedLinear.from_linear(linear, format=format, block_size=block_size, double_quant=double_quant)
    weight = layer.quantized.dequantize(dtype)
    for inputs in inputs_of_a_tile:
        x = torch.randn(1, inputs, columns, device="cuda", dtype=dtype)
        exact = x.double() @ weight.double().T + linear.bias.double()
        poison(exact.numel() * dtype.itemsize)
        with torch.no_grad():
            ours = layer(x)
            again = layer(x)
        bound = 1.05 * error(nn.functional.linear(x, weight, linear.bias), exact) + 1e-6
        assert error(ours, exact) <= bound, f"{inputs} inputs"
        assert torch.equal(ours, again), f"{inputs} inputs"


@pytest.mark.parametrize("rows", [1024, 500])
def test_every_number_of_rows_is_multiplied_with_the_weights_of_dequantize(rows: int) -> None:
    weight = weight_of((rows, 4096))
    dense = weight.dequantize(BF16)
    for inputs in range(1, MAX_ROWS + 1):
        columns = torch.randperm(4096, device="cuda")[:inputs]
        x = torch.nn.functional.one_hot(columns, 4096).to(BF16)
        assert torch.equal(weight.linear(x), dense[:, columns].T), f"{inputs} inputs"


@pytest.mark.parametrize("inputs", [4, 16, 64])
@pytest.mark.parametrize("offset", [1, 4, 16])
def test_codes_and_rows_may_begin_anywhere(inputs: int, offset: int) -> None:
    weight = weight_of((640, 1024))
    moved = torch.cat([weight.codes.new_zeros(offset), weight.codes.flatten()])[offset:]
    others = parts(weight)[1:]
    x = torch.randn(inputs * 1024, device="cuda", dtype=BF16)
    expected = matmul_4bit(x.view(inputs, 1024), weight.codes, *others)
    unaligned = torch.cat([x[:1], x])[1:].view(inputs, 1024)
    # Codes on no multiple of 16 bytes are another kernel's, which sums in another order.
    for rows in (x.view(inputs, 1024), unaligned):
        torch.testing.assert_close(matmul_4bit(rows, moved, *others), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(matmul_4bit(unaligned, weight.codes, *others), expected)


# Launches overlap, and what one call frees the next one writes: none may read what is not yet, or no longer, there.
@pytest.mark.parametrize("inputs", [8, 16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_in_close_succession_are_those_of_calls_that_wait_for_each_other(
    inputs: int, shape: tuple[int, int]
) -> None:
    weight = weight_of(shape)
    batches = [torch.randn(inputs, shape[1], device="cuda", dtype=BF16) for _ in range(20)]
    expected = []
    for x in batches:
        expected.append(weight.linear(x))
        torch.cuda.synchronize()
    for _ in range(5):
        assert all(map(torch.equal, [weight.linear(x.clone()) for x in batches], expected))


@pytest.mark.parametrize("inputs", [8, 16, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (34048, 512), (4224, 4160), (9216, 576)])
def test_products_that_follow_from_one_another_are_replayed_in_a_cuda_graph(
    inputs: int, shape: tuple[int, int]
) -> None:
    weight = weight_of(shape)
    x = torch.randn(inputs, shape[1], device="cuda", dtype=BF16)

    def twice() -> Tensor:
        return weight.linear(weight.linear(x)[:, : shape[1]])

    twice()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = twice()
    for _ in range(3):
        x.normal_()
        ours.fill_(torch.nan)
        graph.replay()
        assert torch.equal(ours, twice())


def test_the_gradient_of_few_rows_is_that_of_the_dense_layer() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(256, 128, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)
    (ours,) = torch.autograd.grad(layer(x), x, grad)
    assert torch.equal(ours, grad @ layer.quantized.dequantize(torch.bfloat16))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="elsewhere there is one kernel"
)
@pytest.mark.parametrize(
    ("inputs", "shape", "kernels"),
    [
        (9, (14336, 4096), ["hopper_pack_kernel", "hopper_matmul_kernel", "sum_kernel"]),
        (64, (34048, 512), ["hopper_pack_kernel", "hopper_matmul_kernel"]),
        (8, (14336, 4096), ["matmul_kernel"]),
        (64, (130, 4096), ["pack_kernel", "matmul_kernel", "sum_kernel"]),
        (64, (9216, 576), ["pack_kernel", "matmul_kernel"]),
    ],
)
def test_products_take_the_kernels_that_were_written_for_them(
    inputs: int, shape: tuple[int, int], kernels: list[str]
) -> None:
    weight, x = weight_of(shape), torch.randn(inputs, shape[1], device="cuda", dtype=BF16)
    weight.linear(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        weight.linear(x)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    launched = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    assert [name for name in launched if "Sync" not in name] == kernels
