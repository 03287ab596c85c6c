"""Launches of the pass that adds a low-rank product."""

from __future__ import annotations

from compiling import Variant

from fourfold.kernels import low_rank_triton


def _added(pointer: str, width: int, rank: int) -> Variant:
    arguments = {
        **dict.fromkeys(("x_ptr", "low_ptr", "up_ptr", "out_ptr"), pointer),
        **dict.fromkeys(("num_rows", "x_stride", "low_stride", "up_stride_n"), "i32"),
        "up_stride_r": 1,
        "N": width,
        "R": rank,
        "BLOCK_R": max(16, 1 << (rank - 1).bit_length()),
        "BLOCK_M": low_rank_triton.BLOCK_M,
        "BLOCK_N": low_rank_triton.BLOCK_N,
    }
    return Variant(low_rank_triton.add_low_rank_kernel, arguments, {"num_warps": 4})


VARIANTS = [_added("*bf16", 4096, rank) for rank in (16, 48, 64)] + [_added("*fp16", 576, 16)]
