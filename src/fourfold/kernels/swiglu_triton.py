# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803
"""Triton kernels of swiglu.py.

A program owns some rows and a stretch of columns, over which it sums its share of the low-rank product; where rows
alone do not fill the GPU the columns are split, and the shares are summed by low_rank_triton.sum_partials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device, splits_for
from fourfold.kernels.low_rank import fill_columns, fused
from fourfold.kernels.low_rank_triton import sum_partials
from fourfold.kernels.norm_triton import Tile

__all__ = ["backward_tile_for", "forward_tile_for", "swiglu", "swiglu_backward_"]


def forward_tile_for(num_rows: int, rank: int, element_size: int) -> Tile:
    """The tile of the forward pass; `rank` is 0 without a projection."""
    if rank == 0:
        return Tile(4, 512, 4, 1)
    return Tile(16 if num_rows <= 16 else 32, 128 if element_size == 2 else 32, 4, 2)


def backward_tile_for(num_rows: int, rank: int, element_size: int) -> Tile:
    """The tile of the backward pass; `rank` is the larger of its two products', or 0 without any."""
    if rank == 0:
        return Tile(4, 512, 4, 1)
    return Tile(16 if num_rows <= 16 else 32, 64 if element_size == 2 else 32, 4, 2)


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """The activation and its derivative, fp32."""
    if GELU:
        # tanh(z) = 2 sigmoid(2 z) - 1, which neither overflows nor divides by zero.
        tanh = 2 * tl.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        value = 0.5 * gate * (1 + tanh)
        derivative = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope
    else:
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        derivative = sigmoid * (1 + gate * (1 - sigmoid))
    return value, derivative


@triton.jit
def _projection_tile(p_ptr, columns, mask, stride_r, stride_k, ranks, R: tl.constexpr):
    offsets = columns[:, None].to(tl.int64) * stride_k + ranks[None, :].to(tl.int64) * stride_r
    return tl.load(p_ptr + offsets, mask[:, None] & (ranks < R)[None, :], 0.0)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [M, 2I]
    p_ptr,  # [R, I]
    out_ptr,  # [M, I + columns]
    product_ptr,  # the R columns behind, or fp32 [splits, M, R]
    num_rows,
    in_stride,
    out_stride,
    product_stride,
    p_stride_r,
    p_stride_k,
    BLOCKS: tl.constexpr,  # of each split
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    split = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for index in range(0, BLOCKS):
        columns = (split * BLOCKS + index) * BLOCK_K + tl.arange(0, BLOCK_K)
        column_mask = columns < I
        mask = row_mask[:, None] & column_mask[None, :]
        gate_at = gate_up_ptr + rows[:, None] * in_stride + columns[None, :]
        gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
        value, _ = _activation(gate, GELU)
        y = (value.to(dtype).to(tl.float32) * up).to(dtype)
        tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], y, mask)
        if R > 0:
            p = _projection_tile(p_ptr, columns, column_mask, p_stride_r, p_stride_k, ranks, R)
            acc = tl.dot(y, p, acc, input_precision="ieee")
    if R > 0:
        product = product_ptr + (split.to(tl.int64) * num_rows + rows)[:, None] * product_stride + ranks[None, :]
        tl.store(product, acc.to(product_ptr.dtype.element_ty), row_mask[:, None] & (ranks < R)[None, :])


def swiglu(
    gate_up: Tensor, projection: Tensor | None = None, activation: str = "silu", tile: Tile | None = None
) -> Tensor:
    """`swiglu.swiglu`; `tile` is for measurements."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    columns = 0 if projection is None else projection.shape[0]
    taken = fused(projection)
    rank = 0 if taken is None else columns
    tile = tile or forward_tile_for(num_rows, rank, gate_up.element_size())
    row_tiles, blocks = cdiv(num_rows, tile.block_m), cdiv(width, tile.block_k)
    splits, blocks_per_split = splits_for(row_tiles, blocks) if rank else (blocks, 1)
    out = torch.empty(num_rows, width + columns, dtype=gate_up.dtype, device=gate_up.device)
    product = out[:, width:]
    if rank and splits > 1:
        product = torch.empty(splits, num_rows, rank, dtype=torch.float32, device=gate_up.device)
    with on_device(gate_up):
        swiglu_kernel[(row_tiles, splits)](
            gate_up,
            taken,
            out,
            product,
            num_rows,
            gate_up.stride(0),
            out.stride(0),
            product.stride(-2),
            0 if taken is None else taken.stride(0),
            0 if taken is None else taken.stride(1),
            BLOCKS=blocks_per_split,
            I=width,
            R=rank,
            GELU=activation == "gelu_tanh",
            BLOCK_R=max(16, next_power_of_2(max(rank, 1))),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if rank and splits > 1:
            sum_partials(product, out[:, width:])
        fill_columns(out, width, projection)
    return out


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,  # [M, 2I + columns], overwritten
    grad_ptr,  # [M, I], overwritten
    low_ptr,  # [M, L] or None
    down_a_ptr,  # [L, I]
    p_ptr,  # [R, 2I]
    product_ptr,  # the R columns behind, or fp32 [splits, M, R]
    num_rows,
    gate_up_stride,
    grad_stride,
    low_stride,
    product_stride,
    down_a_stride_r,
    down_a_stride_k,
    p_stride_r,
    p_stride_k,
    BLOCKS: tl.constexpr,  # of each split
    I: tl.constexpr,  # noqa: E741
    L: tl.constexpr,
    R: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    split = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    lows = tl.arange(0, BLOCK_L)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if L > 0:
        low_at = low_ptr + rows[:, None] * low_stride + lows[None, :]
        low = tl.load(low_at, row_mask[:, None] & (lows < L)[None, :], 0.0)
    for index in range(0, BLOCKS):
        columns = (split * BLOCKS + index) * BLOCK_K + tl.arange(0, BLOCK_K)
        column_mask = columns < I
        mask = row_mask[:, None] & column_mask[None, :]
        gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + columns[None, :]
        grad_at = grad_ptr + rows[:, None] * grad_stride + columns[None, :]
        grad = tl.load(grad_at, mask, 0.0).to(tl.float32)
        if L > 0:
            offsets = lows[:, None].to(tl.int64) * down_a_stride_r + columns[None, :].to(tl.int64) * down_a_stride_k
            down_a = tl.load(down_a_ptr + offsets, (lows < L)[:, None] & column_mask[None, :], 0.0)
            grad += tl.dot(low, down_a, input_precision="ieee")
        gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
        value, derivative = _activation(gate, GELU)
        value = value.to(dtype).to(tl.float32)
        grad_gate = (grad * up * derivative).to(dtype)
        grad_up = (grad * value).to(dtype)
        tl.store(grad_at, (value * up).to(dtype), mask)
        tl.store(gate_at, grad_gate, mask)
        tl.store(gate_at + I, grad_up, mask)
        if R > 0:
            p_gate = _projection_tile(p_ptr, columns, column_mask, p_stride_r, p_stride_k, ranks, R)
            p_up = _projection_tile(p_ptr, columns + I, column_mask, p_stride_r, p_stride_k, ranks, R)
            acc = tl.dot(grad_gate, p_gate, acc, input_precision="ieee")
            acc = tl.dot(grad_up, p_up, acc, input_precision="ieee")
    if R > 0:
        product = product_ptr + (split.to(tl.int64) * num_rows + rows)[:, None] * product_stride + ranks[None, :]
        tl.store(product, acc.to(product_ptr.dtype.element_ty), row_mask[:, None] & (ranks < R)[None, :])


def swiglu_backward_(
    gate_up_ext: Tensor,
    grad: Tensor,
    low: Tensor | None = None,
    down_a: Tensor | None = None,
    projection: Tensor | None = None,
    activation: str = "silu",
    tile: Tile | None = None,
) -> None:
    """`swiglu.swiglu_backward_`; `tile` is for measurements."""
    num_rows, width = grad.shape
    if low is not None and down_a is not None and fused(down_a) is None:
        grad.addmm_(low, down_a)
        low = down_a = None
    taken = fused(projection)
    rank = 0 if taken is None else taken.shape[0]
    low_rank = 0 if low is None else low.shape[1]
    tile = tile or backward_tile_for(num_rows, max(rank, low_rank), grad.element_size())
    row_tiles, blocks = cdiv(num_rows, tile.block_m), cdiv(width, tile.block_k)
    splits, blocks_per_split = splits_for(row_tiles, blocks) if rank or low_rank else (blocks, 1)
    product = gate_up_ext[:, 2 * width :]
    if rank and splits > 1:
        product = torch.empty(splits, num_rows, rank, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        swiglu_backward_kernel[(row_tiles, splits)](
            gate_up_ext,
            grad,
            low,
            down_a,
            taken,
            product,
            num_rows,
            gate_up_ext.stride(0),
            grad.stride(0),
            0 if low is None else low.stride(0),
            product.stride(-2),
            0 if down_a is None else down_a.stride(0),
            0 if down_a is None else down_a.stride(1),
            0 if taken is None else taken.stride(0),
            0 if taken is None else taken.stride(1),
            BLOCKS=blocks_per_split,
            I=width,
            L=low_rank,
            R=rank,
            GELU=activation == "gelu_tanh",
            BLOCK_L=max(16, next_power_of_2(max(low_rank, 1))),
            BLOCK_R=max(16, next_power_of_2(max(rank, 1))),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if rank and splits > 1:
            sum_partials(product, gate_up_ext[:, 2 * width :])
        fill_columns(gate_up_ext, 2 * width, projection)
