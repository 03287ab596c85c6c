"""The launches of the product of few rows."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels import small_batch_hopper_triton as hopper
from fourfold.kernels.small_batch_parts_triton import sum_kernel
from fourfold.kernels.small_batch_tiles import TILES, Tile
from fourfold.kernels.small_batch_triton import CHUNKS, matmul_kernel, pack_kernel

NESTED = {"scales_ptr": "*u8", "code_map_ptr": "*fp32", "nested_absmax_ptr": "*fp32", "offset_ptr": "*fp32"}
PLAIN = {"scales_ptr": "*fp32", "code_map_ptr": None, "nested_absmax_ptr": None, "offset_ptr": None}
CODES = {"codes_ptr": "*u8", "codebook_ptr": "*fp32"}
SIZES = dict.fromkeys(["num_inputs", "num_rows", "num_columns"], "i32")
EARLY = (False, True)


def launch(kernel: Any, arguments: dict[str, Any], early: bool, follows: bool = True, **options: Any) -> Variant:
    """`follows`: It may be launched early itself."""
    options["launch_pdl"] = early and follows
    archs = (90,) if early else (80,)
    return Variant(kernel, {**arguments, "EARLY": early}, options, unaligned=("num_inputs",), archs=archs)


def matmul(
    tile: Tile,
    dtype: str,
    scales: dict[str, Any],
    early: bool,
    bias: str | None = None,
    block_shift: int = 6,
    is_quad: bool = True,
    is_even: bool = True,
) -> Variant:
    # Columns are shared among programs by the last tile for so many rows of x only.
    is_split = tile is [other for other in TILES if other.block_m == tile.block_m][-1]
    arguments = {
        **{"out_ptr": "*fp32" if is_split else dtype, "x_ptr": dtype, **CODES, **scales, "bias_ptr": bias, **SIZES},
        **{"BLOCK_SHIFT": block_shift, "NESTED_SHIFT": 8, "LOOKUP": "shuffle"},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "WORDS": tile.words, "STEPS": 16},
        **{"ROW_WARPS": tile.row_warps, "COLUMN_WARPS": tile.column_warps, "IS_QUAD": is_quad},
        **{"IS_PACKED": tile.is_packed, "IS_EVEN": is_even, "IS_SPLIT": is_split},
    }
    warps = tile.row_warps * tile.column_warps
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    return launch(matmul_kernel, arguments, early, tile.is_packed, **options)


def pack(dtype: str, block_m: int, words: int, early: bool) -> Variant:
    arguments = {"packed_ptr": dtype, "x_ptr": dtype, "num_inputs": "i32", "num_columns": "i32"}
    constants = {"CHUNKS": CHUNKS, "BLOCK_M": block_m, "WORDS": words}
    return launch(pack_kernel, arguments | constants, early, False, num_warps=2)


def matmul_on_hopper(
    block_m: int, spans: int, dtype: str, scales: dict[str, Any], bias: str | None, is_split: bool
) -> Variant:
    arguments = {
        **{"out_ptr": "*fp32" if is_split else dtype, "x_ptr": dtype, **CODES, **scales, "bias_ptr": bias, **SIZES},
        **{"NESTED_SHIFT": 8 if scales is NESTED else 0, "LOOKUP": "shuffle"},
        **{"BLOCK_M": block_m, "WARPS": hopper.WARPS, "SPANS": spans, "IS_SPLIT": is_split},
    }
    options = {"num_warps": hopper.WARPS, "num_stages": hopper.STAGES, "enable_fp_fusion": False}
    return launch(hopper.hopper_matmul_kernel, arguments, True, **options)


def pack_on_hopper(dtype: str, block_m: int) -> Variant:
    arguments = {"packed_ptr": dtype, "x_ptr": dtype, "num_inputs": "i32", "num_columns": "i32"}
    constants = {"PAIRS": hopper.PAIRS, "BLOCK_M": block_m}
    return launch(hopper.hopper_pack_kernel, arguments | constants, True, False, num_warps=8)


def add(dtype: str, block_m: int, block_n: int, splits: int, early: bool) -> Variant:
    arguments = {"out_ptr": dtype, "partial_ptr": "*fp32", "bias_ptr": dtype, "num_inputs": "i32", "num_rows": "i32"}
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLITS": splits}
    return launch(sum_kernel, arguments | constants, early, num_warps=4)


VARIANTS = [
    *(matmul(tile, "*bf16", NESTED, early) for tile in TILES for early in EARLY),
    *(matmul(tile, "*fp16", PLAIN, early, "*fp16", 7, is_even=False) for tile in TILES for early in EARLY),
    *(matmul(tile, "*bf16", NESTED, early, None, 8, is_quad=False) for tile in TILES for early in EARLY),
    *(pack("*bf16", *sizes, early) for sizes in ((16, 4), (64, 2)) for early in EARLY),
    *(matmul_on_hopper(block_m, 8, "*bf16", NESTED, None, True) for block_m in (16, 32, 64)),
    *(matmul_on_hopper(64, spans, "*bf16", NESTED, None, True) for spans in (1, 2)),
    matmul_on_hopper(32, 7, "*fp16", PLAIN, None, True),
    *(matmul_on_hopper(block_m, 16, "*fp16", NESTED, "*fp16", False) for block_m in (16, 64)),
    matmul_on_hopper(64, 16, "*bf16", PLAIN, "*bf16", False),
    *(pack_on_hopper(dtype, block_m) for dtype, block_m in (("*bf16", 16), ("*fp16", 64))),
    *(add("*bf16", *sizes, early) for sizes in ((16, 8, 8), (64, 32, 2), (64, 8, 16)) for early in EARLY),
]
