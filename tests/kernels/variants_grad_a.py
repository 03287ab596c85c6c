"""Launches of the gradient of A: o, gate and up, and qkv of Llama-3-8B; and of the sums of its parts."""

from __future__ import annotations

from compiling import Variant

from fourfold.kernels import grad_a_triton, shares_triton
from fourfold.kernels.shares_triton import Pass


def _grad_a(tile: Pass, width: int, rank: int, *, is_normed: bool, pointer: str = "*bf16") -> Variant:
    arguments = {
        **dict.fromkeys(("x_ptr", "low_ptr"), pointer),
        **{"rstd_ptr": "*fp32" if is_normed else None, "sums_ptr": "*fp32"},
        **dict.fromkeys(("num_rows", "share_rows", "x_stride", "low_stride"), "i32"),
        **{"SHARE": 0, "K": width, "R": rank, "BLOCK_R": max(16, 1 << (rank - 1).bit_length())},
        **{"WIDE_FIRST": tile.wide_first, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    archs = (90,) if tile.wide_first else (80, 90)
    return Variant(grad_a_triton.grad_a_kernel, arguments, options, unaligned=("num_rows",), archs=archs)


def _shares(columns: int, shares: int, *, factors: bool, before: bool, out: str = "*fp32") -> Variant:
    arguments = {
        **{"out_ptr": out, "shares_ptr": "*fp32", "factors_ptr": "*bf16" if factors else None},
        **{"before_ptr": "*fp32" if before else None, "size": "i32", "out_stride": "i32"},
        **{"COLUMNS": columns, "SHARES": shares, "BLOCK": shares_triton.SUM_BLOCK},
    }
    return Variant(shares_triton.sum_shares_kernel, arguments, {"num_warps": 4})


VARIANTS = [
    *(_grad_a(grad_a_triton.WIDE, 4096, 16, is_normed=is_normed) for is_normed in (False, True)),
    _grad_a(grad_a_triton.WIDE, 4096, 8, is_normed=False),
    _grad_a(grad_a_triton.WIDE, 2300, 5, is_normed=True, pointer="*fp16"),
    *(
        _grad_a(tile, 4096, rank, is_normed=rank != 16)
        for tile in (grad_a_triton.NARROW, grad_a_triton.SMALL)
        for rank in (16, 24, 32, 48, 64)
    ),
    *(_shares(4096, 16, factors=factors, before=before) for factors, before in ((False, False), (True, False))),
    _shares(4096, 8, factors=True, before=True),
    _shares(16, 2, factors=False, before=False, out="*bf16"),
]
