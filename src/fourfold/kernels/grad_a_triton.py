# mypy: allow-untyped-defs, allow-incomplete-defs
"""A Triton kernel for the gradient of LoRA's A, which takes the time of reading the layer's input once.

A program owns a block of columns and a share of the rows, and adds up its part in registers. A second kernel adds up
the parts, times the norm's weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, is_hopper, on_device, rank_block
from fourfold.kernels.shares_triton import Pass, sum_shares, sum_tile

__all__ = ["NARROW", "SMALL", "WIDE", "grad_a", "tile_for"]

# On Hopper, for the fewest ranks and for others: of twice the columns, a program's sums are twice as large. Other GPUs
# have less shared memory.
WIDE = Pass(64, 512, 8, 3, programs=132, wide_first=True)
WIDE_RANK = 16
NARROW = Pass(64, 256, 8, 4, programs=132, wide_first=True)
SMALL = Pass(32, 256, 8, 3, programs=264)


@triton.jit
def grad_a_kernel(
    x_ptr,  # [M, K]
    low_ptr,  # [M, R]
    rstd_ptr,  # fp32 [M], or None
    sums_ptr,  # fp32 [shares, R, K]
    num_rows,
    share_rows,  # of a program
    x_stride,
    low_stride,
    SHARE: tl.constexpr,  # share_rows, or 0 where the compiler need not know them
    K: tl.constexpr,
    R: tl.constexpr,
    WIDE_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    share = tl.program_id(1)
    ranks, rows = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    column_mask, rank_mask = columns < K, ranks < R
    acc = tl.zeros([BLOCK_K, BLOCK_R] if WIDE_FIRST else [BLOCK_R, BLOCK_K], tl.float32)
    x_offsets = rows[:, None] * x_stride + columns[None, :]
    low_offsets = rows[:, None] * low_stride + ranks[None, :]
    first = share * share_rows
    for start in range(0, SHARE if SHARE > 0 else share_rows, BLOCK_M):
        row = (first + start).to(tl.int64)
        row_mask = row + rows < num_rows
        x = tl.load(x_ptr + row * x_stride + x_offsets, row_mask[:, None] & column_mask[None, :], 0.0)
        low = tl.load(low_ptr + row * low_stride + low_offsets, row_mask[:, None] & rank_mask[None, :], 0.0)
        if rstd_ptr is not None:
            rstd = tl.load(rstd_ptr + row + rows, row_mask, 0.0)
            low = (low.to(tl.float32) * rstd[:, None]).to(low_ptr.dtype.element_ty)
        acc = sum_tile(x, low, acc, WIDE_FIRST)
    if WIDE_FIRST:
        acc = tl.trans(acc)
    sums_at = sums_ptr + share.to(tl.int64) * R * K + ranks[:, None] * K + columns[None, :]
    tl.store(sums_at, acc, rank_mask[:, None] & column_mask[None, :])


def tile_for(rank: int, device: torch.device) -> Pass:
    """For sums of this rank."""
    if not is_hopper(device):
        return SMALL
    return WIDE if rank <= WIDE_RANK else NARROW


def grad_a(
    grad_low: Tensor,
    x: Tensor,
    rstd: Tensor | None = None,
    norm: Tensor | None = None,
    before: Tensor | None = None,
    tile: Pass | None = None,
) -> Tensor:
    """`grad_a.grad_a` for 16-bit tensors and ranks of 1 to 64.

    The number of shares follows from the width alone, so that no number of rows compiles a kernel of its own.
    """
    (num_rows, width), rank = x.shape, grad_low.shape[1]
    tile = tile or tile_for(rank, x.device)
    blocks = cdiv(width, tile.block_k)
    shares = max(1, tile.programs // blocks)
    # Whole tiles. The last shares may be empty: their sums are zeros.
    share_rows = cdiv(cdiv(num_rows, shares), tile.block_m) * tile.block_m
    parts = torch.empty(shares, rank, width, dtype=torch.float32, device=x.device)
    sums = torch.empty(rank, width, dtype=torch.float32, device=x.device)
    with on_device(x):
        grad_a_kernel[(blocks, shares)](
            x,
            grad_low,
            rstd,
            parts,
            num_rows,
            share_rows,
            x.stride(0),
            grad_low.stride(0),
            # The interpreter's loops have no other bounds than constants.
            SHARE=0 if x.is_cuda else share_rows,
            K=width,
            R=rank,
            WIDE_FIRST=tile.wide_first,
            BLOCK_R=rank_block(rank),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        sum_shares(sums, parts, norm, before)
    return sums
