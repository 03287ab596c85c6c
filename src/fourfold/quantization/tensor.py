"""Quantizing a tensor, and the quantized tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.kernels.blockwise import dequantize_blockwise, dequantize_nested
from fourfold.kernels.encoding import quantize_blockwise
from fourfold.kernels.encoding import serves as serves_quantize
from fourfold.kernels.expansion import expand_blockwise_, expand_nested_
from fourfold.kernels.group_expansion import expand_group_
from fourfold.kernels.small_batch import matmul_4bit, serves
from fourfold.kernels.vectorwise import dequantize_rows, matmul_vectorwise, quantize_rows
from fourfold.quantization.calibration import CALIBRATIONS, check_calibration
from fourfold.quantization.formats import BLOCK_SIZES, get_format
from fourfold.quantization.llm_int8 import DEFAULT_THRESHOLD
from fourfold.quantization.number_format import NumberFormat
from fourfold.quantization.rounding import ROUNDINGS
from fourfold.quantization.scales import NestedScales, PlainScales, Scales

__all__ = ["DTYPES", "QuantizedTensor", "alike_parts", "are_alike", "expand_alike_", "quantize"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as codes and scales.

    Args:
        codes: uint8 [num_code_bytes, 1]; 4-bit codes two to a byte, the even element in the high nibble. Of LLM.int8()
            int8, of the tensor's shape.
        scales: One scale a block of `block_size` elements of the flattened tensor.
        codebook: fp32 [2**bits], what each code means in units of its block's scale.
        format: The number format.
        block_size: Elements that share a scale; blocks run over rows.
        shape: Shape of the tensor that was quantized.
        dtype: Its dtype, and the default of `dequantize`.
        outlier_threshold: Of LLM.int8(): from which magnitude a column of the input is kept as it is; None: of another
            format, whose products round no input.
    """

    codes: Tensor
    scales: Scales
    codebook: Tensor
    format: NumberFormat
    block_size: int
    shape: torch.Size
    dtype: torch.dtype
    outlier_threshold: float | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype` (default: the one it came in): fp32(codebook[code] * scale), rounded once."""
        scales, shape, dtype = self.scales, list(self.shape), dtype or self.dtype
        if self.format.is_vectorwise:
            return dequantize_rows(self.codes, scales.dequantize(), dtype)
        # The CPU's kernels are two, and joining them in an operator would only add that operator's overhead.
        if isinstance(scales, NestedScales) and self.codes.is_cuda:
            parts = (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
            sizes = (self.block_size, scales.nested_block_size)
            return dequantize_nested(self.codes, self.codebook, *parts, *sizes, shape, dtype)
        return dequantize_blockwise(self.codes, self.codebook, scales.dequantize(), self.block_size, shape, dtype)

    def expand_(
        self,
        out: Tensor,
        *,
        row: int,
        total_rows: int,
        used_ranks: int = 0,
        rank_row: int = 0,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        scaling: float = 1.0,
    ) -> None:
        """Write this weight [num_rows, num_columns] and its adapter into their place in a dense matrix.

        Args are those of `fourfold.kernels.expansion.expand_blockwise_`, where the matrix is described.
        """
        num_rows, num_columns = self.shape
        place: Any = (num_rows, num_columns, row, total_rows, used_ranks, rank_row, lora_a, lora_b, scaling)
        scales = self.scales
        if isinstance(scales, PlainScales):
            expand_blockwise_(out, self.codes, self.codebook, scales.absmax, self.block_size, *place)
            return
        parts = (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
        expand_nested_(out, self.codes, self.codebook, *parts, self.block_size, scales.nested_block_size, *place)

    def linear(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """`input` [..., num_columns] times this weight's transpose, plus `bias`, in `input`'s dtype.

        Few rows on a GPU are multiplied with the codes themselves; otherwise the weight is dequantized first. By
        LLM.int8() the codes are always multiplied, and `input` is rounded to int8 for that.
        """
        if self.outlier_threshold is not None:
            return matmul_vectorwise(input, self.codes, self.scales.dequantize(), self.outlier_threshold, bias)
        scales, num_rows = self.scales, self.shape[0]
        nested_block_size = scales.nested_block_size if isinstance(scales, NestedScales) else 1
        if not serves(input, self.codebook, self.block_size, nested_block_size, num_rows):
            return torch.nn.functional.linear(input, self.dequantize(input.dtype), bias)
        parts: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] = (
            (scales.absmax, None, None, None)
            if isinstance(scales, PlainScales)
            else (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
        )
        sizes = (self.block_size, nested_block_size, num_rows)
        return matmul_4bit(input, self.codes, self.codebook, *parts, *sizes, bias=bias)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes this tensor holds: codes and scales. The codebook and the dynamic map are shared by all tensors."""
        return self.codes.nbytes + self.scales.num_bytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on `device`."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same tensor with `function`, which moves or copies, applied to everything it holds."""
        codes = function(self.codes)
        shared = self.codebook is self.format.codebook(self.codebook.device)
        return replace(
            self,
            codes=codes,
            scales=self.scales.map_tensors(function),
            codebook=self.format.codebook(codes.device) if shared else function(self.codebook),
        )

    def requantize(self, weight: Tensor, *, calibration: str = "absmax", name: str = "weight") -> QuantizedTensor:
        """Another weight of this shape, quantized as this one is."""
        quantized = quantize(
            weight if self.format.is_vectorwise else weight.to(self.dtype),
            self.format,
            self.block_size if not self.format.is_vectorwise else 64,
            isinstance(self.scales, NestedScales),
            calibration=calibration,
            outlier_threshold=self.outlier_threshold or 0.0,
            name=name,
        )
        return replace(quantized, dtype=self.dtype)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """bitsandbytes' keys and bytes: `prefix` itself for the codes, `prefix.absmax` and so on for the rest."""
        from fourfold.quantization.layout import to_state_dict

        return to_state_dict(self, prefix)


def are_alike(weights: Sequence[QuantizedTensor]) -> bool:
    """Whether `expand_alike_` takes the weights: decoded by the same tables, in blocks of the same sizes."""
    first = weights[0]
    return all(
        weight.codebook is first.codebook
        and weight.block_size == first.block_size
        and weight.shape[1] == first.shape[1]
        and _have_like_scales(weight.scales, first.scales)
        for weight in weights[1:]
    )


def _have_like_scales(one: Scales, other: Scales) -> bool:
    if isinstance(one, PlainScales) or isinstance(other, PlainScales):
        return type(one) is type(other)
    return one.code_map is other.code_map and one.nested_block_size == other.nested_block_size


def alike_parts(weights: Sequence[QuantizedTensor]) -> tuple[Any, ...]:
    """Of weights that are alike, what `fourfold.kernels.group_expansion.expand_group_` takes before their rows:
    codes, codebook, scales, map, nested scales, offsets, block size and that of the scales."""
    first, codes = weights[0], [weight.codes for weight in weights]
    if isinstance(first.scales, PlainScales):
        plain = [weight.scales.dequantize() for weight in weights]
        return codes, first.codebook, plain, None, [], [], first.block_size, 1
    nested = [weight.scales for weight in weights if isinstance(weight.scales, NestedScales)]
    scales, absmax = [each.codes for each in nested], [each.nested_absmax for each in nested]
    offsets, sizes = [each.offset for each in nested], (first.block_size, first.scales.nested_block_size)
    return codes, first.codebook, scales, first.scales.code_map, absmax, offsets, *sizes


def expand_alike_(
    out: Tensor,
    weights: Sequence[QuantizedTensor],
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scalings: Sequence[float],
) -> None:
    """Write weights that are alike, and their adapters, into a dense matrix that holds nothing else.

    Args are those of `fourfold.kernels.group_expansion.expand_group_`.
    """
    num_rows = [weight.shape[0] for weight in weights]
    linears: Any = (*alike_parts(weights), num_rows, weights[0].shape[1], lora_a, lora_b, scalings)
    expand_group_(out, *linears)


def quantize(
    tensor: Tensor,
    format: str | NumberFormat = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    rounding: str = "nearest",
    calibration: str = "absmax",
    generator: torch.Generator | None = None,
    outlier_threshold: float = DEFAULT_THRESHOLD,
    name: str = "tensor",
) -> QuantizedTensor:
    """Quantize a tensor blockwise, or by rows.

    Args:
        tensor: fp32, fp16 or bf16, of any shape, empty too.
        format: A format of `FORMATS`, by name; or "llm_int8", which has one fp32 scale a row and knows neither
            `block_size` nor `double_quant`, and nearest rounding and absmax alone.
        block_size: Elements of the flattened tensor that share a scale, one of `BLOCK_SIZES`.
        double_quant: Quantize the scales themselves to 8 bits (QLoRA, section 3).
        rounding: "nearest", or "stochastic" for an unbiased result.
        calibration: How a block's scale is chosen; other than "absmax" for integer formats only.
        generator: Source of randomness of stochastic rounding.
        outlier_threshold: Of "llm_int8", see QuantizedTensor; 0: no column is an outlier.
        name: What errors call the tensor.

    Raises:
        QuantizationError: An option that is not in its table, a dtype that is not floating point, or NaN or infinity.
    """
    number_format = get_format(format) if isinstance(format, str) else format
    _check_options(number_format, block_size, rounding, calibration)
    if not outlier_threshold >= 0:
        raise QuantizationError("outlier_threshold is out of range", found=outlier_threshold, allowed="0 or more")
    if tensor.dtype not in DTYPES:
        raise QuantizationError(f"{name} cannot be quantized", found=tensor.dtype, allowed=DTYPES)
    flat = tensor.detach().reshape(-1)
    _check_finite(flat, name)
    if number_format.is_vectorwise:
        return _quantize_vectorwise(tensor.detach(), number_format, outlier_threshold, name)
    if rounding == "nearest" and calibration == "absmax" and serves_quantize(flat, block_size):
        order = number_format.sorted_values(flat.device)[1]
        codes, absmax = quantize_blockwise(flat, number_format.thresholds(flat.device), order, block_size)
        packed = codes.view(-1, 1)
    else:
        packed, absmax = _quantize_in_parts(flat, number_format, block_size, rounding, calibration, generator)
    return QuantizedTensor(
        codes=packed,
        scales=NestedScales.quantize(absmax) if double_quant else PlainScales(absmax),
        codebook=number_format.codebook(tensor.device),
        format=number_format,
        block_size=block_size,
        shape=tensor.shape,
        dtype=tensor.dtype,
    )


def _quantize_vectorwise(
    tensor: Tensor, number_format: NumberFormat, outlier_threshold: float, name: str
) -> QuantizedTensor:
    if tensor.ndim < 2 or not tensor.shape[-1]:
        raise QuantizationError(
            f"{name} has no rows to scale", found=f"shape {tuple(tensor.shape)}", allowed="a matrix for LLM.int8()"
        )
    codes, absmax = quantize_rows(tensor)
    return QuantizedTensor(
        codes=codes,
        scales=PlainScales(absmax),
        codebook=number_format.codebook(tensor.device),
        format=number_format,
        block_size=tensor.shape[-1],
        shape=tensor.shape,
        dtype=tensor.dtype,
        outlier_threshold=outlier_threshold,
    )


def _quantize_in_parts(
    flat: Tensor,
    number_format: NumberFormat,
    block_size: int,
    rounding: str,
    calibration: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Codes [num_code_bytes, 1] and scales [num_blocks], with temporary memory for a part only."""
    num_blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(num_blocks, dtype=torch.float32, device=flat.device)
    packed = torch.empty(number_format.num_code_bytes(flat.numel()), 1, dtype=torch.uint8, device=flat.device)
    calibrated = CALIBRATIONS[calibration]
    part_size = _part_size(flat.device)
    first = 0
    for blocks in _parts(flat, block_size, part_size if calibrated.is_blockwise else flat.numel()):
        absmax[first : first + len(blocks)] = calibrated.scales(blocks, number_format)
        first += len(blocks)
    first = first_byte = 0
    for blocks in _parts(flat, block_size, part_size):
        normalized = blocks.mul_((1.0 / absmax[first : first + len(blocks)].clamp_min(1e-38))[:, None])
        codes = number_format.pack(ROUNDINGS[rounding](normalized.view(-1), number_format, generator))
        packed[first_byte : first_byte + len(codes)] = codes
        first, first_byte = first + len(blocks), first_byte + len(codes)
    return packed, absmax


def _part_size(device: torch.device) -> int:
    """Elements to quantize at a time: bounds the temporary memory, and on a CPU keeps it in each core's cache."""
    return 2**17 * torch.get_num_threads() if device.type == "cpu" else 2**24


def _parts(flat: Tensor, block_size: int, part_size: int) -> Iterator[Tensor]:
    """Copies in fp32 of about `part_size` elements each, as [num_blocks, block_size]; a short last block by itself."""
    whole = flat.numel() // block_size * block_size
    if whole:
        for part in flat[:whole].view(-1, block_size).split(max(1, part_size // block_size)):
            yield part.to(torch.float32, copy=True)
    if whole < flat.numel():
        yield flat[None, whole:].to(torch.float32, copy=True)


def _check_options(number_format: NumberFormat, block_size: int, rounding: str, calibration: str) -> None:
    if block_size not in BLOCK_SIZES:
        raise QuantizationError("unsupported block size", found=block_size, allowed=BLOCK_SIZES)
    if rounding not in ROUNDINGS:
        raise QuantizationError("unknown rounding", found=rounding, allowed=ROUNDINGS)
    check_calibration(calibration, number_format)
    if number_format.is_vectorwise and (rounding, calibration) != ("nearest", "absmax"):
        raise QuantizationError(
            "LLM.int8() scales rows by their largest magnitude, and rounds to the nearest",
            found=f"rounding={rounding!r}, calibration={calibration!r}",
        )


def _check_finite(flat: Tensor, name: str) -> None:
    # A sum is finite only if all is, and unlike isfinite().all() needs no mask as large as the tensor; a finite tensor
    # whose sum overflows is looked at element by element.
    if flat.sum().isfinite() or flat.isfinite().all():
        return
    bad = (~flat.isfinite()).nonzero().reshape(-1)
    first = int(bad[0])
    raise QuantizationError(
        f"{name} holds values that are not finite",
        found=f"{bad.numel()} of {flat.numel()} elements, the first at flat index {first}: {float(flat[first])}",
        allowed="finite values",
        hint="the checkpoint is damaged, or was saved from a run that diverged: get it again",
    )
