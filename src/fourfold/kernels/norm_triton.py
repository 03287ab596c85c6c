# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of norm.py. A program holds whole rows in registers and moves each byte once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import Tile, cdiv, next_power_of_2, on_device
from fourfold.kernels.low_rank import new_extended

__all__ = ["rms_norm", "rms_norm_backward", "tile_for"]


def tile_for(width: int, *, backward: bool = False) -> Tile:
    """The tile of a norm over rows of `width`."""
    block_k = next_power_of_2(width)
    # Threads of sixteen warps have half as many registers as those of eight, which the forward pass is short of at 8192
    # columns; the backward pass is so with twice the columns for a thread.
    most = 16 if backward or block_k > 8192 else 8
    return Tile(1, block_k, max(1, min(block_k // 512, most)))


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [M, K]; becomes the sum where there is an addend
    addend_ptr,  # [M, K] or None
    copy_ptr,  # [M, K] or None
    weight_ptr,  # [K]
    out_ptr,  # [M, K]
    rstd_ptr,  # fp32 [M]
    num_rows,
    x_stride,
    addend_stride,
    copy_stride,
    out_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    columns = tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (columns < K)[None, :]
    x_at = x_ptr + rows[:, None] * x_stride + columns[None, :]
    x = tl.load(x_at, mask, 0.0).to(tl.float32)
    if addend_ptr is not None:
        x += tl.load(addend_ptr + rows[:, None] * addend_stride + columns[None, :], mask, 0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(x_at, rounded, mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + rows[:, None] * copy_stride + columns[None, :], rounded, mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, columns < K, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / K + eps)
    y = weight[None, :].to(tl.float32) * (x * rstd[:, None]).to(dtype).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], y.to(dtype), mask)
    tl.store(rstd_ptr + rows, rstd, row_mask)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    room: int = 0,
    addend: Tensor | None = None,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm`; with `addend`, `norm.add_rms_norm_`."""
    num_rows, width = x.shape
    tile = tile_for(width)
    out = new_extended(x, num_rows, width, room)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    with on_device(x):
        rms_norm_kernel[(cdiv(num_rows, tile.block_m),)](
            x,
            addend,
            copy,
            weight,
            out,
            rstd,
            num_rows,
            x.stride(0),
            0 if addend is None else addend.stride(0),
            0 if copy is None else copy.stride(0),
            out.stride(0),
            eps,
            K=width,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
        )
    return out, rstd


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,  # [M, K]
    x_ptr,  # [M, K]
    weight_ptr,  # [K]
    rstd_ptr,  # fp32 [M]
    residual_ptr,  # [M, K] or None
    out_ptr,  # [M, K]
    num_rows,
    grad_stride,
    x_stride,
    residual_stride,
    out_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    columns = tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (columns < K)[None, :]
    rstd = tl.load(rstd_ptr + rows, row_mask, 0.0)
    weight = tl.load(weight_ptr + columns, columns < K, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask, 0.0).to(tl.float32)
    grad *= weight[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask, 0.0).to(tl.float32)
    normed = x * rstd[:, None]
    mean = tl.sum(grad * normed, 1) / K
    result = rstd[:, None] * (grad - normed * mean[:, None])
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask, 0.0)
        result += residual.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], result.to(dtype), mask)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None, out: Tensor
) -> None:
    """`norm.rms_norm_backward`, written to `out`."""
    num_rows, width = x.shape
    tile = tile_for(width, backward=True)
    with on_device(x):
        rms_norm_backward_kernel[(cdiv(num_rows, tile.block_m),)](
            grad,
            x,
            weight,
            rstd,
            residual_grad,
            out,
            num_rows,
            grad.stride(0),
            x.stride(0),
            0 if residual_grad is None else residual_grad.stride(0),
            out.stride(0),
            K=width,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
        )
