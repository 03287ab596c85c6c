"""The launches of the product of few rows on Hopper's tensor cores."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels.small_batch_hopper_triton import PAIRS, STAGES, WARPS, pack_kernel, product_kernel
from fourfold.kernels.small_batch_triton import sum_kernel

NESTED = {"scales_ptr": "*u8", "code_map_ptr": "*fp32", "nested_absmax_ptr": "*fp32", "offset_ptr": "*fp32"}
PLAIN = {"scales_ptr": "*fp32", "code_map_ptr": None, "nested_absmax_ptr": None, "offset_ptr": None}
HOPPER = (90,)


def product(block_m: int, spans: int, dtype: str, scales: dict[str, Any], bias: str | None, is_split: bool) -> Variant:
    arguments = {
        **{"out_ptr": "*fp32" if is_split else dtype, "packed_ptr": dtype},
        **{"codes_ptr": "*u8", "codebook_ptr": "*fp32", **scales, "bias_ptr": bias},
        **dict.fromkeys(["num_inputs", "num_rows", "num_columns"], "i32"),
        **{"NESTED_SHIFT": 8 if scales is NESTED else 0, "LOOKUP": "shuffle", "BLOCK_M": block_m, "WARPS": WARPS},
        **{"SPANS": spans, "IS_SPLIT": is_split, "EARLY": True},
    }
    options = {"num_warps": WARPS, "num_stages": STAGES, "enable_fp_fusion": False, "launch_pdl": True}
    return Variant(product_kernel, arguments, options, unaligned=("num_inputs",), archs=HOPPER)


def pack(dtype: str, block_m: int) -> Variant:
    arguments = {"packed_ptr": dtype, "x_ptr": dtype, "num_inputs": "i32", "num_columns": "i32"}
    constants = {"BLOCK_M": block_m, "PAIRS": PAIRS, "EARLY": True}
    return Variant(pack_kernel, arguments | constants, {"num_warps": 8}, unaligned=("num_inputs",), archs=HOPPER)


def add(dtype: str, block_m: int, block_n: int, splits: int) -> Variant:
    arguments = {"out_ptr": dtype, "partial_ptr": "*fp32", "bias_ptr": dtype, "num_inputs": "i32", "num_rows": "i32"}
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLITS": splits, "EARLY": True}
    options = {"num_warps": 4, "launch_pdl": True}
    return Variant(sum_kernel, arguments | constants, options, unaligned=("num_inputs",), archs=HOPPER)


VARIANTS = [
    *(product(block_m, 8, "*bf16", NESTED, None, True) for block_m in (16, 32, 64)),
    product(64, 2, "*bf16", NESTED, None, True),
    product(64, 1, "*bf16", NESTED, None, True),
    product(32, 7, "*fp16", PLAIN, None, True),
    *(product(block_m, 16, "*fp16", NESTED, "*fp16", False) for block_m in (16, 64)),
    product(64, 16, "*bf16", PLAIN, "*bf16", False),
    *(pack(dtype, block_m) for dtype, block_m in (("*bf16", 16), ("*fp16", 64))),
    *(add("*bf16", *sizes) for sizes in ((16, 8, 8), (64, 8, 16), (64, 32, 2))),
]
