"""The launches of the 4-bit codec: dequantization, expansion and quantization."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels import group_expansion_triton
from fourfold.kernels.blockwise_triton import EVEN, WORDS, dequantize_even_kernel, dequantize_kernel
from fourfold.kernels.encoding_triton import TILE, quantize_kernel
from fourfold.kernels.expansion_triton import ADAPTER_TILE, expand_kernel
from fourfold.kernels.group_expansion_triton import expand_group_kernel

NESTED = {"scales_ptr": "*u8", "code_map_ptr": "*fp32", "nested_absmax_ptr": "*fp32", "offset_ptr": "*fp32"}
PLAIN = {"scales_ptr": "*fp32", "code_map_ptr": None, "nested_absmax_ptr": None, "offset_ptr": None}
CODES = {"codes_ptr": "*u8", "codebook_ptr": "*fp32"}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
EVEN_CONSTANTS = {"BLOCK_SHIFT": 6, "NESTED_SHIFT": 8, "LOOKUP": "shuffle", **EVEN}
EVEN_OPTIONS = {"num_warps": EVEN["THREADS"] // 32, "enable_fp_fusion": False}


def constants(bits: int, lookup: str, is_whole: bool = True) -> dict[str, Any]:
    return {
        "BITS": bits,
        "BLOCK_SHIFT": 6,
        "NESTED_SHIFT": 8,
        "IS_WHOLE": is_whole,
        "LOOKUP": lookup,
        "WORDS": WORDS,
    }


def dequantize(dtype: str, scales: dict[str, Any], integer: str = "i32", **options: Any) -> Variant:
    arguments = {"out_ptr": dtype, "num_elements": integer, **CODES, **scales, **constants(**options)}
    return Variant(dequantize_kernel, arguments, OPTIONS)


def dequantize_even(dtype: str, scales: dict[str, Any]) -> Variant:
    return Variant(dequantize_even_kernel, {"out_ptr": dtype, **CODES, **scales, **EVEN_CONSTANTS}, EVEN_OPTIONS)


def expand(dtype: str, scales: dict[str, Any], adapter: str | None, is_wide: bool, **options: Any) -> Variant:
    integers = [
        *("num_rows", "row", "total_rows", "used_ranks", "rank_row", "rank", "num_zero_rows"),
        *("num_weight_programs", "num_b_programs"),
    ]
    arguments = {
        **{"out_ptr": dtype, **CODES, **scales, "lora_a_ptr": adapter, "lora_b_ptr": adapter, "scaling": "fp32"},
        **dict.fromkeys(["num_columns", "padded_ranks", "stride", *integers], "i32"),
        **constants(**options),
        "IS_WIDE": is_wide,
        "ADAPTER_TILE": ADAPTER_TILE,
    }
    return Variant(expand_kernel, arguments, OPTIONS, unaligned=tuple(integers))


def expand_group(
    dtype: str, scales: dict[str, Any], members: int, columns: int, ranks: int, adapter: str | None
) -> Variant:
    def each(name: str, type: str | None) -> dict[str, str | None]:
        return {f"{name}_{index}": type if index < members else None for index in range(3)}

    counts = ["rank_0", "rank_1", "rank_2", "row_1", "row_2", "total_rows", "tile_1", "tile_2"]
    integers = [*counts, "num_b_programs", "num_adapter_programs"]
    own = each("codes", "*u8") | each("scales", scales["scales_ptr"])
    own |= each("nested", scales["nested_absmax_ptr"]) | each("offset", scales["offset_ptr"])
    arguments = {
        **{"out_ptr": dtype, "codebook_ptr": "*fp32", "code_map_ptr": scales["code_map_ptr"], **own},
        **each("lora_a", adapter),
        **each("lora_b", adapter),
        **dict.fromkeys(["scaling_0", "scaling_1", "scaling_2"], "fp32"),
        **dict.fromkeys(integers, "i32"),
        **{"COLUMNS": columns, "RANKS": ranks, "STRIDE": -(-(columns + ranks) // 64) * 64 if ranks else columns},
        **{"ADAPTER_TILE": group_expansion_triton.ADAPTER_TILE, **EVEN_CONSTANTS},
    }
    return Variant(expand_group_kernel, arguments, EVEN_OPTIONS, unaligned=(*integers, *own))


def quantize(dtype: str, bits: int, block_size: int) -> Variant:
    pointers = {"codes_ptr": "*u8", "absmax_ptr": "*fp32", "flat_ptr": dtype, "thresholds_ptr": "*fp32"}
    sizes = {"BITS": bits, "BLOCK_SIZE": block_size, "BLOCKS": TILE // block_size}
    arguments = {**pointers, "order_ptr": "*u8", "num_elements": "i32", **sizes}
    return Variant(quantize_kernel, arguments, {"num_warps": 8, "enable_fp_fusion": False})


VARIANTS = [
    dequantize("*bf16", NESTED, bits=4, lookup="shuffle"),
    dequantize("*bf16", PLAIN, bits=4, lookup="shuffle"),
    dequantize("*fp32", NESTED, bits=4, lookup="shuffle"),
    dequantize("*fp16", NESTED, "i64", bits=4, lookup="shuffle", is_whole=False),
    dequantize("*bf16", NESTED, bits=8, lookup="gather"),
    expand("*bf16", NESTED, "*fp32", True, bits=4, lookup="shuffle"),
    expand("*bf16", NESTED, "*fp32", False, bits=4, lookup="shuffle"),
    expand("*fp32", PLAIN, None, False, bits=4, lookup="shuffle", is_whole=False),
    expand("*bf16", NESTED, "*bf16", True, bits=8, lookup="gather"),
    *(dequantize_even(dtype, scales) for dtype in ("*bf16", "*fp16", "*fp32") for scales in (NESTED, PLAIN)),
    expand_group("*bf16", NESTED, 3, 4096, 48, "*fp32"),
    expand_group("*bf16", NESTED, 2, 4096, 32, "*fp32"),
    expand_group("*bf16", NESTED, 1, 14336, 16, "*bf16"),
    expand_group("*bf16", NESTED, 2, 2048, 0, None),
    expand_group("*fp16", PLAIN, 3, 896, 112, "*fp32"),
    expand_group("*fp32", PLAIN, 1, 4096, 256, "*fp32"),
    quantize("*bf16", 4, 64),
    quantize("*fp32", 4, 4096),
    quantize("*fp16", 8, 64),
]
