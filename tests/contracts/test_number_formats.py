"""What every number format keeps, over every row of the tables."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.quantization.calibration import CALIBRATIONS
from fourfold.quantization.formats import BLOCK_SIZES, FORMATS
from fourfold.quantization.layout import from_state_dict
from fourfold.quantization.rounding import ROUNDINGS
from fourfold.quantization.tensor import DTYPES, QuantizedTensor, quantize

SHAPES = [(), (0,), (1,), (3,), (0, 5), (63,), (64,), (65,), (7, 33), (2, 3, 5, 7), (129, 100)]
INTEGER_FORMATS = [name for name, number_format in FORMATS.items() if number_format.is_integer]


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(tensor: QuantizedTensor) -> Tensor:
    """The scale of every element, fp64."""
    return tensor.scales.dequantize().double().repeat_interleave(tensor.block_size)[: tensor.num_elements]


def half_step(name: str) -> float:
    values = sorted(FORMATS[name].values)
    return max(high - low for low, high in itertools.pairwise(values)) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_keeps_shape_and_dtype_and_stays_within_half_a_step(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = normal(shape, dtype)
    quantized = quantize(tensor, name, double_quant=False)
    result = quantized.dequantize(torch.float32)
    assert quantized.dequantize().dtype == dtype
    assert result.shape == tensor.shape == quantized.shape
    bound = scales(quantized) * half_step(name) * (1 + 1e-5)
    assert ((result.double() - tensor.double()).reshape(-1).abs() <= bound).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_block_is_scaled_by_its_own_absmax(name: str, block_size: int) -> None:
    tensor = normal((2 * block_size + 17,))
    quantized = quantize(tensor, name, block_size, double_quant=False)
    expected = torch.stack([block.abs().max() for block in tensor.split(block_size)])
    assert torch.equal(quantized.scales.dequantize(), expected)
    error = (quantized.dequantize() - tensor).double().abs()
    assert (error <= scales(quantized) * half_step(name) * (1 + 1e-5)).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_large_tensors_are_quantized_as_their_parts_are(name: str, double_quant: bool) -> None:
    tensor = normal((3 * 2**17 + 64 * 5 + 3,), torch.bfloat16)
    whole = quantize(tensor, name, double_quant=False)
    parts = [quantize(part, name, double_quant=False) for part in tensor.split(6400)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scales.dequantize(), torch.cat([part.scales.dequantize() for part in parts]))
    assert torch.equal(quantize(tensor, name, double_quant=double_quant).codes, whole.codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_round_trip_is_exact(name: str, double_quant: bool, shape: tuple[int, ...]) -> None:
    quantized = quantize(normal(shape, torch.float16), name, 32, double_quant)
    state = quantized.state_dict("a.weight")
    assert all(tensor.is_contiguous() for tensor in state.values())
    read = from_state_dict(state, "a.weight")
    assert read.dtype == torch.float16
    assert read.block_size == 32
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(read.dequantize(torch.float32), quantized.dequantize(torch.float32))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_num_bytes_is_what_is_stored(name: str, double_quant: bool) -> None:
    quantized = quantize(normal((100, 130)), name, double_quant=double_quant)
    state = quantized.state_dict("w")
    # In a file the offset stands in the JSON object; maps and codebook stand there for each tensor, in memory once.
    stored = sum(state[key].nbytes for key in ("w", "w.absmax", "w.nested_absmax") if key in state)
    assert quantized.num_bytes == stored + (4 if double_quant else 0)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    for double_quant in (False, True):
        assert not quantize(torch.zeros(200), name, double_quant=double_quant).dequantize().any()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("name", FORMATS)
def test_extreme_magnitudes_stay_finite_and_accurate(name: str, magnitude: float) -> None:
    tensor = torch.linspace(-1, 1, 64) * magnitude
    result = quantize(tensor, name, double_quant=False).dequantize().double()
    assert (result - tensor.double()).abs().max() <= magnitude * half_step(name) * (1 + 1e-5)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_every_calibration_and_rounding_takes_any_shape(name: str, rounding: str, calibration: str) -> None:
    for shape in SHAPES:
        tensor = normal(shape)
        quantized = quantize(tensor, name, 32, rounding=rounding, calibration=calibration)
        assert quantized.dequantize().shape == tensor.shape
        assert quantized.dequantize().isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    number_format = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    num_draws = 4000
    for value in (-0.93, -0.31, -0.004, 0.0, 0.1234, 0.62):
        # The first element fixes each block's scale at 1.
        tensor = torch.full((num_draws, 32), value)
        tensor[:, 0] = 1.0
        draws = quantize(tensor, name, 32, False, rounding="stochastic", generator=generator).dequantize()[:, 1:]
        low = max(v for v in torch.tensor(number_format.values).tolist() if v <= value)
        high = min(v for v in torch.tensor(number_format.values).tolist() if v >= value)
        assert set(draws.unique().tolist()) <= {low, high}
        # Five standard deviations of the mean of a draw between two values.
        deviation = ((value - low) * (high - value)) ** 0.5 / draws.numel() ** 0.5
        assert abs(draws.double().mean().item() - value) <= 5 * deviation + 1e-7


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_reproduced_by_its_generator(name: str) -> None:
    def codes(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return quantize(normal((300, 1000)), name, rounding="stochastic", generator=generator).codes

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_values_that_are_not_finite_are_refused_by_the_tensors_name(name: str, dtype: torch.dtype, bad: float) -> None:
    tensor = normal((40, 50), dtype)
    tensor[20, 7] = bad
    with pytest.raises(QuantizationError, match=r"layers\.3\.weight holds values(.|\n)*1 of 2000 .* index 1007"):
        quantize(tensor, name, name="layers.3.weight")


def test_a_finite_tensor_whose_sum_overflows_is_accepted() -> None:
    tensor = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert torch.equal(quantize(tensor).dequantize(), tensor)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_copies_and_moves_change_no_bit(name: str, double_quant: bool) -> None:
    quantized = quantize(normal((77, 13)), name, double_quant=double_quant)
    expected = quantized.dequantize()
    for other in (quantized.to("cpu"), quantized.map_tensors(torch.clone), copy.deepcopy(quantized)):
        assert torch.equal(other.dequantize(), expected)
        assert other.num_bytes == quantized.num_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_dequantizes_the_same_bits(name: str, double_quant: bool) -> None:
    tensor = normal((1000, 333), torch.bfloat16)
    quantized = quantize(tensor, name, double_quant=double_quant)
    for dtype in DTYPES:
        assert torch.equal(quantized.to("cuda").dequantize(dtype).cpu(), quantized.dequantize(dtype))
    fresh = quantize(tensor.cuda(), name, double_quant=False)
    mismatches = (fresh.codes.cpu() != quantized.codes).double().mean()
    assert mismatches < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nf5"}, "unknown number format(.|\n)*nf5(.|\n)*nf4, fp4, int4, int8"),
        ({"block_size": 48}, "unsupported block size(.|\n)*48(.|\n)*32, 64"),
        ({"rounding": "up"}, "unknown rounding(.|\n)*nearest, stochastic"),
        ({"format": "int4", "calibration": "best"}, "unknown calibration(.|\n)*absmax, percentile, mse, kl"),
        ({"format": "nf4", "calibration": "mse"}, "calibration is for integer formats"),
        ({"format": "fp4", "calibration": "kl"}, "calibration is for integer formats"),
    ],
)
def test_options_that_are_not_in_their_table_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(torch.ones(64), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(QuantizationError, match="cannot be quantized"):
        quantize(torch.ones(64, dtype=dtype))
