"""Launches of the passes that form a gradient's two low-rank products."""

from __future__ import annotations

from compiling import Variant

from fourfold.kernels import low_rank_pair_triton


def _pair(pointer: str, width: int, rank: int, begins: tuple[int, int] | None = None) -> Variant:
    tile = low_rank_pair_triton.DEFAULT
    blocks = -(-width // tile.block_k)
    second, third = (begin // tile.block_k for begin in begins) if begins else (blocks, blocks)
    arguments = {
        **dict.fromkeys(("wide_ptr", "up_ptr", "low_ptr"), pointer),
        **dict.fromkeys(("products_ptr", "sums_ptr"), "*fp32"),
        **dict.fromkeys(("num_rows", "share_rows", "wide_stride", "up_stride_n", "low_stride"), "i32"),
        "up_stride_r": 1,
        "SHARE": 0,
        "N": width,
        "R": rank,
        "SECOND": second,
        "THIRD": third,
        "KEEP": False,
        "OVERLAP": False,
        "BLOCK_R": max(16, 1 << (rank - 1).bit_length()),
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Variant(low_rank_pair_triton.low_rank_pair_kernel, arguments, options, unaligned=("num_rows",))


def _pair_sums(blocks: int, shares: int, second: int, third: int, add: bool) -> Variant:
    arguments = {
        **dict.fromkeys(("products_ptr", "out_ptr", "sums_ptr"), "*fp32"),
        **dict.fromkeys(("num_rows", "extended_stride"), "i32"),
        "extended_ptr": "*bf16",
        "N": blocks * low_rank_pair_triton.DEFAULT.block_k,
        "R": 16,
        "SECOND": second,
        "THIRD": third,
        "COLUMN_BLOCKS": blocks,
        "SHARES": shares,
        "ADD": add,
        "OVERLAP": False,
        "BLOCK": low_rank_pair_triton.SUM_BLOCK,
    }
    return Variant(low_rank_pair_triton.sum_pair_kernel, arguments, {"num_warps": 4}, unaligned=("num_rows",))


VARIANTS = [
    _pair("*bf16", 4096, 16),
    _pair("*fp16", 4096, 32),
    _pair("*bf16", 6144, 16, (4096, 5120)),
    _pair_sums(16, 16, 16, 16, False),
    _pair_sums(24, 11, 16, 20, True),
]
