# mypy: allow-untyped-defs, allow-incomplete-defs
"""A Triton kernel that multiplies an activation by a narrow matrix, and copies it on its way if it is to.

A program owns a block of rows and goes over all their columns, so that the order of a row's sum, and the result, is
the same in each run and whatever other rows there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import Tile, cdiv, is_hopper, on_device, rank_block

__all__ = ["SHORT", "STAGES", "TALL", "low_rank_beside", "tile_for"]


# For many rows on Hopper, whose tensor cores multiply 64 at a time; for fewer, and for other GPUs, which have less
# shared memory: with 64 ranks these take at most 80 KiB.
TALL = Tile(64, 256, 8)
SHORT = Tile(16, 128, 4)
MANY_ROWS = 4096
# The tile that is worked on, and those being loaded meanwhile.
STAGES = 3


@triton.jit
def low_rank_beside_kernel(
    x_ptr,  # [M, K]
    projection_ptr,  # [R, K]
    out_ptr,  # [M, K + R]; begins with x where that is not copied
    low_ptr,  # [M, R]
    num_rows,
    x_stride,
    projection_stride,
    out_stride,
    K: tl.constexpr,
    R: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    row_mask, rank_mask = (first + rows < num_rows)[:, None], ranks < R
    x_ptr += first * x_stride
    out_ptr += first * out_stride
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = row_mask & (columns < K)[None, :]
        x = tl.load(x_ptr + (rows[:, None] * x_stride + columns[None, :]), mask, 0.0)
        projection_at = projection_ptr + ranks[:, None] * projection_stride + columns[None, :]
        projection = tl.load(projection_at, rank_mask[:, None] & (columns < K)[None, :], 0.0)
        if COPY:
            tl.store(out_ptr + (rows[:, None] * out_stride + columns[None, :]), x, mask)
        acc = tl.dot(x, tl.trans(projection), acc)
    low = acc.to(out_ptr.dtype.element_ty)
    mask = row_mask & rank_mask[None, :]
    tl.store(out_ptr + (rows[:, None] * out_stride + K + ranks[None, :]), low, mask)
    tl.store(low_ptr + first * R + (rows[:, None] * R + ranks[None, :]), low, mask)


def tile_for(num_rows: int, device: torch.device) -> Tile:
    """The tile for as many rows."""
    return TALL if num_rows >= MANY_ROWS and is_hopper(device) else SHORT


def low_rank_beside(
    x: Tensor, projection: Tensor, extended: Tensor, tile: Tile | None = None, *, in_place: bool = False
) -> Tensor:
    """The product of `low_rank_beside.low_rank_beside`, alone; writes `extended`. The projection's last stride is 1.

    Args:
        in_place: x is the first columns of `extended`.
    """
    num_rows, width = x.shape
    rank = len(projection)
    tile = tile or tile_for(num_rows, x.device)
    low = x.new_empty(num_rows, rank)
    with on_device(x):
        low_rank_beside_kernel[(cdiv(num_rows, tile.block_m),)](
            x,
            projection,
            extended,
            low,
            num_rows,
            x.stride(0),
            projection.stride(0),
            extended.stride(0),
            K=width,
            R=rank,
            COPY=not in_place,
            BLOCK_R=rank_block(rank),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=STAGES,
        )
    return low
