# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels that read a gradient once for both of its low-rank products.

With Q [M, N] the gradient of a group of linear layers' outputs, these are P = Q @ up.T, a sum over columns, and
S = Q.T @ low, a sum over rows. A program owns a block of columns and a share of the rows: it adds up its part of S in
registers, and stores its part of P of each tile of rows. A second kernel adds up both kinds of parts.

Where a group has several layers, each has ranks of its own, and `up` is zero between one's columns and another's ranks:
a block of columns is multiplied with its own layer's ranks only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, is_hopper, on_device, rank_block
from fourfold.kernels.shares_triton import SUM_BLOCK, Pass, add_up

__all__ = ["NARROW", "SMALL", "WIDE", "low_rank_pair_", "tile_for"]


# On Hopper: the wider the tile, the fewer parts of P there are to add up. With more than 16 ranks WIDE would take more
# shared memory than there is, and four of its tiles are a matrix too narrow for it. Other GPUs have less of the memory.
WIDE = Pass(64, 512, 8, 3, programs=132, wide_first=True)
WIDE_RANK = 16
WIDE_BLOCKS = 5
NARROW = Pass(64, 256, 8, 3, programs=132, wide_first=True)
SMALL = Pass(32, 256, 4, 3, programs=264, wide_first=True)


@triton.jit
def low_rank_pair_kernel(
    wide_ptr,  # Q: [M, N]
    up_ptr,  # [LAYERS * R, N]
    low_ptr,  # [M, LAYERS * R]
    products_ptr,  # fp32 [column blocks, M, R]: parts of P
    sums_ptr,  # fp32 [shares, N, R]: parts of S
    num_rows,
    share_rows,  # of a program
    wide_stride,
    up_stride_n,
    up_stride_r,
    low_stride,
    SHARE: tl.constexpr,  # share_rows, or 0 where the compiler need not know them
    N: tl.constexpr,
    R: tl.constexpr,  # of one layer
    SECOND: tl.constexpr,  # the column block with which the second layer begins, and the third
    THIRD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, share = tl.program_id(0), tl.program_id(1)
    layer = (block >= SECOND).to(tl.int32) + (block >= THIRD).to(tl.int32)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks, rows = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    column_mask, rank_mask = columns < N, ranks < R
    up_at = up_ptr + columns.to(tl.int64)[:, None] * up_stride_n + (layer * R + ranks)[None, :] * up_stride_r
    up = tl.load(up_at, column_mask[:, None] & rank_mask[None, :], 0.0)
    acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    wide_offsets = rows[:, None] * wide_stride + columns[None, :]
    low_offsets = rows[:, None] * low_stride + (layer * R + ranks)[None, :]
    product_offsets = rows[:, None] * R + ranks[None, :]
    products_ptr += block.to(tl.int64) * num_rows * R
    first = share * share_rows
    for start in range(0, SHARE if SHARE > 0 else share_rows, BLOCK_M):
        row = (first + start).to(tl.int64)
        row_mask = (row + rows < num_rows)[:, None]
        mask = row_mask & column_mask[None, :]
        wide_at = wide_ptr + row * wide_stride + wide_offsets
        wide = tl.load(wide_at, mask, 0.0)
        low = tl.load(low_ptr + row * low_stride + low_offsets, row_mask & rank_mask[None, :], 0.0)
        product = tl.dot(wide, up)
        acc = tl.dot(tl.trans(wide), low, acc)
        products_at = products_ptr + row * R + product_offsets
        product_mask = row_mask & rank_mask[None, :]
        tl.store(products_at, product, product_mask)
    sums_at = sums_ptr + share.to(tl.int64) * N * R + columns[:, None] * R + ranks[None, :]
    tl.store(sums_at, acc, column_mask[:, None] & rank_mask[None, :])


@triton.jit
def sum_pair_kernel(
    extended_ptr,  # [M, LAYERS * R]: P
    products_ptr,  # fp32 [COLUMN_BLOCKS, M, R]
    out_ptr,  # fp32 [N, R]: S, each layer's rows times its scaling
    sums_ptr,  # fp32 [SHARES, N, R]
    num_rows,
    extended_stride,
    first_scaling,
    second_scaling,
    third_scaling,
    N: tl.constexpr,
    R: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_K: tl.constexpr,  # the other kernel's
    BLOCK: tl.constexpr,
):
    sum_blocks: tl.constexpr = (N * R + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < sum_blocks:
        index = program * BLOCK + tl.arange(0, BLOCK)
        mask = index < N * R
        total = add_up(sums_ptr, index, mask, N * R, SHARES)
        block = index // R // BLOCK_K
        later = tl.where(block < THIRD, second_scaling, third_scaling)
        tl.store(out_ptr + index, total * tl.where(block < SECOND, first_scaling, later), mask)
    else:
        index = (program - sum_blocks) * BLOCK + tl.arange(0, BLOCK)
        size = num_rows * R
        mask = index < size
        out_at = extended_ptr + (index // R).to(tl.int64) * extended_stride + index % R
        dtype: tl.constexpr = extended_ptr.dtype.element_ty
        total = add_up(products_ptr, index, mask, size, SECOND)
        tl.store(out_at, total.to(dtype), mask)
        if SECOND < COLUMN_BLOCKS:
            total = add_up(products_ptr + SECOND * size.to(tl.int64), index, mask, size, THIRD - SECOND)
            tl.store(out_at + R, total.to(dtype), mask)
        if THIRD < COLUMN_BLOCKS:
            total = add_up(products_ptr + THIRD * size.to(tl.int64), index, mask, size, COLUMN_BLOCKS - THIRD)
            tl.store(out_at + 2 * R, total.to(dtype), mask)


def tile_for(width: int, rank: int, begins: Sequence[int], device: torch.device) -> Pass | None:
    """For layers of this rank; None where one begins within a tile's columns."""
    tile = NARROW if is_hopper(device) else SMALL
    is_wide = rank <= WIDE_RANK and width >= WIDE_BLOCKS * WIDE.block_k
    if tile is NARROW and is_wide and all(bound % WIDE.block_k == 0 for bound in (width, *begins)):
        return WIDE
    return tile if all(begin % tile.block_k == 0 for begin in begins) else None


def low_rank_pair_(
    extended: Tensor,
    width: int,
    up: Tensor,
    low: Tensor,
    begins: Sequence[int],
    scalings: Sequence[float],
    tile: Pass,
) -> Tensor:
    """`low_rank_pair.low_rank_pair_`; layers begin with multiples of the tile's columns.

    The number of shares follows from the width alone, so that no number of rows compiles a kernel of its own.
    """
    num_rows, layers = len(extended), len(begins) + 1
    rank = len(up) // layers
    blocks = cdiv(width, tile.block_k)
    second, third = (*(begin // tile.block_k for begin in begins), blocks, blocks)[:2]
    shares = max(1, tile.programs // blocks)
    # Whole tiles. The last shares may be empty: their sums are zeros.
    share_rows = cdiv(cdiv(num_rows, shares), tile.block_m) * tile.block_m
    products = torch.empty(blocks, num_rows, rank, dtype=torch.float32, device=extended.device)
    parts = torch.empty(shares, width, rank, dtype=torch.float32, device=extended.device)
    sums = torch.empty(width, rank, dtype=torch.float32, device=extended.device)
    with on_device(extended):
        low_rank_pair_kernel[(blocks, shares)](
            extended,
            up,
            low,
            products,
            parts,
            num_rows,
            share_rows,
            extended.stride(0),
            up.stride(1),
            up.stride(0),
            low.stride(0),
            # The interpreter's loops have no other bounds than constants.
            SHARE=0 if extended.is_cuda else share_rows,
            N=width,
            R=rank,
            SECOND=second,
            THIRD=third,
            BLOCK_R=rank_block(rank),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        sum_pair_kernel[(cdiv(width * rank, SUM_BLOCK) + cdiv(num_rows * rank, SUM_BLOCK),)](
            extended[:, width:],
            products,
            sums,
            parts,
            num_rows,
            extended.stride(0),
            *(*scalings, 1.0, 1.0)[:3],
            N=width,
            R=rank,
            SECOND=second,
            THIRD=third,
            COLUMN_BLOCKS=blocks,
            SHARES=shares,
            BLOCK_K=tile.block_k,
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
    return sums
