# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803
"""Triton kernels of norm.py.

Without a projection a program holds whole rows in registers. With one, it owns 16 or 32 rows and goes over them
twice: once for the reduction and once, from the far end, where the last tiles are still in the cache, to write the
result and multiply it by the projection on tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device
from fourfold.kernels.low_rank import fill_columns, fused

__all__ = ["Tile", "rms_norm", "rms_norm_backward", "tile_for"]


class Tile(NamedTuple):
    """Rows and columns of a program's tile, and how it is launched."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


def tile_for(num_rows: int, width: int, rank: int, element_size: int) -> Tile:
    """The tile of a norm; `rank` is 0 without a projection."""
    if rank == 0:
        block_k = min(next_power_of_2(width), 16384)
        return Tile(1, block_k, max(1, min(block_k // 512, 16)), 1)
    # More rows a tile read the projection less often, fewer leave more programs: 2048 rows make 128 of 16.
    block_m = 16 if num_rows <= 4096 or rank <= 32 else 32
    return Tile(block_m, min(128 if element_size == 2 else 64, max(16, next_power_of_2(width))), 4, 2)


@triton.jit
def _projection_tile(p_ptr, columns, stride_r, stride_k, K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks = tl.arange(0, BLOCK_R)
    offsets = columns[:, None].to(tl.int64) * stride_k + ranks[None, :].to(tl.int64) * stride_r
    return tl.load(p_ptr + offsets, (columns < K)[:, None] & (ranks < R)[None, :], 0.0)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [K]
    p_ptr,  # [R, K]
    out_ptr,  # [M, K + columns], of which K + R are written
    rstd_ptr,  # fp32 [M]
    num_rows,
    x_stride,
    out_stride,
    p_stride_r,
    p_stride_k,
    eps,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    columns = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + rows[:, None] * x_stride
    out_rows = out_ptr + rows[:, None] * out_stride
    if BLOCK_K >= K and R == 0:
        mask = row_mask[:, None] & (columns < K)[None, :]
        x = tl.load(x_rows + columns[None, :], mask, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, columns < K, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / K + eps)
        y = weight[None, :].to(tl.float32) * (x * rstd[:, None]).to(dtype).to(tl.float32)
        tl.store(out_rows + columns[None, :], y.to(dtype), mask)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=4):
            k = start + columns
            x = tl.load(x_rows + k[None, :], row_mask[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
            squares += x * x
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / K + eps)
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        last: tl.constexpr = (K - 1) // BLOCK_K
        for block in range(0, last + 1):
            k = (last - block) * BLOCK_K + columns
            mask = row_mask[:, None] & (k < K)[None, :]
            x = tl.load(x_rows + k[None, :], mask, 0.0).to(tl.float32)
            weight = tl.load(weight_ptr + k, k < K, 0.0)
            y = (weight[None, :].to(tl.float32) * (x * rstd[:, None]).to(dtype).to(tl.float32)).to(dtype)
            tl.store(out_rows + k[None, :], y, mask)
            if R > 0:
                p = _projection_tile(p_ptr, k, p_stride_r, p_stride_k, K, R, BLOCK_R)
                acc = tl.dot(y, p, acc, input_precision="ieee")
        if R > 0:
            ranks = tl.arange(0, BLOCK_R)
            tl.store(out_rows + K + ranks[None, :], acc.to(dtype), row_mask[:, None] & (ranks < R)[None, :])
    tl.store(rstd_ptr + rows, rstd, row_mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, projection: Tensor | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm`; `tile` is for measurements."""
    num_rows, width = x.shape
    columns = 0 if projection is None else projection.shape[0]
    taken = fused(projection)
    rank = 0 if taken is None else columns
    tile = tile or tile_for(num_rows, width, rank, x.element_size())
    out = torch.empty(num_rows, width + columns, dtype=x.dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    with on_device(x):
        rms_norm_kernel[(cdiv(num_rows, tile.block_m),)](
            x,
            weight,
            taken,
            out,
            rstd,
            num_rows,
            x.stride(0),
            out.stride(0),
            0 if taken is None else taken.stride(0),
            0 if taken is None else taken.stride(1),
            eps,
            K=width,
            R=rank,
            BLOCK_R=max(16, next_power_of_2(max(rank, 1))),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        fill_columns(out, width, projection)
    return out, rstd


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,  # [M, K]
    x_ptr,  # [M, K]
    weight_ptr,  # [K]
    rstd_ptr,  # fp32 [M]
    residual_ptr,  # [M, K] or None
    p_ptr,  # [R, K]
    out_ptr,  # [M, K + columns]
    num_rows,
    grad_stride,
    x_stride,
    residual_stride,
    out_stride,
    p_stride_r,
    p_stride_k,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    columns = tl.arange(0, BLOCK_K)
    rstd = tl.load(rstd_ptr + rows, row_mask, 0.0)
    grad_rows = grad_ptr + rows[:, None] * grad_stride
    x_rows = x_ptr + rows[:, None] * x_stride
    out_rows = out_ptr + rows[:, None] * out_stride
    if BLOCK_K >= K and R == 0:
        mask = row_mask[:, None] & (columns < K)[None, :]
        weight = tl.load(weight_ptr + columns, columns < K, 0.0).to(tl.float32)
        grad = tl.load(grad_rows + columns[None, :], mask, 0.0).to(tl.float32) * weight[None, :]
        normed = tl.load(x_rows + columns[None, :], mask, 0.0).to(tl.float32) * rstd[:, None]
        mean = tl.sum(grad * normed, 1) / K
        result = rstd[:, None] * (grad - normed * mean[:, None])
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask, 0.0)
            result += residual.to(tl.float32)
        tl.store(out_rows + columns[None, :], result.to(dtype), mask)
    else:
        products = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=2):
            k = start + columns
            mask = row_mask[:, None] & (k < K)[None, :]
            weight = tl.load(weight_ptr + k, k < K, 0.0).to(tl.float32)
            grad = tl.load(grad_rows + k[None, :], mask, 0.0).to(tl.float32) * weight[None, :]
            products += grad * tl.load(x_rows + k[None, :], mask, 0.0).to(tl.float32)
        mean = tl.sum(products, 1) * rstd / K
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        last: tl.constexpr = (K - 1) // BLOCK_K
        for block in range(0, last + 1):
            k = (last - block) * BLOCK_K + columns
            mask = row_mask[:, None] & (k < K)[None, :]
            weight = tl.load(weight_ptr + k, k < K, 0.0).to(tl.float32)
            grad = tl.load(grad_rows + k[None, :], mask, 0.0).to(tl.float32) * weight[None, :]
            normed = tl.load(x_rows + k[None, :], mask, 0.0).to(tl.float32) * rstd[:, None]
            result = rstd[:, None] * (grad - normed * mean[:, None])
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + rows[:, None] * residual_stride + k[None, :], mask, 0.0)
                result += residual.to(tl.float32)
            tl.store(out_rows + k[None, :], result.to(dtype), mask)
            if R > 0:
                p = _projection_tile(p_ptr, k, p_stride_r, p_stride_k, K, R, BLOCK_R)
                acc = tl.dot(result.to(dtype), p, acc, input_precision="ieee")
        if R > 0:
            ranks = tl.arange(0, BLOCK_R)
            tl.store(out_rows + K + ranks[None, :], acc.to(dtype), row_mask[:, None] & (ranks < R)[None, :])


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    projection: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`norm.rms_norm_backward`; `tile` is for measurements."""
    num_rows, width = x.shape
    columns = 0 if projection is None else projection.shape[0]
    taken = fused(projection)
    rank = 0 if taken is None else columns
    tile = tile or tile_for(num_rows, width, rank, x.element_size())
    out = torch.empty(num_rows, width + columns, dtype=x.dtype, device=x.device)
    with on_device(x):
        rms_norm_backward_kernel[(cdiv(num_rows, tile.block_m),)](
            grad,
            x,
            weight,
            rstd,
            residual_grad,
            taken,
            out,
            num_rows,
            grad.stride(0),
            x.stride(0),
            0 if residual_grad is None else residual_grad.stride(0),
            out.stride(0),
            0 if taken is None else taken.stride(0),
            0 if taken is None else taken.stride(1),
            K=width,
            R=rank,
            BLOCK_R=max(16, next_power_of_2(max(rank, 1))),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        fill_columns(out, width, projection)
    return out
