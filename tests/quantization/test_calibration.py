"""Each calibration on its own criterion, against absmax and against plain float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.quantization.formats import FORMATS
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.tensor import quantize

INTEGERS = ["int4", "int8"]


@pytest.fixture
def weights() -> Tensor:
    """Normal weights of which one in two hundred is an outlier of ten standard deviations."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(256, 256, generator=generator)
    tensor[torch.rand(tensor.shape, generator=generator) < 0.005] *= 10
    return tensor


@pytest.mark.parametrize("name", INTEGERS)
def test_least_squares_is_never_worse_than_absmax_in_any_block(name: str, weights: Tensor) -> None:
    def errors(calibration: str) -> Tensor:
        dense = quantize(weights, name, double_quant=False, calibration=calibration).dequantize()
        return (dense.double() - weights.double()).square().reshape(-1, 64).sum(dim=1)

    absmax, mse = errors("absmax"), errors("mse")
    assert (mse <= absmax * (1 + 1e-6)).all()
    # With 255 steps the loss at one outlier outweighs what the rest gains: nothing below the absmax is better.
    assert name == "int8" or mse.sum() < 0.9 * absmax.sum()


@pytest.mark.parametrize("name", INTEGERS)
def test_percentile_scales_are_numpys_percentiles(name: str, weights: Tensor) -> None:
    scales = quantize(weights, name, double_quant=False, calibration="percentile").scales.dequantize()
    expected = np.percentile(weights.reshape(-1, 64).abs().double().numpy(), 99, axis=1)
    np.testing.assert_allclose(scales.numpy(), expected, rtol=1e-5)
    absmax = quantize(weights, name, double_quant=False).scales.dequantize()
    assert (scales < absmax).any()
    assert (scales <= absmax).all()


def test_percentile_keeps_the_few_elements_of_a_sparse_block() -> None:
    sparse = torch.zeros(256)
    sparse[7] = 3.0
    assert torch.equal(quantize(sparse, "int8", 256, False, calibration="percentile").dequantize(), sparse)


def divergence(normalized: np.ndarray, values: np.ndarray, ratio: float) -> float:
    """KL(P || Q) of the histogram and what clipping at `ratio` and rounding leaves of it, bin by bin."""
    num_bins = 2048
    counts, edges = np.histogram(normalized, bins=num_bins, range=(-1, 1))
    centres = (edges[1:] + edges[:-1]) / 2
    share = counts / counts.sum()
    inside = [i for i in range(num_bins) if abs(centres[i]) <= ratio]
    nearest = {i: int(np.abs(centres[i] / ratio - values).argmin()) for i in inside}
    groups: dict[int, list[int]] = {}
    for i in inside:
        if counts[i]:
            groups.setdefault(nearest[i], []).append(i)
    spread, clipped = np.zeros(num_bins), np.zeros(num_bins)
    for members in groups.values():
        spread[members] = share[members].sum() / len(members)
    clipped[inside] = share[inside]
    clipped[inside[0]] += share[: inside[0]].sum()
    clipped[inside[-1]] += share[inside[-1] + 1 :].sum()
    spread = np.maximum(spread / spread.sum(), 1e-9)
    return float(sum(p * np.log(p / q) for p, q in zip(clipped, spread, strict=True) if p > 0))


@pytest.mark.parametrize("name", INTEGERS)
def test_kl_takes_the_ratio_of_least_divergence(name: str, weights: Tensor) -> None:
    absmax = quantize(weights, name, double_quant=False).scales.dequantize()
    scales = quantize(weights, name, double_quant=False, calibration="kl").scales.dequantize()
    ratios = scales / absmax
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    normalized = (weights.reshape(-1, 64) / absmax[:, None]).reshape(-1).double().numpy()
    values = np.array(FORMATS[name].values)
    chosen = divergence(normalized, values, float(ratios[0]))
    others = [divergence(normalized, values, 1 - step / 40) for step in range(21)]
    # A bin whose centre lies on a threshold may fall to either side in fp32.
    assert chosen <= min(others) + 0.02 * abs(min(others))
    assert chosen <= others[0]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("calibration", ["percentile", "mse", "kl"])
def test_calibration_is_refused_for_other_formats_before_anything_is_loaded(name: str, calibration: str) -> None:
    with pytest.raises(QuantizationError, match=f"calibration is for integer formats; {name}"):
        FourfoldConfig(bnb_4bit_quant_type=name, calibration=calibration)
