# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803
"""Triton kernels of low_rank.py, and the sum of partial products that other kernels share.

Both products stream one large matrix once. Where its outer tiles are too few to fill the GPU the reduction is split;
each split leaves an fp32 partial product and a second kernel sums these in a fixed order, so that the same inputs
give the same bits (atomics would not).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device, splits_for

__all__ = ["low_rank_grad", "project", "sum_partials"]


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # fp32 [splits, rows * width]
    out_ptr,  # [rows, width], row stride out_stride
    num_elements,
    width,
    splits,
    out_stride,
    ADD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    # A loop to a constant, rather than to `splits`, has its loads in flight together.
    for split in tl.static_range(MAX_SPLITS):
        share = partial_ptr + tl.cast(split, tl.int64) * num_elements + index
        total += tl.load(share, mask=mask & (split < splits), other=0.0)
    out = out_ptr + (index // width).to(tl.int64) * out_stride + index % width
    if ADD:
        total += tl.load(out, mask=mask, other=0.0)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partial: Tensor, out: Tensor, add: bool = False) -> None:
    """out = sum of partial over its first dimension (+ out): fp32 [splits, rows, width] to [rows, width]."""
    splits, rows, width = partial.shape
    num_elements = rows * width
    sum_partials_kernel[(cdiv(num_elements, 512),)](
        partial,
        out,
        num_elements,
        width,
        splits,
        out.stride(0),
        ADD=add,
        MAX_SPLITS=next_power_of_2(splits),
        BLOCK=512,
        num_warps=4,
    )


@triton.jit
def project_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    out_ptr,  # [splits, M, R]
    num_rows,
    x_stride,
    a_stride_r,
    a_stride_k,
    BLOCKS: tl.constexpr,  # of each split
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    ranks = tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for index in range(0, BLOCKS):
        columns = (split * BLOCKS + index) * BLOCK_K + tl.arange(0, BLOCK_K)
        column_mask = columns < K
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], row_mask[:, None] & column_mask[None, :], 0.0)
        a = tl.load(
            a_ptr + columns[:, None].to(tl.int64) * a_stride_k + ranks[None, :].to(tl.int64) * a_stride_r,
            column_mask[:, None] & (ranks < R)[None, :],
            0.0,
        )
        acc = tl.dot(x, a, acc, input_precision="ieee")
    out = out_ptr + (split.to(tl.int64) * num_rows + rows)[:, None] * R + ranks[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), row_mask[:, None] & (ranks < R)[None, :])


def project(x: Tensor, a: Tensor) -> Tensor:
    """`low_rank.project` for R <= 64."""
    num_rows, width = x.shape
    rank = a.shape[0]
    block_r = max(16, next_power_of_2(rank))
    # Twice as wide in bytes, fp32 tiles are half as many elements; 16 rows where there are no more.
    block_m = 16 if num_rows <= 16 else 64
    block_k = 128 if x.element_size() == 2 else 32
    tiles = cdiv(num_rows, block_m)
    splits, blocks = splits_for(tiles, cdiv(width, block_k))
    out = torch.empty(num_rows, rank, dtype=x.dtype, device=x.device)
    partial = out if splits == 1 else torch.empty(splits, num_rows, rank, dtype=torch.float32, device=x.device)
    with on_device(x):
        project_kernel[(tiles, splits)](
            x,
            a,
            partial,
            num_rows,
            x.stride(0),
            a.stride(0),
            a.stride(1),
            BLOCKS=blocks,
            K=width,
            R=rank,
            BLOCK_R=block_r,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=3,
        )
        if splits > 1:
            sum_partials(partial, out)
    return out


@triton.jit
def low_rank_grad_kernel(
    p_ptr,  # [M, R]
    q_ptr,  # [M, N]
    out_ptr,  # fp32 [splits, R, N], or [R, N] of row stride out_stride
    num_rows,
    p_stride,
    q_stride,
    out_stride,
    BLOCKS: tl.constexpr,  # of each split
    N: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    ranks = tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for index in range(0, BLOCKS):
        rows = (split * BLOCKS + index).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < num_rows
        p = tl.load(p_ptr + rows[:, None] * p_stride + ranks[None, :], row_mask[:, None] & (ranks < R)[None, :], 0.0)
        q = tl.load(q_ptr + rows[:, None] * q_stride + columns[None, :], row_mask[:, None] & column_mask[None, :], 0.0)
        acc = tl.dot(tl.trans(p), q, acc, input_precision="ieee")
    out = out_ptr + (split * R + ranks).to(tl.int64)[:, None] * out_stride + columns[None, :]
    mask = (ranks < R)[:, None] & column_mask[None, :]
    if ADD:
        acc += tl.load(out, mask, 0.0)
    tl.store(out, acc, mask)


def low_rank_grad(p: Tensor, q: Tensor, out: Tensor | None = None) -> Tensor:
    """`low_rank.low_rank_grad` for R <= 64."""
    num_rows, rank = p.shape
    width = q.shape[1]
    block_r = max(16, next_power_of_2(rank))
    block_m, block_n = (64, 128) if p.element_size() == 2 else (32, 64)
    tiles = cdiv(width, block_n)
    splits, blocks = splits_for(tiles, cdiv(num_rows, block_m))
    add = out is not None
    if out is None:
        out = torch.empty(rank, width, dtype=torch.float32, device=p.device)
    partial = out if splits == 1 else torch.empty(splits, rank, width, dtype=torch.float32, device=p.device)
    with on_device(p):
        low_rank_grad_kernel[(tiles, splits)](
            p,
            q,
            partial,
            num_rows,
            p.stride(0),
            q.stride(0),
            partial.stride(-2),
            BLOCKS=blocks,
            N=width,
            R=rank,
            BLOCK_R=block_r,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            ADD=add and splits == 1,
            num_warps=4,
            num_stages=4,
        )
        if splits > 1:
            sum_partials(partial, out, add)
    return out
