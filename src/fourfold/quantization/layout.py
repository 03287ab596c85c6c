"""The file layout of quantized tensors: bitsandbytes' keys and bytes.

Beside `X.weight` (uint8 [n/2, 1]) stand

    X.weight.absmax                 fp32 [blocks], or uint8 [blocks] if double-quantized
    X.weight.quant_map              fp32 [16]
    X.weight.nested_absmax          fp32 [blocks / 256]     (double quantization only, as the next)
    X.weight.nested_quant_map       fp32 [256]
    X.weight.quant_state.bitsandbytes__nf4    uint8: UTF-8 of a JSON object with the rest

bitsandbytes has NF4 and FP4. INT4 and INT8 use the same layout under `quant_state.fourfold__int4` and `__int8`.

LLM.int8() has bitsandbytes' other one: beside `X.weight`, int8 [out, in], stand

    X.SCB                           fp32 [out], the largest magnitude of each row
    X.weight_format                 uint8 scalar: 0, row by row
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.quantization.formats import FORMATS
from fourfold.quantization.llm_int8 import DEFAULT_THRESHOLD, LLM_INT8
from fourfold.quantization.number_format import NumberFormat
from fourfold.quantization.scales import NestedScales, PlainScales, Scales, dynamic_map
from fourfold.quantization.tensor import DTYPES, QuantizedTensor

__all__ = [
    "STATE_SUFFIXES",
    "VECTORWISE_SUFFIXES",
    "entry_keys",
    "from_state_dict",
    "is_quantized",
    "state_entry",
    "state_key",
    "to_state_dict",
]

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_BITSANDBYTES_FORMATS = ("nf4", "fp4")


def state_key(number_format: NumberFormat) -> str:
    """The suffix under which the JSON object of a tensor of this format stands."""
    owner = "bitsandbytes" if number_format.name in _BITSANDBYTES_FORMATS else "fourfold"
    return f"quant_state.{owner}__{number_format.name}"


STATE_SUFFIXES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(state_key(number_format) for number_format in FORMATS.values()),
)


# Of LLM.int8(), beside "weight" and not below it.
VECTORWISE_SUFFIXES = ("SCB", "weight_format")
_ROW_FORMAT = 0


def entry_keys(prefix: str) -> list[str]:
    """Every key under which a part of the quantized tensor `prefix` may stand, beside `prefix` itself."""
    path = prefix.removesuffix("weight")
    return [*(f"{prefix}.{suffix}" for suffix in STATE_SUFFIXES), *(path + suffix for suffix in VECTORWISE_SUFFIXES)]


def state_entry(prefix: str, number_format: NumberFormat) -> str:
    """The key without which `prefix` is no quantized tensor of this format."""
    if number_format.is_vectorwise:
        return prefix.removesuffix("weight") + VECTORWISE_SUFFIXES[0]
    return f"{prefix}.{state_key(number_format)}"


def is_quantized(keys: Mapping[str, Any], prefix: str) -> bool:
    """Whether the entry `prefix` of a state dict is a quantized tensor."""
    if prefix.endswith("weight") and state_entry(prefix, LLM_INT8) in keys:
        return True
    return any(f"{prefix}.{state_key(number_format)}" in keys for number_format in FORMATS.values())


def to_state_dict(tensor: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The entries of `tensor`; each owns its memory, as safetensors demands."""
    scales = tensor.scales
    if tensor.format.is_vectorwise:
        scale_key, format_key = (prefix.removesuffix("weight") + suffix for suffix in VECTORWISE_SUFFIXES)
        row_format = torch.tensor(_ROW_FORMAT, dtype=torch.uint8, device=tensor.device)
        return {prefix: tensor.codes, scale_key: scales.dequantize(), format_key: row_format}
    header: dict[str, Any] = {
        "quant_type": tensor.format.name,
        "blocksize": tensor.block_size,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    entries = {prefix: tensor.codes, f"{prefix}.quant_map": tensor.codebook.clone()}
    if isinstance(scales, NestedScales):
        header |= {
            "nested_blocksize": scales.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": scales.offset.item(),
        }
        entries |= {
            f"{prefix}.absmax": scales.codes,
            f"{prefix}.nested_absmax": scales.nested_absmax,
            f"{prefix}.nested_quant_map": scales.code_map.clone(),
        }
    else:
        entries[f"{prefix}.absmax"] = scales.absmax
    packed = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    entries[f"{prefix}.{state_key(tensor.format)}"] = packed.to(tensor.device)
    return entries


def from_state_dict(
    entries: Mapping[str, Tensor], prefix: str, outlier_threshold: float = DEFAULT_THRESHOLD
) -> QuantizedTensor:
    """Read the quantized tensor `prefix` out of a state dict.

    Args:
        entries: The state dict.
        prefix: The key of the codes.
        outlier_threshold: Of LLM.int8(), which stands in config.json.

    Raises:
        CheckpointError: Entries that are missing or do not fit each other.
    """
    if prefix.endswith("weight") and state_entry(prefix, LLM_INT8) in entries:
        return _vectorwise(entries, prefix, outlier_threshold)
    number_format, header = _header(entries, prefix)
    codes = _entry(entries, prefix)
    shape = torch.Size(header["shape"])
    num_bytes = number_format.num_code_bytes(shape.numel())
    codes = codes.reshape(-1).view(torch.uint8)
    if codes.numel() != num_bytes:
        raise CheckpointError(
            f"{prefix} is cut short or belongs to another shape",
            found=f"{codes.numel()} bytes of codes",
            allowed=f"{num_bytes} bytes for shape {tuple(shape)} in {number_format.name}",
            hint="get the checkpoint again",
        )
    scales = _scales(entries, prefix, header)
    num_blocks = -(-shape.numel() // header["blocksize"])
    num_scales = scales.codes.numel() if isinstance(scales, NestedScales) else scales.absmax.numel()
    if num_scales != num_blocks:
        raise CheckpointError(
            f"{prefix}.absmax does not fit {prefix}",
            found=f"{num_scales} scales",
            allowed=f"{num_blocks} blocks",
        )
    shared = number_format.codebook(codes.device)
    codebook = _entry(entries, f"{prefix}.quant_map").to(codes.device, torch.float32)
    return QuantizedTensor(
        codes=codes.reshape(-1, 1),
        scales=scales,
        codebook=shared if torch.equal(codebook, shared) else codebook,
        format=number_format,
        block_size=header["blocksize"],
        shape=shape,
        dtype=DTYPE_NAMES[header["dtype"]],
    )


def _vectorwise(entries: Mapping[str, Tensor], prefix: str, outlier_threshold: float) -> QuantizedTensor:
    codes, absmax = _entry(entries, prefix), entries[state_entry(prefix, LLM_INT8)]
    if codes.dtype != torch.int8 or codes.ndim != 2 or absmax.numel() != len(codes):
        raise CheckpointError(
            f"{prefix} and its scales do not fit each other",
            found=f"{codes.dtype} {tuple(codes.shape)}, {absmax.numel()} scales",
            allowed="int8 [out, in], and a scale for each row",
            hint="get the checkpoint again",
        )
    row_format = entries.get(prefix.removesuffix("weight") + VECTORWISE_SUFFIXES[1])
    if row_format is not None and int(row_format) != _ROW_FORMAT:
        raise CheckpointError(
            f"{prefix} is in a tiled layout of an old GPU",
            found=f"weight_format {int(row_format)}",
            allowed=f"weight_format {_ROW_FORMAT}, row by row",
            hint="save it anew with a version of bitsandbytes from 0.45 on",
        )
    return QuantizedTensor(
        codes=codes,
        scales=PlainScales(absmax.view(-1).float()),
        codebook=LLM_INT8.codebook(codes.device),
        format=LLM_INT8,
        block_size=codes.shape[1],
        shape=codes.shape,
        # The file does not say; bitsandbytes rounds to fp16 before it quantizes.
        dtype=torch.float16,
        outlier_threshold=outlier_threshold,
    )


def _header(entries: Mapping[str, Tensor], prefix: str) -> tuple[NumberFormat, dict[str, Any]]:
    for number_format in FORMATS.values():
        packed = entries.get(f"{prefix}.{state_key(number_format)}")
        if packed is not None:
            return number_format, _parsed(packed, f"{prefix}.{state_key(number_format)}")
    raise CheckpointError(
        f"{prefix} has no quantization state",
        allowed=[f"{prefix}.{state_key(number_format)}" for number_format in FORMATS.values()],
        hint="the checkpoint was half written, or is not quantized to 4 bits",
    )


def _parsed(packed: Tensor, key: str) -> dict[str, Any]:
    hint = "it was half written or damaged: get the checkpoint again"
    try:
        header: dict[str, Any] = json.loads(bytes(packed.cpu().tolist()).decode())
    except ValueError as error:
        raise CheckpointError(f"{key} is no JSON object: {error}", hint=hint) from error
    needed = {"blocksize", "dtype", "shape"} | ({"nested_blocksize"} if "nested_offset" in header else set())
    if not needed <= header.keys():
        raise CheckpointError(f"{key} is incomplete", found=sorted(header), allowed=sorted(needed), hint=hint)
    if header["dtype"] not in DTYPE_NAMES:
        raise CheckpointError(f"{key} has an unknown dtype", found=header["dtype"], allowed=DTYPE_NAMES)
    return header


def _scales(entries: Mapping[str, Tensor], prefix: str, header: dict[str, Any]) -> Scales:
    absmax = _entry(entries, f"{prefix}.absmax")
    if "nested_offset" not in header:
        return PlainScales(absmax.float())
    shared = dynamic_map(absmax.device)
    code_map = _entry(entries, f"{prefix}.nested_quant_map").to(absmax.device, torch.float32)
    return NestedScales(
        codes=absmax,
        nested_absmax=_entry(entries, f"{prefix}.nested_absmax"),
        offset=torch.tensor(float(header["nested_offset"]), device=absmax.device),
        code_map=shared if torch.equal(code_map, shared) else code_map,
        nested_block_size=header["nested_blocksize"],
    )


def _entry(entries: Mapping[str, Tensor], key: str) -> Tensor:
    try:
        return entries[key]
    except KeyError:
        raise CheckpointError(
            f"{key} is missing from the checkpoint", hint="it was half written: get it again"
        ) from None
