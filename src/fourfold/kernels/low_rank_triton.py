# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of low_rank.py: a low-rank product is added in the pass that copies what it is added to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device

__all__ = ["add_low_rank"]

BLOCK_M = 64
BLOCK_N = 128


@triton.jit
def add_low_rank_kernel(
    x_ptr,  # [M, N]
    low_ptr,  # [M, R]
    up_ptr,  # [R, N]
    out_ptr,  # [M, N]
    num_rows,
    x_stride,
    low_stride,
    up_stride_r,
    up_stride_n,
    N: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    row_mask, column_mask, rank_mask = rows < num_rows, columns < N, ranks < R
    low = tl.load(low_ptr + rows[:, None] * low_stride + ranks[None, :], row_mask[:, None] & rank_mask[None, :], 0.0)
    up_at = ranks[:, None].to(tl.int64) * up_stride_r + columns[None, :].to(tl.int64) * up_stride_n
    up = tl.load(up_ptr + up_at, rank_mask[:, None] & column_mask[None, :], 0.0)
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask, 0.0).to(tl.float32)
    result = tl.dot(low, up, x, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], result.to(out_ptr.dtype.element_ty), mask)


def add_low_rank(x: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """`low_rank.add_low_rank` for R <= 64."""
    num_rows, width = x.shape
    rank = low.shape[1]
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    with on_device(x):
        add_low_rank_kernel[(cdiv(num_rows, BLOCK_M), cdiv(width, BLOCK_N))](
            x,
            low,
            up,
            out,
            num_rows,
            x.stride(0),
            low.stride(0),
            up.stride(0),
            up.stride(1),
            N=width,
            R=rank,
            BLOCK_R=max(16, next_power_of_2(rank)),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=4,
        )
    return out
